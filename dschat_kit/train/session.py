"""What every stage does alike: data, sums over ranks, metrics, checkpoints, export, result."""

import math
import time
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from dschat_kit.config import Dpo, Reward, Sft
from dschat_kit.data.pipeline import build_stage_data, tokenizer_of
from dschat_kit.data.store import intact
from dschat_kit.data.tokenizer import pad_id_of
from dschat_kit.engine.checkpoints import load_checkpoint, save_checkpoint
from dschat_kit.engine.ema import Ema
from dschat_kit.engine.engines import build_engine, grad_norm
from dschat_kit.engine.zero import whole_layers
from dschat_kit.feasible import refuse
from dschat_kit.machine import detect
from dschat_kit.metrics import JsonlWriter, truncate_after
from dschat_kit.models.lora import add_adapters, merge_adapters, save_adapter
from dschat_kit.models.saving import save_folder
from dschat_kit.runs import RunError, StageRun, open_run, prepare_stage, write_json
from dschat_kit.train.card import model_card
from dschat_kit.train.telemetry import Mirror, forward_flop, matmul_peak, peak_memory_mb
from dschat_kit.train.watch import Stopped, Watch


class Session:
    """One rank of one stage, from `config.json` to `result.json`."""

    def __init__(self, run: StageRun, resume: bool, console, watch: Watch):
        self.run, self.resume, self.console, self.started = run, resume, console, time.time()
        self.watch = watch
        watch.start(run.pipeline.telemetry.hang_minutes)
        self.pipeline, self.root = run.pipeline, run.root
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self.first_step, self.resumed_from = 0, list(run.status.get("resumed_from", [])) if resume else []
        self._metrics = self._samples = self._mirror = None
        self.memory: dict[str, float] = {}
        self._told, self._saved = 0.0, time.monotonic()
        self.pipeline.check_ranks(run.stage, self.world_size)
        refuse(self.pipeline, detect())

    def begin(self, total: int, engines: dict) -> dict | None:
        """Open the metrics files for `total` steps of `engines`. When resuming, load the newest checkpoint and return
        the state that was saved with it; None at the beginning, also when there is no checkpoint yet."""
        self.watch.rest()  # another number of ranks may take long to convert
        loaded = load_checkpoint(self.run.checkpoints, engines, self.say) if self.resume else None
        self.total, self.engines = total, engines
        for engine in engines.values():
            if hasattr(engine, "module"):  # a moving average computes nothing
                self.follow(engine.module)
        self.watch.beat()
        if loaded:
            self.first_step, self.started = loaded["step"], self.started - loaded["elapsed"]
        if self.resume:
            self.resumed_from = self.resumed_from + [self.first_step]
            self.say(f"goes on after step {self.first_step}")
        if self.is_main:
            for path in (self.run.metrics_path, self.run.samples_path):
                truncate_after(path, self.first_step)  # all lines when there is no checkpoint
            self._mirror = Mirror(self.run, self.pipeline.telemetry)
            self._metrics, self._samples = JsonlWriter(self.run.metrics_path), JsonlWriter(self.run.samples_path)
            self.run.update_status(state="running", step=self.first_step, total=total, resumed_from=self.resumed_from)
        return loaded["state"] if loaded else None

    def follow(self, module: torch.nn.Module) -> None:
        """Let every forward pass of the module count as progress: so does every token of a generation."""
        module.register_forward_pre_hook(lambda *_: self.watch.beat())

    def prepare_data(self) -> tuple:
        """(data folder, tokenizer, id for padding); the main rank builds the data stage first where it is missing."""
        data = open_run(self.root, "data")
        self.watch.rest()  # building takes as long as there are rows
        if self.is_main and (data.state != "finished" or not intact(data.path)):
            prepare_stage(self.root, "data", self.pipeline, preset=self.run.config["preset"], resume="auto")
            build_stage_data(data, report=self.say)
        dist.barrier()
        self.watch.beat()
        tokenizer = tokenizer_of(data)
        return data.path, tokenizer, pad_id_of(tokenizer)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in one exchange."""
        return self.sum_tensor(torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])).tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """A new tensor: the sum over all ranks."""
        self.watch.beat()
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        self.watch.beat()
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.tolist()

    def backward(self, engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
        """Add a rank's part of a global mean: DeepSpeed averages over ranks, so the part is multiplied by their number.
        The optimiser steps at the last micro batch of a step."""
        engine.backward(loss * self.world_size, scale_wrt_gas=False)
        engine.step()

    def log(self, step: int, row: dict, show: tuple[str, ...] = ()) -> None:
        """One line of metrics.jsonl after `step` steps. Raises RunError on every rank when a loss or a gradient is not
        finite; DeepSpeed would skip such steps without end."""
        watched = ("loss",) if self.pipeline.model.dtype == "fp16" else ("loss", "grad")  # fp16 may overflow
        bad = [name for name, value in row.items() if any(w in name for w in watched) and not math.isfinite(value)]
        if bad:
            raise RunError(f"{', '.join(bad)} is not finite at step {step}\n  change: a lower learning rate; "
                           f"checkpoints are kept in {self.run.checkpoints}")
        if self.is_main:
            self._metrics.write({"step": step, **row})
            self._mirror.write({"step": step, **row})
            if step == self.total or time.monotonic() - self._told > 0.5:  # an fsync costs more than a small step
                self.run.update_status(state="running", step=step, total=self.total)
                self._told = time.monotonic()
            if show:
                self.say(f"step {step}/{self.total}  " + "  ".join(f"{name} {row[name]:.4g}" for name in show))

    def keep_memory(self, peaks: dict[str, float]) -> None:
        """Remember the highest peak (MB) of each phase for result.json."""
        self.memory |= {phase: max(peak, self.memory.get(phase, 0.0)) for phase, peak in peaks.items()}

    def matmul_share(self, flop: float, seconds: float) -> float:
        """Share of the matmul peak that all ranks reach together, with `flop` of this rank in its `seconds`."""
        done, possible = self.sum(flop, self._matmul_peak * seconds)
        return done / possible

    @cached_property
    def _matmul_peak(self) -> float:
        return matmul_peak(self.pipeline.model.dtype, self.device)

    def trained(self, model: torch.nn.Module, settings: Sft | Reward | Dpo) -> deepspeed.DeepSpeedEngine:
        """The engine of a stage that trains one model, which gets adapters where lora.rank asks for them."""
        return build_engine(add_adapters(model, self.pipeline.lora, self.pipeline.seed), self.pipeline, lr=settings.lr,
                            batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size,
                            world_size=self.world_size, grad_clip=settings.grad_clip,
                            weight_decay=settings.weight_decay)

    def step_metrics(self, engine, lengths: list[tuple[int, int]], clock: float) -> dict[str, float]:
        """What such a stage says of an optimiser step that began at `clock` and read rows of (tokens, answered tokens):
        gradient, time, memory and share of the matmul peak."""
        seconds, (tokens, answered) = time.perf_counter() - clock, torch.tensor(lengths).unbind(1)
        passes = 2 if self.pipeline.lora.rank else 3
        share = self.matmul_share(passes * forward_flop(engine, tokens, answered), seconds)
        read, = self.sum(tokens.sum())
        peak, = self.largest(peak_memory_mb())
        self.keep_memory({"training": peak})
        return {"grad_norm": grad_norm(engine), "seconds": seconds, "tokens_read": read,
                "tokens_per_second": read / seconds, "matmul_share": share, "peak_memory_mb": peak}

    def samples(self, rows: list[dict]) -> None:
        """Lines of samples.jsonl (main rank's rows only)."""
        if self.is_main:
            for row in rows:
                self._samples.write(row)

    def checkpoint(self, step: int, state: dict | None = None) -> None:
        """Save after `step` steps where it is time; a resumed `begin` returns `state`.

        Ranks agree on it, as clocks and signals reach them at different moments. Raises Stopped on all of them after
        saving when one was asked to end.
        """
        settings = self.pipeline.checkpoint
        late = settings.every_minutes and time.monotonic() - self._saved > 60 * settings.every_minutes
        asked, late = self.largest(bool(self.watch.asked), bool(late and self.is_main))
        counted = settings.every_steps and step % settings.every_steps == 0
        last = step == self.total and (settings.every_steps or settings.every_minutes)  # before evaluation and export
        if asked or late or counted or last:
            save_checkpoint(self.run.checkpoints, self.engines, settings.keep, step=step,
                            elapsed=time.time() - self.started, state=state or {})
            self._saved = time.monotonic()
        if asked:
            raise Stopped(f"{self.watch.asked or 'a signal to another rank'}: asked to end, saved after step {step}")
        self.watch.can_save = step < self.total

    def export(self, model, tokenizer, average: Ema | None = None, name: str = "model") -> None:
        """The stage's Hugging Face folder `name`/, adapters merged and beside it as `adapter/`; every rank has to call
        it. Layer by layer: under ZeRO-3 no rank holds the whole. `average` stands for the weights that it follows."""
        small: dict[str, Tensor] = {}

        def layers() -> Iterator[dict[str, Tensor]]:
            for layer in whole_layers(model, keep=self.is_main):
                self.watch.beat()
                layer = average.instead(layer) if average else layer
                if self.is_main:
                    small.update((key, layer[key]) for key in layer if "lora_" in key or key == "score.weight")
                yield merge_adapters(model, layer)

        def beside(folder: Path) -> None:
            if self.pipeline.lora.rank:
                base = self.pipeline.model.name if self.run.stage == "sft" else open_run(self.root, "sft").model_dir
                save_adapter(model, self.pipeline.lora, small, str(base), folder / "adapter")

        if self.is_main:
            save_folder(model, tokenizer, self.run.path / name, layers(), beside)
        else:
            deque(layers(), maxlen=0)  # its part of what is gathered
        dist.barrier()

    def finish(self, result: dict) -> None:
        """Write result.json, the model cards and the final status."""
        result["memory_mb"] = dict(zip(self.memory, self.largest(*self.memory.values()), strict=True))
        if self.is_main:
            versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "datasets")}
            common = {"config_hash": self.run.config["config_hash"], "seed": self.pipeline.seed,
                      "world_size": self.world_size, "resumed_from": self.resumed_from, "versions": versions}
            for name, what in (("model", ""), ("ema", ", moving average of the weights")):
                if (self.run.path / name).exists():
                    card = model_card(self.run, {**result, **common}, what)
                    (self.run.path / name / "README.md").write_text(card, encoding="utf-8")
            write_json(self.run.path / "result.json", {**result, **common})
            self.run.update_status(state="finished", step=self.total, total=self.total, error=None)
        dist.barrier()

    def say(self, text: str) -> None:
        """A line for the reader of the cell (main rank) and for the log."""
        if self.is_main:
            print(f"{self.run.stage:<6} {text}", file=self.console, flush=True)
        print(text, flush=True)
