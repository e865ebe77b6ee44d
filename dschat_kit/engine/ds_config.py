"""Typed settings -> DeepSpeed's configuration dictionary."""

from dschat_kit.config import Zero

__all__ = ["deepspeed_config"]

BUCKET = 50_000_000
"""Elements that are reduced or gathered at a time; DeepSpeed's default reserves 2 GB for them."""


def deepspeed_config(zero: Zero, dtype: str, *, micro_batch_size: int, accumulation: int, grad_clip: float) -> dict:
    """The dictionary for `deepspeed.initialize`. Losses are already means over the global batch, so nothing is
    prescaled; the optimiser is handed over (torch AdamW), so nothing has to be compiled."""
    optimisation = {"stage": zero.stage}
    if zero.stage:
        optimisation |= {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": BUCKET,
                         "allgather_bucket_size": BUCKET}
    if zero.stage == 3:
        optimisation |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET}
    return {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": accumulation,
            "gradient_clipping": grad_clip, "zero_optimization": optimisation, "bf16": {"enabled": dtype == "bf16"},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
            "wall_clock_breakdown": False}
