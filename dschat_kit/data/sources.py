"""Raw rows of any source -> PreferenceRecord. A `sample_id` is born here and follows the sample everywhere.

A source is a name of the table in formats.py, a file, a folder, a name of the Hub, or a function of the user's:
`register_source` in the module that `data.module` names, which every launched rank imports as well.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.config import Data
from dschat_kit.data import toy
from dschat_kit.data.files import LONGEST, DataError, Rows, raw_rows
from dschat_kit.data.formats import FORMATS, HUB, BadRow, Format, Pair, guess
from dschat_kit.data.prompts import Turn, dialogue_text

TOY_ROWS = 20_000
NAMED = {1: "text", 2: "response", 3: "preference"}


@dataclass(frozen=True, kw_only=True)
class PreferenceRecord:
    sample_id: str
    """Source name and hash of the row's content: the same row has the same id in every run. All pairs of one ranking
    share what stands before a `+`, the hash of their prompt."""
    source: str
    turns: tuple[Turn, ...]
    """What was said before the response; empty for plain text."""
    chosen: str
    rejected: str
    """Empty where the source has one response only."""
    split_key: str
    """Records with the same key are never split between stages nor between training and evaluation: the row's own
    `split_key` where it has one, else its dialogue without the system message."""
    part: str
    """`eval` where the source says that the row is held out, else empty."""
    margin: float | None = None
    """By how much the chosen response is better, where the source says so."""

    @property
    def prompt(self) -> str:
        """The dialogue before the response in Human/Assistant text, for display and for the toy world's gold reward."""
        return dialogue_text(self.turns)


SOURCES: dict[str, Callable[[Data, int], Rows]] = {}
Skipped = dict[str, tuple[int, str]]
"""reason -> (how many rows, what was said of the first one)"""


def register_source(name: str):
    """Decorator: makes `data.sources=NAME` call the function with (data settings, seed); it yields
    (place in words, `eval` or empty, row), the row in any format of formats.py."""
    def register(function: Callable[[Data, int], Rows]):
        SOURCES[name] = function
        return function
    return register


@register_source("toy")
def _toy(data: Data, seed: int) -> Rows:
    for number, row in enumerate(toy.toy_rows(data.rows or TOY_ROWS, seed)):
        yield f"toy row {number}", "", row


def load_module(name: str) -> None:
    """Import the user's module, a .py file or an importable name; it registers its sources. Raises DataError."""
    if not name or name in sys.modules:
        return
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        else:
            importlib.import_module(name)
    except Exception as error:  # it is the user's code
        raise DataError(f"data.module: {name!r} cannot be imported: {type(error).__name__}: {error}\n  expected: a .py "
                        "file or a module that calls register_source\n  change: --set data.module=PATH") from error


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


def read_source(name: str, label: str, data: Data, seed: int, report=lambda line: None,
                skipped: Skipped | None = None) -> Iterator[PreferenceRecord]:
    """All rows of one source, called `label` in ids; which columns were taken is reported before the first one.

    Rows that cannot be used are counted by reason in `skipped` where data.bad_rows says skip; otherwise they raise
    DataError at the end, the first one by file and line. So does a file that cannot be read to its end.
    """
    form, names, taken, bad = None, {}, 0, {}
    for place, part, row in SOURCES[name](data, seed) if name in SOURCES else raw_rows(name):
        if data.rows and taken >= data.rows:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow("is no object", f"got {type(row).__name__}\n  expected: an object with columns")
            if form is None:
                form, names = _format(name, label, row, data, place, report)
            pairs = _pairs(form, names, row)
            asked = Counter(dialogue_text(pair.turns) for pair in pairs if pair.rejected) if pairs[1:] else Counter()
            for pair in pairs:
                yield _record(pair, row, label, part, ranked=bool(asked) and asked[dialogue_text(pair.turns)] > 1)
            taken += not part
        except BadRow as error:
            count, first = bad.get(error.reason, (0, f"{place}: {error}"))
            bad[error.reason] = count + 1, first
    if bad and data.bad_rows == "stop":
        every = "".join(f"\n  {count} rows: {reason}" for reason, (count, _) in bad.items())
        raise DataError(f"{next(iter(bad.values()))[1]}{every}\n"
                        "  change: mend or remove them, or --set data.bad_rows=skip")
    if skipped is not None:
        skipped |= bad
    if not taken:
        raise DataError(f"data.sources: {name} has no rows to train on\n  expected: at least one that can be used"
                        + "".join(f"\n  skipped: {first}" for _, first in bad.values()) + "\n"
                        "  change:   --set data.sources=PATH")


