"""Raw rows of any source -> PreferenceRecord. A `sample_id` is born here and follows the sample everywhere.

A source is a function from data settings and a seed to rows; `register_source` adds one by name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.config import Data
from dschat_kit.data import toy
from dschat_kit.runs import RunError, source_files

__all__ = ["DataError", "PreferenceRecord", "gold_of", "labels_of", "read_source", "register_source"]

TOY_ROWS = 20_000


class DataError(RunError):
    """A row or a file that cannot be used, with the place where it stands."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRecord:
    sample_id: str
    """Source name and hash of the row's content: the same row has the same id in every run."""
    source: str
    prompt: str
    chosen: str
    rejected: str
    split_key: str
    """Records with the same key are never split between stages nor between training and evaluation: the row's own
    `split_key` where it has one, else its prompt."""
    part: str
    """`eval` where the source says that the row is held out, else empty."""


Rows = Iterator[tuple[str, str, dict]]
"""(place in words for messages, part, raw row)"""
SOURCES: dict[str, Callable[[Data, int], Rows]] = {}


def register_source(name: str):
    """Decorator: makes `data.sources=NAME` call the function with (data settings, seed); it yields Rows."""
    def register(function: Callable[[Data, int], Rows]):
        SOURCES[name] = function
        return function
    return register


@register_source("toy")
def _toy(data: Data, seed: int) -> Rows:
    for number, row in enumerate(toy.toy_rows(data.rows or TOY_ROWS, seed)):
        yield f"toy row {number}", "", row


def gold_of(source: str):
    """Where the true reward is known, the module with its gold_reward(), gold_parts(), bayes_accuracy(); else None."""
    return toy if source == "toy" else None


def labels_of(names: list[str]) -> list[str]:
    """Short names that tell the sources apart, registered ones too: the end of each path, as long as it has to be."""
    for depth in range(1, 1 + max(len(Path(name).parts) for name in names)):
        labels = [str(Path(*Path(name).parts[-depth:])) for name in names]
        taken = [label for label, name in zip(labels, names, strict=True) if label in SOURCES and name not in SOURCES]
        if len(set(labels)) == len(names) and not taken:
            return labels
    return names


def read_source(name: str, label: str, data: Data, seed: int) -> Iterator[PreferenceRecord]:
    """All rows of one source, called `label` in ids. Raises DataError naming file and line of an unusable one."""
    columns = ("prompt", "chosen", "rejected") if name in SOURCES else data.column_names()
    rows = SOURCES[name](data, seed) if name in SOURCES else _local(name) if source_files(name) else _hub(name)
    taken = 0
    for place, part, row in rows:
        if data.rows and taken >= data.rows:
            return
        yield _record(row, columns, place, part, label)
        taken += not part
    if not taken:
        raise DataError(f"data.sources: {name} has no rows to train on\n  expected: at least one with "
                        f"{', '.join(columns)}\n  change:   --set data.sources=PATH")


def _record(row: dict, columns: tuple[str, ...], place: str, part: str, label: str) -> PreferenceRecord:
    if not isinstance(row, dict):
        raise DataError(f"{place}: got {type(row).__name__}\n  expected: an object with {', '.join(columns)}\n"
                        "  change: mend or remove the line")
    texts = []
    for column in columns:
        if column not in row:
            raise DataError(f"{place}: has no column {column!r}\n  got:    {', '.join(map(str, row)) or 'no columns'}\n"
                            "  change: --set data.columns=PROMPT,CHOSEN,REJECTED")
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"{place}: {column!r} is {row[column]!r}\n  expected: text that is not empty\n"
                            "  change: mend or remove the row")
        texts.append(row[column])
    digest = hashlib.blake2b("\x00".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    prompt, chosen, rejected = texts
    key = str(row.get("split_key") or " ".join(prompt.split()))
    return PreferenceRecord(sample_id=f"{label}-{digest}", source=label, prompt=prompt, chosen=chosen,
                            rejected=rejected, split_key=key, part=part)


def _local(name: str) -> Rows:
    train, *held_out = source_files(name)
    for file in (*held_out, train):  # training rows last: data.rows bounds them
        yield from ((place, "" if file == train else "eval", row) for place, row in _json_lines(file))


def _json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{file.name}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield place, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: is not UTF-8 ({error.reason})\n  change: the file's encoding") from None
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: is no JSON ({error})\n  expected: one JSON object a line\n"
                                    "  change: mend or remove the line") from None
    except OSError as error:
        raise DataError(f"data.sources: {file} cannot be read: {error.strerror}\n"
                        "  change: the file's permissions, or --set data.sources=PATH") from error


def _hub(name: str) -> Rows:
    import datasets
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds; each means that the name cannot be loaded
        raise DataError(f"data.sources: {name!r} cannot be loaded: {str(error).partition(chr(10))[0]}\n"
                        "  expected: toy, a local JSON-lines file or folder, or a data set of a reachable Hub\n"
                        "  change: --set data.sources=PATH") from error
    for split in sorted(parts, key=lambda s: s == "train"):
        part = "" if split == "train" else "eval"
        yield from ((f"{name} {split} row {number}", part, row) for number, row in enumerate(parts[split]))
