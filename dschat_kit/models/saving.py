"""A model as an ordinary Hugging Face folder, written from parts of it: nobody has to hold it whole."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dschat_kit.models.loading import quiet_loading
from dschat_kit.runs import RunError, write_json

SHARD_BYTES = 2 * 10**9
"""Weights that are held, and stand in one file, at most, where no single layer has more."""


def save_folder(model: nn.Module, tokenizer, folder: Path, layers: Iterable[dict[str, Tensor]] | None = None,
                beside: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer, what `beside` adds) under a temporary name, then rename it
    into place. `layers` are parts of the state dict, taken one at a time. Raises RunError where there is no room."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet_loading():
            _save_weights(model, layers or [model.state_dict()], temporary)
        tokenizer.save_pretrained(temporary)
        beside(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}\n"
                       "  change: free space or --run-root") from error


def _save_weights(model: nn.Module, layers: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """config.json and the weights, by transformers, which knows what is tied and what the family's files name it."""
    files, total, shard, held = [], 0, {}, 0

    def write() -> None:
        model.save_pretrained(folder, state_dict=shard)
        files.append((folder / "model.safetensors").rename(folder / f"{len(files)}.part"))

    for layer in layers:
        size = sum({id(tensor): tensor.nbytes for tensor in layer.values()}.values())
        if shard and held + size > SHARD_BYTES:
            write()
            shard, held = {}, 0
        shard, held, total = shard | layer, held + size, total + size
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    places = {}
    for number, file in enumerate(files, 1):
        file = file.rename(folder / f"model-{number:05d}-of-{len(files):05d}.safetensors")
        with safe_open(file, framework="pt") as weights:
            places |= dict.fromkeys(weights.keys(), file.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