def _format(name: str, label: str, row: dict, data: Data, place: str, report) -> tuple[Format, dict[str, str]]:
    """The format of a source and {its column: the row's}: known by name, named in data.columns, or guessed."""
    named = () if name in SOURCES else data.column_names()
    if named:
        form, columns, how = FORMATS[NAMED[len(named)]], named, "as data.columns says"
    elif name in HUB:
        form, columns, how = HUB[name], HUB[name].needs, "known by name"
    elif found := guess(row):
        form, columns, how = FORMATS[found[0]], found[1], f"guessed: {found[0]}"
    else:
        near = "\n            ".join(", ".join(form.needs) for form in FORMATS.values())
        raise DataError(f"{place}: no format fits its columns {', '.join(map(repr, row)) or '(none)'}\n"
                        f"  expected: {near}\n  change:   --set data.columns=PROMPT,CHOSEN,REJECTED")
    names = dict(zip(form.needs, columns, strict=True))
    if name not in SOURCES:
        shown = ", ".join(ours if ours == theirs else f"{ours}={theirs}" for ours, theirs in names.items())
        report(f"data  {label}: columns {shown} ({how})")
    return form, names


def _pairs(form: Format, names: dict[str, str], row: dict) -> list[Pair]:
    for column in names.values():
        if column not in row:
            raise BadRow(f"has no column {column!r}", f"has no column {column!r}\n  got:    "
                         f"{', '.join(map(str, row)) or 'no columns'}\n"
                         "  change: --set data.columns=PROMPT,CHOSEN,REJECTED as named here")
    renamed = {ours: row[theirs] for ours, theirs in names.items()}
    try:
        pairs = list(form.pairs(row if renamed.items() <= row.items() else {**row, **renamed}))
    except BadRow as error:
        for ours, theirs in names.items():
            error.args = (str(error).replace(repr(ours), repr(theirs)),)
        raise
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise BadRow("has other values than its format", f"has other values than its format: {error!r}") from None
    said = "".join(text for pair in pairs for text in (*(text for _, text in pair.turns), pair.chosen, pair.rejected))
    if len(said) > LONGEST:
        raise BadRow(f"is longer than {LONGEST >> 20} MiB")
    if "\x00" in said:
        raise BadRow("holds a NUL character")
    try:
        said.encode()
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which is no text") from None
    return pairs


def _record(pair: Pair, row: dict, label: str, part: str, ranked: bool) -> PreferenceRecord:
    prompt = dialogue_text(pair.turns) if pair.turns else ""
    digest = hashlib.blake2b("\x00".join((prompt, pair.chosen.strip(), pair.rejected.strip())).encode(), digest_size=8)
    key = row.get("split_key") or dialogue_text(t for t in pair.turns if t[0] != "system") if prompt else pair.chosen
    ranking = f"{hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()}+" if ranked else ""
    return PreferenceRecord(sample_id=f"{label}-{ranking}{digest.hexdigest()}", source=label, turns=tuple(pair.turns),
                            chosen=pair.chosen, rejected=pair.rejected, part=part, margin=pair.margin,
                            split_key=" ".join(str(key).split()))


def preview(data: Data, seed: int = 0) -> None:
    """Print, before anything is built, which columns each source is read with, and its first record."""
    load_module(data.module)
    names = [name for name, _ in data.weighted_sources()]
    for name, label in zip(names, labels_of(names), strict=True):
        record = next(iter(read_source(name, label, data, seed, print)))
        print(f"{record.sample_id}\n  prompt   {record.prompt!r}\n  chosen   {record.chosen!r}\n"
              f"  rejected {record.rejected!r}")
