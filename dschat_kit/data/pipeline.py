"""build_stage_data: sources -> records -> split and blend -> token rows on disk, with an account of what was kept, cut
and left out. Rows stay on disk all the way; in memory are a few numbers a row.

    data/rows/       a memory-mapped Arrow table and the row numbers of each part (store.py)
    data/tokenizer/  the tokenizer of the pass
Runs by itself: python -m dschat_kit.data.pipeline --run RUN/data
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from array import array
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import numpy as np

from dschat_kit.config import ConfigError, Data, Pipeline
from dschat_kit.data import sources
from dschat_kit.data.files import hub_fingerprint
from dschat_kit.data.prompts import PromptStyle
from dschat_kit.data.selection import ALL, SIDES, Numbers, account_of, blend_rows, filter_rows, place_rows
from dschat_kit.data.sources import DataError, labels_of, load_module, read_source
from dschat_kit.data.splits import key_words
from dschat_kit.data.store import cached, intact, place, table_writer
from dschat_kit.data.tokenizer import EOS, PAD, encode, open_tokenizer, train_tokenizer
from dschat_kit.runs import RunError, StageRun, cannot, read_json, write_json

BATCH = 1000
KINDS = dict(source="h", held="Q", stage="Q", paired="b", text="b", eval="b", margin="d", content="Q")


def build_stage_data(run: StageRun, report=print) -> dict:
    """Build `run` (a data stage whose config.json is written) unless it is finished and whole; returns its result.

    `report` gets lines for the reader. Raises RunError (DataError for a row) or ConfigError for what a user can mend.
    """
    with run.lock():
        if run.status.get("state") == "finished" and intact(run.path):
            return run.result
        started = time.time()
        run.update_status(state="running", step=0, total=4, started=started, error=None, pid=os.getpid())
        try:
            result = _build(run, run.pipeline, report)
        except BaseException as error:
            shown = cannot(f"write in {run.path}", error) if isinstance(error, OSError) else error
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            run.update_status(state=state, error=str(shown) or type(error).__name__)
            if shown is not error:
                raise shown from error
            raise
        result |= {"seconds": time.time() - started, "config_hash": run.config["config_hash"], "world_size": 1,
                   "seed": run.pipeline.seed, "resumed_from": [],
                   "versions": {name: metadata.version(name) for name in ("datasets", "transformers", "tokenizers")}}
        write_json(run.path / "result.json", result)
        run.update_status(state="finished", step=4)
        return result


def tokenizer_of(run: StageRun):
    """The tokenizer that a data stage was built with."""
    return open_tokenizer(run.path / "tokenizer")


def _build(run: StageRun, pipeline: Pipeline, report) -> dict:
    data, names = pipeline.data, [name for name, _ in pipeline.data.weighted_sources()]
    load_module(data.module)
    tokenizer = None if pipeline.model.name == "scratch" else open_tokenizer(pipeline.model.name)
    style = PromptStyle(tokenizer, data.prompt_style, data.system, specials=(PAD, EOS) if tokenizer is None else ())

    def build(folder: Path) -> None:
        write_rows(folder, pipeline, tokenizer, style, report, lambda step: run.update_status(step=step))
    foreign = [name for name in names if name in sources.SOURCES and name != "toy"]
    home = run.root.parent if os.access(run.root.parent, os.W_OK) else run.root
    cache = run.path / ".build" if foreign else Path(os.environ.get("DSCHAT_CACHE") or home / ".data-cache")
    if foreign:  # only the user's code knows whether its rows are still the same; here may be those of a killed build
        shutil.rmtree(cache, ignore_errors=True)
    place(cached(cache, _key(run, names, tokenizer), build, report), run.path)
    if foreign:
        shutil.rmtree(cache)
    return read_json(run.path / "rows" / "account.json")


def _key(run: StageRun, names: list[str], tokenizer) -> str:
    """Hash of all that decides the bytes of the rows: settings and files (config_hash), tokenizer, code, versions."""
    module = run.pipeline.data.module
    found = util.find_spec(module) if module and not module.endswith(".py") else None
    code = [*sorted(Path(__file__).parent.glob("*.py")), *([Path(found.origin)] if found else [])]
    parts = [run.config["config_hash"], *(hub_fingerprint(name) for name in names if name not in sources.SOURCES),
             *(hashlib.sha256(path.read_bytes()).hexdigest() for path in code), metadata.version("tokenizers")]
    if tokenizer is not None:
        inner = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        parts += [inner, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:24]


def write_rows(folder: Path, pipeline: Pipeline, tokenizer, style: PromptStyle, report, step=lambda _: None) -> None:
    """The whole content of a data folder; `tokenizer` None trains one on the SFT rows."""
    data, weights = pipeline.data, [weight for _, weight in pipeline.data.weighted_sources()]
    records = folder / "records.arrow"
    numbers, labels, account = collect_records(records, pipeline, style, report)
    step(1)
    part, left_out = place_rows(numbers, data, len(labels))
    orders = blend_rows(numbers, part, labels, weights, data, pipeline.seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(_texts(records, orders["sft"]), pipeline.model.vocab_size)
        PromptStyle(tokenizer, system=data.system)  # it carries the template of Human/Assistant text
    tokenizer.save_pretrained(folder / "tokenizer")
    step(2)

    def progress(done: int) -> None:
        report(f"data  [{'#' * (20 * done // len(part)):20}] {done} of {len(part)} rows tokenised")
    numbers |= write_tokens(records, folder / "rows" / "table.arrow", tokenizer, data, progress)
    records.unlink()
    reasons = filter_rows(numbers, part, data, labels)
    if reasons:
        orders = blend_rows(numbers, part, labels, weights, data, pipeline.seed)
    held_out = dict(zip(labels, left_out.pop("held out").tolist(), strict=True))
    reasons += {reason: int(counts.sum()) for reason, counts in left_out.items()}
    for name, order in orders.items():
        np.save(folder / "rows" / f"{name}.npy", order)
        report(f"data  {name:<6} {len(order):>7} rows")
        unused = "held out, not evaluated on" if name == "eval" else "beyond the weights of the blend"
        reasons[unused] += int((part == ALL.index(name)).sum()) - len(order)
    step(3)
    account |= account_of(numbers, orders, labels) | {"vocabulary": len(tokenizer), "left_out": +reasons,
                                                     "dropped_because_held_out": held_out,
                                                     "markers_defused": style.defused}
    report("data  longer than the limits, cut: "
           + ", ".join(f"{sum(cut[side] for cut in account['truncated'].values())} {side}"
                       for side in ("prompt", "chosen", "rejected")))
    write_json(folder / "rows" / "account.json", account)


def collect_records(path: Path, pipeline: Pipeline, style: PromptStyle, report) -> tuple[Numbers, list[str], dict]:
    """Write the exact texts of all usable rows to `path`; returns their numbers, the sources' labels, and counts."""
    data, names = pipeline.data, [name for name, _ in pipeline.data.weighted_sources()]
    labels = labels_of(names)
    found, columns, skipped = {name: array(kind) for name, kind in KINDS.items()}, [], {label: {} for label in labels}
    stream, write = table_writer(path, with_tokens=False)
    with stream:
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            for r in read_source(name, label, data, pipeline.seed, report, skipped[label]):
                try:
                    written = style.response if r.turns else style.safe  # plain text is nobody's answer
                    texts = (style.prompt(r.turns), written(r.chosen), r.rejected and written(r.rejected))
                except ValueError as error:
                    raise DataError(f"{r.sample_id}: {error}\n  change: remove the row, or "
                                    "--set data.prompt_style=dialogue") from error
                held, stage = key_words(r.split_key)
                row = (number, held, stage, bool(r.rejected), not r.turns, bool(r.part),
                       np.nan if r.margin is None else r.margin, int(r.sample_id[-16:], 16))
                for kind, value in zip(found.values(), row, strict=True):
                    kind.append(value)
                columns.append((r.sample_id, label, *texts))
                if len(columns) == BATCH:
                    write(list(zip(*columns, strict=True)))
                    columns.clear()
            for reason, (count, first) in skipped[label].items():
                report(f"data  {label}: {count} rows skipped, {reason}; the first: {first.partition(chr(10))[0]}")
        if columns:
            write(list(zip(*columns, strict=True)))
    numbers = {name: np.frombuffer(values, dtype=values.typecode) for name, values in found.items()}
    counts = np.bincount(numbers["source"], minlength=len(labels))
    return numbers, labels, {
        "read": dict(zip(labels, counts.tolist(), strict=True)),
        "skipped": {label: {reason: count for reason, (count, _) in by.items()} for label, by in skipped.items()}}


