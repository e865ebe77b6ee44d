"""Resumable checkpoints of several engines: all shards in one folder that appears by a rename, `latest` moves last."""

import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from dschat_kit.runs import RunError, read_json, write_json

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(folder: Path, step: int, engines: dict[str, deepspeed.DeepSpeedEngine], state: dict, keep: int) -> None:
    """Every rank calls it after `step` steps. A crash in between leaves the previous checkpoint valid."""
    main, name = dist.get_rank() == 0, f"step-{step:06d}"
    temporary = folder / f".{name}.tmp"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    for role, engine in engines.items():
        engine.save_checkpoint(str(temporary / role), tag="state", exclude_frozen_parameters=False)
    if main:
        write_json(temporary / "state.json", {"step": step, "world_size": dist.get_world_size(), **state})
    dist.barrier()
    if main:
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        write_json(folder / "latest", name)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine]) -> dict | None:
    """State of the newest checkpoint after loading it into the engines; None when there is none."""
    if not (folder / "latest").exists():
        return None
    place = folder / read_json(folder / "latest")
    state = read_json(place / "state.json")
    if state["world_size"] != dist.get_world_size():
        raise RunError(f"{place} was saved by {state['world_size']} ranks, got {dist.get_world_size()}\n"
                       f"  change: --num-gpus {state['world_size']}, or --fresh")
    for role, engine in engines.items():
        if engine.load_checkpoint(str(place / role), tag="state")[0] is None:
            raise RunError(f"{place / role} cannot be loaded\n  change: --fresh")
    return state
