"""What a stage costs: memory by phase, the share of the measured matmul peak, and the metrics in other programs' files.

FLOP of a forward pass over sequences of n tokens, a of them answered: 2 W n + 2 H a + 2 L d n (n + 1), with W the
weights of all linear layers but the language-model head, H those of the head, L layers and d the width (each token
looks at those up to itself, twice). A backward pass is two more; with adapters one, since frozen weights need no
gradient. Only what has to be computed at least once is counted: no padding, nothing that gradient checkpointing does
again.
"""

import re
import shutil
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import Tensor, nn

from dschat_kit.config import Telemetry
from dschat_kit.metrics import read_metrics
from dschat_kit.models.loading import DTYPES
from dschat_kit.runs import StageRun


class Mirror:
    """metrics.jsonl in TensorBoard's and CSV files, through DeepSpeed's monitor. Made anew from metrics.jsonl at each
    start, so that a resumed run has no step twice."""

    def __init__(self, run: StageRun, settings: Telemetry):
        asked = {"tensorboard": settings.tensorboard, "csv_monitor": settings.csv}
        folders = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
        for name in folders.values():
            shutil.rmtree(run.path / name, ignore_errors=True)
        self.master = MonitorMaster(get_monitor_config({
            name: {"enabled": enabled, "output_path": str(run.path), "job_name": folders[name]}
            for name, enabled in asked.items()})) if any(asked.values()) else None
        for row in read_metrics(run.metrics_path):
            self.write(row)

    def write(self, row: dict) -> None:
        """One line of metrics.jsonl."""
        if self.master:
            self.master.write_events([(name, value, row["step"]) for name, value in row.items()
                                      if name != "step" and isinstance(value, (int, float))])


def peak_memory_mb() -> float:
    """Most memory of this process since the last call (CPU: resident; where that cannot be reset, since its start)."""
    if deepspeed.get_accelerator().device_name() == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**20
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a container may forbid it
        pass
    return peak


def matmul_peak(dtype: str, device: torch.device, size: int = 0) -> float:
    """FLOP per second of a product of matrices `size` wide (0: large enough) on this rank, best of ten, while the
    other ranks do the same."""
    size = size or (8192 if device.type == "cuda" else 768)
    a, times = torch.ones(size, size, dtype=DTYPES[dtype], device=device), []
    for _ in range(11):
        begin = time.perf_counter()
        product = a @ a
        product[0, 0].item()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times[1:])


def forward_flop(model: nn.Module, lengths: Tensor, answered: Tensor) -> float:
    """FLOP of one forward pass over sequences of `lengths` (B,) tokens, with logits at `answered` (B,) of them."""
    (body, head, attention), n = weights_of(model), lengths.double()
    return float((2 * body * n + 2 * head * answered + 2 * attention * n * (n + 1)).sum())


def weights_of(model: nn.Module) -> tuple[int, int, int]:
    """(weights of the linear layers, of the language-model head, layers x width) of a causal or scalar model, or of
    that in an engine; adapters are left out."""
    from transformers.pytorch_utils import Conv1D
    module = getattr(model, "module", model)
    module = getattr(module, "classifier", module)
    out = module.get_output_embeddings()
    layers = [layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D))
              and "lora_" not in name and layer is not out]
    head = 0 if out is None else _numel(out.weight)
    return sum(_numel(layer.weight) for layer in layers), head, \
        module.config.num_hidden_layers * module.config.hidden_size


def _numel(weight: Tensor) -> int:
    return getattr(weight, "ds_numel", weight.numel())