def _batches(path: Path) -> Iterator[dict[str, list]]:
    import pyarrow as pa
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        yield from (batch.to_pydict() for batch in stream)


def _texts(path: Path, rows: np.ndarray) -> Iterator[str]:
    """Prompt and response, twice where there is a rejected one, of the given rows."""
    import datasets
    table = datasets.Dataset.from_file(str(path))
    for start in range(0, len(rows), BATCH):
        some = table[rows[start:start + BATCH]]
        for prompt, *responses in zip(some["prompt"], some["chosen"], some["rejected"], strict=True):
            yield from (prompt + response for response in responses if response)


def write_tokens(records: Path, path: Path, tokenizer, data: Data, progress=lambda rows: None) -> Numbers:
    """Write the records with their token ids; returns (N,) numbers of tokens, and which texts were cut. `progress` gets
    the rows done, every two seconds."""
    found, told = {name: array("i") for side in SIDES for name in (side, f"cut_{side}")}, time.monotonic()
    stream, write = table_writer(path, with_tokens=True)
    with stream:
        for batch in _batches(records):
            ids = {}
            for side in SIDES:
                ids[side], cut = token_column(batch[side], side, tokenizer, data)
                found[side].extend(map(len, ids[side]))
                found[f"cut_{side}"].extend(cut)
            write([*batch.values(), *ids.values()])
            if time.monotonic() - told > 2:
                told = time.monotonic()
                progress(len(found["prompt"]))
    return {name: np.frombuffer(values, dtype=np.int32) for name, values in found.items()}


def token_column(texts: list[str], side: str, tokenizer, data: Data) -> tuple[list[list[int]], list[bool]]:
    """Ids of prompts, or of chosen or rejected responses, and which were cut to the limits.

    The ids of a whole response end with EOS, those of a cut one do not. A response that a source does not have is [].
    """
    rows, kept = encode(tokenizer, texts), slice(-data.max_prompt_tokens, None)
    if side != "prompt":
        rows = [row + [tokenizer.eos_token_id] if text else [] for row, text in zip(rows, texts, strict=True)]
        kept = slice(data.max_response_tokens)
    ids = [row[kept] for row in rows]
    return ids, [len(cut) < len(row) for cut, row in zip(ids, rows, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Command line of the data stage. Exit code 2 with a message for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path)
    try:
        build_stage_data(StageRun(parser.parse_args(argv).run), report=lambda line: print(line, flush=True))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
