"""Models -> DeepSpeed engines: trained ones with an optimiser, frozen ones without."""

import deepspeed
import torch
from torch import nn

from dschat_kit.config import Model, Zero
from dschat_kit.engine.ds_config import deepspeed_config

__all__ = ["build_engine", "freeze", "learning_rate", "set_learning_rate"]


def build_engine(model: nn.Module, zero: Zero, settings: Model, *, lr: float, batch_size: int, micro_batch_size: int,
                 world_size: int, grad_clip: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8) -> deepspeed.DeepSpeedEngine:
    """A training engine; one optimiser step is batch_size rows over all ranks, micro_batch_size at a time on each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    config = deepspeed_config(zero, settings.dtype, micro_batch_size=micro_batch_size,
                              accumulation=batch_size // (micro_batch_size * world_size), grad_clip=grad_clip)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)
    return engine


def freeze(model: nn.Module, zero: Zero, settings: Model, device: torch.device) -> nn.Module:
    """A model that is only read. Under ZeRO-3 it is sharded like the trained ones; below, it stays a plain module."""
    model.requires_grad_(False).eval()
    if zero.stage < 3:
        return model.to(device)
    config = deepspeed_config(zero, settings.dtype, micro_batch_size=1, accumulation=1, grad_clip=1.0)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.eval()


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set before a step; schedules are pure functions of the step, so a resumed run needs no scheduler state."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def learning_rate(base: float, step: int, steps: int, warmup: float, minimum: float, shape: str) -> float:
    """Linear warm-up over the share `warmup` of the steps, then down to `minimum` * base as `cosine` or `linear`."""
    rising = warmup * steps
    if step < rising:
        return base * (step + 1) / rising if rising >= 1 else base
    progress = (step - rising) / max(steps - rising, 1)
    fall = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()) if shape == "cosine" else 1 - progress
    return base * (minimum + (1 - minimum) * fall)
