"""What a machine or a model folder cannot do, found without torch before a rank starts."""

import importlib.util
import json
import re
from pathlib import Path

from dschat_kit.config import ConfigError, Pipeline
from dschat_kit.machine import Machine
from dschat_kit.sections import error

SCRATCH = tuple(f"model.layers.0.{name}.weight" for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj"))

NOT_ADAPTED = re.compile(r"(norm\w*|ln_\w+|\w*embed\w*|wte|wpe|lm_head|score)\.weight$")
"""Weights that are no linear layers, or heads: norms, embeddings, and what may be tied to them."""


def refuse(pipeline: Pipeline, machine: Machine) -> None:
    """Raises ConfigError, with the reason, for a dtype, an adapter's target or an extra that is not there."""
    dtype, hint = pipeline.model.dtype, {"fp16": "--set model.dtype=fp32", "bf16": "--set model.dtype=fp16"}
    reason = {"fp16": machine.accelerator == "cpu" and "DeepSpeed scales fp16 losses on GPUs only",
              "bf16": machine.accelerator == "cuda" and not machine.bf16 and "a GPU here is older than Ampere and "
              "has no bf16"}.get(dtype)
    if reason:
        raise error("model.dtype", f"{dtype}, but {reason}", "a dtype that this machine multiplies", hint[dtype])
    if pipeline.telemetry.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise error("telemetry.tensorboard", "true, but tensorboard is not installed", "the package tensorboard",
                    "bash env/setup.sh tensorboard (the extra of that name), or --set telemetry.csv=true")
    if pipeline.rollout.cuda_graphs and machine.accelerator != "cuda":
        raise error("rollout.cuda_graphs", f"true on a {machine.accelerator}", "a CUDA device",
                    "--set rollout.cuda_graphs=false")
    for target in [] if pipeline.lora.targets == "auto" else pipeline.lora.targets.split(","):
        for name in filter(None, (pipeline.model.name, pipeline.reward.model)) if pipeline.lora.rank else ():
            known = [weight for weight in weight_names(name) if not NOT_ADAPTED.search(weight)]
            if known and not any(f".{weight}".endswith(f".{target.strip()}.weight") for weight in known):
                modules = sorted({weight.split(".")[-2] for weight in known if weight.endswith(".weight")})
                raise error("lora.targets", f"{target!r}, which matches no module of {name} that takes adapters",
                            f"some of {', '.join(modules)}", "--set lora.targets=auto")


def weight_names(model: str) -> list[str]:
    """Names of the weights in a local folder, read from its safetensors headers; [] where they cannot be read here."""
    if model == "scratch":
        return list(SCRATCH)
    names = []
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            try:
                names += json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except (json.JSONDecodeError, UnicodeDecodeError, OverflowError, MemoryError) as problem:
                raise ConfigError(f"model.name: {path} is damaged: {problem}\n  expected: a safetensors file\n"
                                  "  change:   fetch the model again") from None
    return [name for name in names if name != "__metadata__"]
