"""build_stage_data: sources -> prompts -> splits -> token rows on disk, with an account of what was kept and cut.

    data/rows/{sft,reward,ppo,eval}  Arrow tables, memory-mapped by every rank
    data/tokenizer/                  the tokenizer of the pass
Runs by itself: python -m dschat_kit.data.pipeline --run RUN/data
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import numpy as np

from dschat_kit.config import ConfigError, Pipeline
from dschat_kit.data.prompts import prompt_text, response_text
from dschat_kit.data.sources import DataError, PreferenceRecord, read_source
from dschat_kit.data.splits import PARTS, blend, epoch_order, part_of, resolve_weights
from dschat_kit.data.tokenizer import open_tokenizer, train_tokenizer
from dschat_kit.runs import RunError, StageRun, parse_sources, write_json

__all__ = ["build_stage_data", "tokenizer_of"]


def build_stage_data(run: StageRun, report=print) -> dict:
    """Build `run` (a data stage whose config.json is written) unless it is finished; returns its result.

    Raises DataError or ConfigError for what the user can mend.
    """
    with run.lock():
        if run.status.get("state") == "finished":
            return run.result
        started = time.time()
        run.update_status(state="running", step=0, total=4, started=started, error=None)
        try:
            result = _build(run, run.pipeline, report)
        except (ConfigError, RunError, OSError) as error:
            run.update_status(state="failed", error=str(error))
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
    sources = parse_sources(pipeline.data.sources)
    pools, account = _split(pipeline, [name for name, _ in sources])
    run.update_status(step=1)
    blended = {part: _blend(pools[part], [w for _, w in sources], pipeline.seed) for part in PARTS}
    blended["eval"] = blended["eval"][: pipeline.data.eval_rows]
    for part, records in blended.items():
        report(f"data  {part:<6} {len(records):>7} rows")
        if not records:
            raise DataError(f"no rows are left for {part}\n  expected: at least one row for each of {', '.join(PARTS)}\n"
                            "  change:   more rows in data.sources, data.stage_split or data.eval_fraction")
    tokenizer = _tokenizer(pipeline, blended["sft"])
    tokenizer.save_pretrained(run.path / "tokenizer")
    run.update_status(step=2)
    truncated = {part: _write(run.path / "rows" / part, records, tokenizer, pipeline) for part, records in blended.items()}
    run.update_status(step=3)
    return account | {"rows": _counts(blended), "truncated": truncated, "realised_weights": _weights(blended),
                      "overlaps": _overlaps(blended), "vocabulary": len(tokenizer),
                      "tokens": {part: _lengths(run.path / "rows" / part) for part in PARTS}}


def _split(pipeline: Pipeline, names: list[str]) -> tuple[dict, dict]:
    """Records by part and source. A prompt that any source holds out is dropped from training in all of them."""
    data = pipeline.data
    records = {name: list(read_source(name, data, pipeline.seed)) for name in names}
    placed: dict[str, list[tuple[str, PreferenceRecord]]] = {}
    for name, rows in records.items():
        fraction = 0.0 if any(record.part == "eval" for record in rows) else data.eval_fraction
        placed[name] = [(r.part or part_of(r.split_key, data.split_shares(), fraction), r) for r in rows]
    held = {r.split_key for rows in placed.values() for part, r in rows if part == "eval"}
    pools, dropped = {part: [] for part in PARTS}, Counter()
    for name, rows in placed.items():
        mine = {part: [] for part in PARTS}
        for part, record in rows:
            if part != "eval" and record.split_key in held:
                dropped[name] += 1
            else:
                mine[part].append(record)
        for part in PARTS:
            pools[part].append(mine[part])
    return pools, {"read": {n: len(r) for n, r in records.items()}, "dropped_because_held_out": dict(dropped)}


def _blend(pools: list[list[PreferenceRecord]], given: list, seed: int) -> list[PreferenceRecord]:
    sizes = [len(pool) for pool in pools]
    if not sum(sizes):
        return []
    shuffled = [[pool[i] for i in epoch_order(len(pool), seed, 0)] for pool in pools]
    return [shuffled[source][row] for source, row in blend(resolve_weights(given, sizes), sizes)]


def _tokenizer(pipeline: Pipeline, records: list[PreferenceRecord]):
    if pipeline.model.name != "scratch":
        return open_tokenizer(pipeline.model.name)
    texts = [prompt_text(r.prompt) + response_text(t) for r in records for t in (r.chosen, r.rejected)]
    return train_tokenizer(texts, pipeline.model.vocab_size)


def _write(path: Path, records: list[PreferenceRecord], tokenizer, pipeline: Pipeline) -> dict:
    """One Arrow table; returns how many texts were cut. Ids of a whole response end with EOS, of a cut one do not."""
    import datasets
    limits, cut = pipeline.data, Counter()
    prompts = [prompt_text(r.prompt) for r in records]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    columns = {"sample_id": [r.sample_id for r in records], "source": [r.source for r in records], "prompt": prompts,
               "prompt_ids": [row[-limits.max_prompt_tokens:] for row in ids]}
    cut["prompt"] = sum(len(row) > limits.max_prompt_tokens for row in ids)
    for side in ("chosen", "rejected"):
        columns[side] = [response_text(getattr(r, side)) for r in records]
        ids = [row + [tokenizer.eos_token_id] for row in tokenizer(columns[side], add_special_tokens=False)["input_ids"]]
        columns[f"{side}_ids"] = [row[: limits.max_response_tokens] for row in ids]
        cut[side] = sum(len(row) > limits.max_response_tokens for row in ids)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return dict(cut)


def _counts(blended: dict) -> dict:
    counts = defaultdict(dict)
    for part, records in blended.items():
        for source, number in Counter(r.source for r in records).items():
            counts[source][part] = number
    return dict(counts)


def _weights(blended: dict) -> dict:
    return {part: {s: n / len(records) for s, n in Counter(r.source for r in records).items()}
            for part, records in blended.items()}


def _overlaps(blended: dict) -> dict:
    keys = {part: {r.split_key for r in records} for part, records in blended.items()}
    return {f"{a} and {b}": len(keys[a] & keys[b]) for i, a in enumerate(PARTS) for b in PARTS[i + 1:]}


def _lengths(path: Path) -> dict:
    import datasets
    table = datasets.load_from_disk(str(path))
    return {column: {q: float(np.quantile([len(row) for row in table[f"{column}_ids"]], p))
                     for q, p in (("median", 0.5), ("p95", 0.95), ("max", 1.0))} for column in ("prompt", "chosen", "rejected")}


def main(argv: list[str] | None = None) -> int:
    """Command line of the data stage. Exit code 2 with a message for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path)
    run = StageRun(parser.parse_args(argv).run)
    try:
        result = build_stage_data(run, report=lambda line: print(line, flush=True))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"overlaps": sum(result["overlaps"].values()), "truncated": result["truncated"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
