"""Resumable checkpoints of several engines: all shards in one folder that appears by a rename, `latest` moves last."""

import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from dschat_kit.runs import RunError, read_json, write_json

__all__ = ["load_checkpoint", "save_checkpoint"]


TORCH_WRITERS = ("PytorchStreamWriter", "inline_container")
"""What torch names when a disk takes no more: it raises no OSError."""


def save_checkpoint(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine], keep: int, *, step: int,
                    elapsed: float, state: dict) -> None:
    """Every rank calls it after `step` steps and `elapsed` seconds. A crash in between leaves the previous one valid.

    `state` is whatever JSON the stage needs to go on. Raises RunError when there is no room.
    """
    main, name = dist.get_rank() == 0, f"step-{step:06d}"
    temporary = folder / f".{name}.tmp"
    if main:
        for left_over in folder.glob(".step-*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        for role, engine in engines.items():
            engine.save_checkpoint(str(temporary / role), tag="state", exclude_frozen_parameters=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
            raise
        raise RunError(f"cannot write {temporary}: the disk may be full ({str(error).splitlines()[0]})\n"
                       "  change: free space, or --set checkpoint.every_steps=0") from error
    if main:
        write_json(temporary / "state.json", {"step": step, "world_size": dist.get_world_size(), "elapsed": elapsed,
                                              "state": state})
    dist.barrier()
    if main:
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        write_json(folder / "latest", name)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine]) -> dict | None:
    """What was saved beside the newest checkpoint, {"step", "elapsed", "state", ...}, after loading it into the
    engines; None when there is none. Raises RunError when it is damaged or of another number of ranks."""
    if not (folder / "latest").exists():
        return None
    place = folder / read_json(folder / "latest")
    state = read_json(place / "state.json")
    if state["world_size"] != dist.get_world_size():
        raise RunError(f"{place} was saved by {state['world_size']} ranks, got {dist.get_world_size()}\n"
                       f"  change: --num-gpus {state['world_size']}, or --fresh")
    for role, engine in engines.items():
        if engine.load_checkpoint(str(place / role), tag="state")[0] is None:
            raise RunError(f"{place / role} is not there\n  change: --fresh")
    return state
