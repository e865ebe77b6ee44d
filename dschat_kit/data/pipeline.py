"""build_stage_data: sources -> prompts -> splits -> token rows on disk, with an account of what was kept and cut.

    data/rows/{sft,reward,ppo,eval}  Arrow tables, memory-mapped by every rank
    data/tokenizer/                  the tokenizer of the pass
Runs by itself: python -m dschat_kit.data.pipeline --run RUN/data
"""

import argparse
import os
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np

from dschat_kit.config import ConfigError, Data, Pipeline
from dschat_kit.data.prompts import prompt_text, response_text
from dschat_kit.data.sources import DataError, PreferenceRecord, labels_of, read_source
from dschat_kit.data.splits import PARTS, blend, epoch_order, part_of, resolve_weights
from dschat_kit.data.tokenizer import open_tokenizer, train_tokenizer
from dschat_kit.runs import RunError, StageRun, cannot, write_json

__all__ = ["build_stage_data", "split_records", "token_columns", "tokenizer_of"]

Pools = dict[str, dict[str, list[PreferenceRecord]]]
"""part -> label of the source -> its records"""


def build_stage_data(run: StageRun, report=print) -> dict:
    """Build `run` (a data stage whose config.json is written) unless it is finished; returns its result.

    `report` gets lines for the reader. Raises RunError (DataError for a row) or ConfigError for what a user can mend.
    """
    with run.lock():
        if run.status.get("state") == "finished":
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
    pools, account = split_records(pipeline)
    run.update_status(step=1)
    weights = [weight for _, weight in pipeline.data.weighted_sources()]
    blended = {part: _blend(part, pools[part], weights, pipeline.seed) for part in PARTS}
    blended["eval"] = blended["eval"][: pipeline.data.eval_rows]
    for part, records in blended.items():
        report(f"data  {part:<6} {len(records):>7} rows")
    tokenizer = _tokenizer(pipeline, blended["sft"])
    tokenizer.save_pretrained(run.path / "tokenizer")
    run.update_status(step=2)
    cut, lengths = {}, {}
    for part, records in blended.items():
        columns, cut[part] = token_columns(records, tokenizer, pipeline.data)
        lengths[part] = _lengths(columns)
        _save(columns, run.path / "rows" / part)
    run.update_status(step=3)
    report("data  longer than the limits, cut: "
           + ", ".join(f"{sum(counts[side] for counts in cut.values())} {side}" for side in cut["sft"]))
    return account | {"rows": _counts(blended), "truncated": cut, "realised_weights": _weights(blended),
                      "overlaps": _overlaps(blended), "vocabulary": len(tokenizer), "tokens": lengths}


def split_records(pipeline: Pipeline) -> tuple[Pools, dict]:
    """All records by part and source, and counts of those read and dropped.

    A prompt that any source holds out is dropped from training in all of them.
    """
    data, names = pipeline.data, [name for name, _ in pipeline.data.weighted_sources()]
    placed: dict[str, list[tuple[str, PreferenceRecord]]] = {}
    for name, label in zip(names, labels_of(names), strict=True):
        rows = list(read_source(name, label, data, pipeline.seed))
        fraction = 0.0 if any(record.part == "eval" for record in rows) else data.eval_fraction
        placed[label] = [(r.part or part_of(r.split_key, data.split_shares(), fraction), r) for r in rows]
    held = {r.split_key for rows in placed.values() for part, r in rows if part == "eval"}
    pools, dropped = {part: {label: [] for label in placed} for part in PARTS}, {}
    for label, rows in placed.items():
        kept = [(part, r) for part, r in rows if part == "eval" or r.split_key not in held]
        dropped[label] = len(rows) - len(kept)
        for part, record in kept:
            pools[part][label].append(record)
    return pools, {"read": {label: len(rows) for label, rows in placed.items()}, "dropped_because_held_out": dropped}


def _blend(part: str, pools: dict[str, list[PreferenceRecord]], given: list, seed: int) -> list[PreferenceRecord]:
    """The rows of one part in their order. Held-out rows are those that there are; weights bind the training."""
    weighted = any(weight is not None for weight in given) and part != "eval"
    empty = [label for label, pool in pools.items() if not pool]
    if empty and (weighted or len(empty) == len(pools)):
        raise DataError(f"data.sources: no rows of {', '.join(empty)} are left for {part}\n"
                        f"  expected: at least one row for each of {', '.join(PARTS)}\n"
                        "  change:   more rows in data.sources, data.stage_split or data.eval_fraction")
    chosen = [(pool, weight) for pool, weight in zip(pools.values(), given, strict=True) if pool]
    sizes = [len(pool) for pool, _ in chosen]
    shuffled = [[pool[i] for i in epoch_order(len(pool), seed, 0)] for pool, _ in chosen]
    order = blend(resolve_weights([weight for _, weight in chosen], sizes), sizes)
    return [shuffled[source][row] for source, row in order]


def _tokenizer(pipeline: Pipeline, records: list[PreferenceRecord]):
    if pipeline.model.name != "scratch":
        return open_tokenizer(pipeline.model.name)
    texts = [prompt_text(r.prompt) + response_text(t) for r in records for t in (r.chosen, r.rejected)]
    return train_tokenizer(texts, pipeline.model.vocab_size)


def token_columns(records: list[PreferenceRecord], tokenizer, data: Data) -> tuple[dict[str, list], dict[str, int]]:
    """The columns of a table, and how many prompts, chosen and rejected texts were cut to the limits.

    The ids of a whole response end with EOS, those of a cut one do not.
    """
    texts = {"prompt": [prompt_text(r.prompt) for r in records], "chosen": [response_text(r.chosen) for r in records],
             "rejected": [response_text(r.rejected) for r in records]}
    columns = {"sample_id": [r.sample_id for r in records], "source": [r.source for r in records], **texts}
    cut = {}
    for side, column in texts.items():
        limit, end = (data.max_prompt_tokens, []) if side == "prompt" else (data.max_response_tokens,
                                                                           [tokenizer.eos_token_id])
        ids = [row + end for row in tokenizer(column, add_special_tokens=False)["input_ids"]]
        columns[f"{side}_ids"] = [row[-limit:] if side == "prompt" else row[:limit] for row in ids]
        cut[side] = sum(len(row) > limit for row in ids)
    return columns, cut


def _save(columns: dict[str, list], path: Path) -> None:
    import datasets
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))


def _counts(blended: dict[str, list[PreferenceRecord]]) -> dict:
    sources = dict.fromkeys(r.source for records in blended.values() for r in records)
    return {source: {part: sum(r.source == source for r in records) for part, records in blended.items()}
            for source in sources}


def _weights(blended: dict[str, list[PreferenceRecord]]) -> dict:
    return {part: {s: n / len(records) for s, n in Counter(r.source for r in records).items()}
            for part, records in blended.items()}


def _overlaps(blended: dict[str, list[PreferenceRecord]]) -> dict:
    keys = {part: {r.split_key for r in records} for part, records in blended.items()}
    return {f"{a} and {b}": len(keys[a] & keys[b]) for i, a in enumerate(PARTS) for b in PARTS[i + 1:]}


def _lengths(columns: dict[str, list]) -> dict:
    return {side: {name: float(np.quantile([len(row) for row in columns[f"{side}_ids"]], p))
                   for name, p in (("median", 0.5), ("p95", 0.95), ("max", 1.0))}
            for side in ("prompt", "chosen", "rejected")}


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
