"""Typed settings -> DeepSpeed's configuration dictionary."""

from dschat_kit.config import Zero

BUCKET = 50_000_000
"""Elements that are reduced or gathered at a time; DeepSpeed's default reserves 2 GB for them. At ZeRO-3 also all that
are gathered ahead or kept for their next use: DeepSpeed's 10^9 are the whole of a smaller model on every rank."""


def deepspeed_config(zero: Zero, dtype: str, *, micro_batch_size: int, accumulation: int, grad_clip: float) -> dict:
    """The dictionary for `deepspeed.initialize`, the user's own JSON merged over ours. Losses are already means over
    the global batch, so nothing is prescaled; the optimiser is handed over, so none is named here. The pipeline has
    seen that the JSON contradicts no typed setting."""
    optimisation = {"stage": zero.stage}
    if zero.stage:
        optimisation |= {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": BUCKET,
                         "allgather_bucket_size": BUCKET}
    if zero.stage == 3:
        optimisation |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET,
                         "stage3_max_live_parameters": BUCKET, "stage3_max_reuse_distance": BUCKET}
    if zero.offload_optimizer:
        optimisation["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_parameters:
        optimisation["offload_param"] = {"device": "cpu"}
    ours = {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": accumulation,
            "gradient_clipping": grad_clip, "zero_optimization": optimisation, "bf16": {"enabled": dtype == "bf16"},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
            "wall_clock_breakdown": False} | ({"fp16": {"enabled": True}} if dtype == "fp16" else {})
    return _merged(ours, zero.user_tree())


def optimizer_device(config: dict) -> str:
    """Where the optimiser's states live: none (beside the shards), cpu or nvme."""
    return config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")


def _merged(ours: dict, theirs: dict) -> dict:
    both = {key: _merged(ours[key], value) for key, value in theirs.items()
            if isinstance(value, dict) and isinstance(ours.get(key), dict)}
    return {**ours, **theirs, **both}
