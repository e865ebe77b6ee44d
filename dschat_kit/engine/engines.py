"""Models -> DeepSpeed engines: trained ones with an optimiser, frozen ones without."""

import math

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from torch import nn

from dschat_kit.config import Pipeline
from dschat_kit.engine.ds_config import deepspeed_config, optimizer_device


def build_engine(model: nn.Module, pipeline: Pipeline, *, lr: float, batch_size: int, micro_batch_size: int,
                 world_size: int, grad_clip: float, weight_decay: float = 0.0, eps: float = 1e-8,
                 groups: list[list[nn.Parameter]] | None = None) -> deepspeed.DeepSpeedEngine:
    """A training engine of the weights that require gradients; one optimiser step is batch_size rows over all ranks,
    micro_batch_size at a time on each. `groups` share the engine: each has its own backward pass of a micro batch and
    its own learning rate. The log says which Adam it has."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    accumulation = batch_size // (micro_batch_size * world_size) * len(groups or [parameters])
    config = deepspeed_config(pipeline.zero, pipeline.model.dtype, micro_batch_size=micro_batch_size,
                              accumulation=accumulation, grad_clip=grad_clip)
    optimizer = _adam([{"params": group} for group in groups or [parameters]], config, lr=lr, eps=eps,
                      weight_decay=weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)
    engine.train()  # from_pretrained leaves eval mode, in which transformers checkpoints no activation; dropout is off
    if engine.zero_optimization_stage() == 0 and world_size == 1:
        engine.enable_backward_allreduce = False  # it would copy all gradients together and back, for nobody
    if engine.zero_optimization_stage() == 0 and pipeline.model.dtype == "fp32":
        def clip() -> None:  # as DeepSpeed's own in this case, which forgets the norm
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        engine.clip_fp32_gradients = clip
    return engine


def _adam(groups: list[dict], config: dict, **how) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's CPU kernel for offloaded states and its fused one on a GPU where they build, else torch's."""
    how["betas"], name, reason = (0.9, 0.95), "torch AdamW", ""
    on_gpu = "FusedAdam" if deepspeed.get_accelerator().device_name() == "cuda" else ""
    kind = "DeepSpeedCPUAdam" if optimizer_device(config) != "none" else on_gpu
    try:
        made, name = (getattr(deepspeed.ops.adam, kind)(groups, **how), kind) if kind else (None, name)
    except (RuntimeError, ImportError, OSError, MissingCUDAException, CUDAMismatchException) as error:
        made, reason = None, f", since {kind} cannot be built: {(str(error) or type(error).__name__).splitlines()[0]}"
    print(f"optimizer: {name}{reason}", flush=True)
    return made or torch.optim.AdamW(groups, fused=True, **how)


def freeze(model: nn.Module, pipeline: Pipeline, device: torch.device) -> nn.Module:
    """A model that is only read. Under ZeRO-3 it is sharded like the trained ones; below, it stays a plain module."""
    model.requires_grad_(False).eval()
    if pipeline.zero.stage < 3:
        return model.to(device)
    config = frozen_config(pipeline)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def frozen_config(pipeline: Pipeline) -> dict:
    """DeepSpeed's configuration of a model that is only read or just loaded."""
    config = deepspeed_config(pipeline.zero, pipeline.model.dtype, micro_batch_size=1, accumulation=1, grad_clip=1.0)
    config["zero_optimization"].pop("offload_optimizer", None)
    return config


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of all gradients of the last optimiser step, before clipping."""
    return float(engine.get_global_grad_norm())


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set before a step; schedules are pure functions of the step, so a resumed run needs no scheduler state."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def learning_rate(base: float, step: int, steps: int, warmup: float, minimum: float, shape: str) -> float:
    """Linear warm-up over the share `warmup` of the steps, then down to `minimum` * base as `cosine` or `linear`."""
    rising = int(warmup * steps)
    if step < rising:
        return base * (step + 1) / rising
    progress = (step - rising) / max(steps - rising, 1)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return base * (minimum + (1 - minimum) * fall)
