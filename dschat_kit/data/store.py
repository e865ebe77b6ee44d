"""Token rows on disk: one Arrow table that every rank maps, row numbers of each part, and a cache of such folders.

    FOLDER/rows/table.arrow  {sft,reward,ppo,eval}.npy  account.json  manifest.json      FOLDER/tokenizer/

A cache entry is built under a lock in a temporary folder and renamed; a run folder gets its files as hard links, so
the cache may be deleted at any time. What is damaged is told by the hashes of the manifest.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dschat_kit.runs import RunError, read_json, write_json

TEXTS, TOKENS = ("sample_id", "source", "prompt", "chosen", "rejected"), ("prompt_ids", "chosen_ids", "rejected_ids")


def table_writer(path: Path, with_tokens: bool):
    """(an Arrow stream to be closed, a function that appends one batch of columns to it)."""
    import pyarrow as pa
    schema = pa.schema([(name, pa.string()) for name in TEXTS]
                       + [(name, pa.list_(pa.int32())) for name in TOKENS] * with_tokens)
    stream = pa.ipc.new_stream(str(path), schema)
    return stream, lambda columns: stream.write_batch(pa.record_batch(columns, schema=schema))


def open_rows(data_dir: Path, part: str):
    """One part of a built data stage as a `datasets.Dataset`, memory-mapped. Raises RunError when it is damaged."""
    import datasets
    from pyarrow import ArrowInvalid
    folder = Path(data_dir) / "rows"
    try:
        table = datasets.Dataset.from_file(str(folder / "table.arrow"))
        return table.select(np.load(folder / f"{part}.npy"), new_fingerprint=f"{table._fingerprint}-{part}")
    except (OSError, ValueError, EOFError, ArrowInvalid) as error:
        raise RunError(f"{folder} holds no whole rows of {part}: {str(error).partition(chr(10))[0]}\n  change: "
                       f"`dschat data --run-root {folder.parent.parent}` builds damaged rows anew") from error


def intact(folder: Path) -> bool:
    """Whether every file of a built folder is there and has the bytes that were written."""
    try:
        manifest = read_json(folder / "rows" / "manifest.json")
        return all(_hash(folder / name) == written for name, written in manifest.items())
    except (RunError, OSError, ValueError, AttributeError):
        return False


def cached(cache: Path, key: str, build: Callable[[Path], None], report: Callable[[str], None]) -> Path:
    """The folder `cache/key`, made by `build(folder)` unless it is there and intact.

    One process builds, whoever comes meanwhile waits and reads; a crash leaves nothing that is taken for a result.
    """
    cache.mkdir(parents=True, exist_ok=True)
    entry, work = cache / key, cache / f".{key}.tmp"
    with open(cache / f".{key}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("data  another process builds the same rows: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if intact(entry):
            report(f"data  rows of the same sources and settings: taken from {entry}")
            return entry
        if entry.exists():
            report(f"data  {entry} is damaged: built anew")
        for old in (entry, work):
            shutil.rmtree(old, ignore_errors=True)
        try:
            (work / "rows").mkdir(parents=True)
            build(work)
            files = sorted(path for path in work.rglob("*") if path.is_file())
            write_json(work / "rows" / "manifest.json", {str(path.relative_to(work)): _hash(path) for path in files})
            for path in (*files, work / "rows", work):
                _sync(path)
            os.rename(work, entry)
            _sync(cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return entry


def place(entry: Path, target: Path) -> None:
    """Put the rows and the tokenizer of a built folder into a run's data folder, as hard links."""
    for name in ("rows", "tokenizer"):
        new = target / f".{name}.tmp"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(entry / name, new, copy_function=_link)
        shutil.rmtree(target / name, ignore_errors=True)
        new.rename(target / name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _hash(path: Path) -> str:
    import xxhash
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
