"""Files, folders and names -> raw rows. JSON lines are read here, because only so can a bad one be named, counted and
skipped; everything else is read by the `datasets` library, streamed, so that no second copy goes stale."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dschat_kit.data.formats import HUB, BadRow
from dschat_kit.feasible import hub_answers
from dschat_kit.runs import RunError, held_out, source_files

Rows = Iterator[tuple[str, str, object]]
"""(place in words for messages, `eval` or empty, raw row or the BadRow that it is)"""
LONGEST = 16 * 2**20
OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BUILDERS = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".json": "json"}
OPTIONS = {"csv": {"na_filter": False}, "text": {"sample_by": "paragraph"}}


class DataError(RunError):
    """A row or a file that cannot be used, with the place where it stands."""


def raw_rows(name: str) -> Rows:
    """All rows of a local file, folder or glob, or of a data set of the Hub. Raises DataError."""
    if not (files := source_files(name)):
        return _splits(name, _load_hub(name))
    if not any((Path(name) / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        return _local(files)
    import datasets
    with _reading(f"{name} cannot be read", "a whole folder of save_to_disk"):
        found = datasets.load_from_disk(name)
    return _splits(Path(name).name, found if isinstance(found, dict) else {"train": found})


@contextmanager
def _reading(failed: str, expected: str) -> Iterator[None]:
    """The library raises errors of many kinds; each means that a source cannot be read to its end."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        said = "the Hub does not answer" if isinstance(error, ConnectionError) else \
            f"{type(cause).__name__}: {str(cause).partition(chr(10))[0][:300]}"
        raise DataError(f"data.sources: {failed}: {said}\n  expected: {expected}\n"
                        "  change:   it, or --set data.sources=PATH") from error


def _local(files: list[Path]) -> Rows:
    parts = {file: "eval" if held_out(file) and len(files) > 1 else "" for file in files}
    for file in sorted(files, key=lambda f: not parts[f]):  # training rows last: data.rows bounds them
        empty = True  # one of several may be so because it was never written to its end
        try:
            for place, row in _read(file):
                empty = False
                yield place, parts[file], row
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            said = f"{getattr(error, 'strerror', None) or error}" or "the file ends too early"
            raise DataError(f"data.sources: {file} cannot be read: {said}\n"
                            "  change: the file or its permissions, or --set data.sources=PATH") from error
        if empty:
            raise DataError(f"data.sources: {file} has no rows\n  expected: at least one\n"
                            "  change:   the file, or --set data.sources=PATH")


def _read(file: Path) -> Iterator[tuple[str, object]]:
    kind, opened = next((s for s in reversed(file.suffixes) if s not in OPEN), ""), OPEN.get(file.suffix, open)
    if kind in BUILDERS and kind != ".json":
        return _by_library(file, BUILDERS[kind])
    with opened(file, "rb") as stream:
        whole = kind == ".json" and stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    return _by_library(file, "json") if whole else _json_lines(file, opened)


def _json_lines(file: Path, opened) -> Iterator[tuple[str, object]]:
    number = 0
    with opened(file, "rb") as stream:
        while line := stream.readline(LONGEST + 1):
            long = len(line) > LONGEST
            while len(line) > LONGEST and not line.endswith(b"\n"):
                line = stream.readline(LONGEST + 1) or b"\n"
            for piece in [b""] if long else line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                number += 1
                if number == 1:
                    piece = piece.removeprefix(b"\xef\xbb\xbf")
                if long or piece.strip():
                    yield f"{file.name}, line {number}", BadRow(f"is longer than {LONGEST >> 20} MiB") if long else \
                        _parse(piece)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("is not UTF-8", f"is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return BadRow("is no JSON", f"is no JSON ({str(error)[:200]})\n  expected: one JSON object a line")


def _by_library(file: Path, builder: str) -> Iterator[tuple[str, object]]:
    import datasets
    if not file.stat().st_size:
        return
    with _reading(f"{file} cannot be read as {builder}", "a whole file, text in UTF-8"):
        rows = datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True,
                                     **OPTIONS.get(builder, {}))
        for number, row in enumerate(rows, start=1):
            yield f"{file.name}, row {number}", row


def _load_hub(name: str) -> dict:
    import datasets
    known = {"path": name} | (HUB[name].hub if name in HUB else {})
    only, offline = known.pop("splits", ""), datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or not hub_answers()  # then its cache is asked, without retries
        with _reading(f"{name!r} cannot be loaded", "toy, a local file, a folder (./NAME), or a data set of the Hub"):
            try:
                found = datasets.load_dataset(**known)
            except RuntimeError:  # it would need code of a stranger, which is never run: the Hub has its rows without
                found = datasets.load_dataset(revision="refs/convert/parquet", **known)
            return {split: found[split] for split in (only.split(",") if only else found)}
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _splits(name: str, parts: dict) -> Rows:
    for split in sorted(parts, key=lambda s: s.startswith("train")):
        part = "" if split.startswith("train") else "eval"
        yield from ((f"{name} {split} row {number}", part, row) for number, row in enumerate(parts[split]))


def hub_fingerprint(name: str) -> str:
    """What tells two versions of a Hub's data set apart; empty for files, whose bytes are hashed with the stage."""
    return "" if source_files(name) else ",".join(part._fingerprint for part in _load_hub(name).values())
