"""Resumable checkpoints of several engines: all shards in one folder that appears by a rename, `latest` moves last.

A checkpoint lists the size and the checksum of its files: a damaged one is noticed and the one before is taken.
"""

import functools
import operator
import shutil
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as convert

from dschat_kit.runs import RunError, read_json, write_json

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
        shutil.rmtree(temporary, ignore_errors=True)  # so that there is room to say it
        raise RunError(f"cannot write {temporary}: the disk may be full ({str(error).splitlines()[0]})\n"
                       "  change: free space, or a smaller checkpoint.keep") from error
    dist.barrier()
    written = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    parts = _gathered({name: _fingerprint(temporary / name) for name in _share(written)})
    if main:
        files = functools.reduce(operator.or_, parts)
        write_json(temporary / "state.json", {"step": step, "world_size": dist.get_world_size(), "elapsed": elapsed,
                                              "state": state, "files": files})
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        write_json(folder / "latest", name)
        for old in _places(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, engines: dict[str, deepspeed.DeepSpeedEngine],
                    say: Callable[[str], None]) -> dict | None:
    """What was saved beside the newest checkpoint that is whole, {"step", "elapsed", "state", ...}, after loading it
    into the engines; None when there is none.

    With another number of ranks than when it was saved, the shards go through DeepSpeed's universal checkpoint: the
    run goes on to rounding, no longer bit for bit. Raises RunError when all that there are are damaged.
    """
    places = [folder / name for name in _agreed(lambda: [path.name for path in _places(folder)])]
    for place in reversed(places):
        state, damage = _look(place)
        if not damage:
            _load(place, engines, state["world_size"], say)
            return state
        say(f"{place.name} is damaged and set aside as damaged-{place.name}: {damage}")
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"damaged-{place.name}", ignore_errors=True)
            place.rename(folder / f"damaged-{place.name}")
    if places:
        raise RunError(f"no checkpoint in {folder} is whole\n  change: --fresh, to begin again")
    return None


def _load(place: Path, engines: dict[str, deepspeed.DeepSpeedEngine], ranks: int, say: Callable[[str], None]) -> None:
    universal = place / "universal"
    convertible = [] if ranks == dist.get_world_size() else [  # a moving average finds its parts by itself
        role for role, engine in engines.items() if getattr(engine, "zero_optimization_stage", int)()]
    if convertible:
        say(f"{place.name} is of {ranks} ranks, now {dist.get_world_size()}: the numbers agree to rounding, not in "
            "every bit")
        if dist.get_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
            for role in convertible:
                convert(Namespace(input_folder=str(place / role / "state"), strict=True, inject_missing_state=True,
                                  output_folder=str(universal / role / "state"), keep_temp_folder=False,
                                  num_extract_workers=1, num_merge_workers=1))  # others would fork beside gloo
        dist.barrier()
    for role, engine in engines.items():
        if role in convertible:
            engine._config.load_universal_checkpoint = True
        engine.load_checkpoint(str((universal if role in convertible else place) / role), tag="state")
        if role in convertible:
            engine._config.load_universal_checkpoint = False
    dist.barrier()
    if convertible and dist.get_rank() == 0:
        shutil.rmtree(universal)


def _look(place: Path) -> tuple[dict, str]:
    """(state.json, what is wrong with the checkpoint or ""), the same on every rank; each reads its share of files."""
    def read():
        try:
            state = read_json(place / "state.json")
            return state, "" if "files" in state else "state.json lists no files"
        except RunError as error:
            return {}, str(error)

    state, damage = _agreed(read)
    wrong = []
    for name in _share(state.get("files", ())):
        expected, got = state["files"][name], _fingerprint(place / name)
        if got != expected:
            what = "cannot be read" if got is None else "size" if got[0] != expected[0] else "checksum"
            wrong.append(f"{name}: {what}" + (f" {got}, expected {expected}" if got else ""))
    return state, damage or next((text for part in _gathered(wrong) for text in part), "")


def _places(folder: Path) -> list[Path]:
    """The checkpoints, oldest first. By name alone step-1000000 would stand before step-999999, and be deleted."""
    return sorted(folder.glob("step-*"), key=lambda place: (len(place.name), place.name))


def _share(names) -> list[str]:
    return sorted(names)[dist.get_rank()::dist.get_world_size()]


def _fingerprint(path: Path) -> list[int] | None:
    """[bytes, CRC-32] of a file, None where it cannot be read."""
    size = checksum = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    except OSError:
        return None
    return [size, checksum]


def _gathered(mine) -> list:
    """What every rank brings, on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _agreed(find: Callable):
    """What the main rank finds, on every rank."""
    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]
