"""`dschat bench data`: how fast rows become batches, with how much memory, and how a warm start feels.

Synthetic preference rows of about 200 tokens from four blended sources go through the whole data stage of a run; the
peer is a bare `datasets.map(batched=True)` with the same tokenizer over the same texts, in the same run.
"""

import json
import random
import tempfile
import time
from pathlib import Path

from dschat_kit.config import Data, Model, Pipeline
from dschat_kit.data import toy
from dschat_kit.data.datasets import StepSampler, TokenRows, preference_batch
from dschat_kit.data.pipeline import build_stage_data, tokenizer_of, write_tokens
from dschat_kit.data.store import TEXTS, table_writer
from dschat_kit.data.tokenizer import open_tokenizer, pad_id_of, train_tokenizer
from dschat_kit.machine import PeakMemory
from dschat_kit.runs import prepare_stage

TOKENS, SOURCES, BATCH = 200, 4, 32
TINY_VOCABULARY, TOY_TEXTS = 600, 15_000
PEER_ROWS = 20_000


def bench_data(rows: int, tokenizer: str | None = None, report=lambda line: None) -> dict:
    """Measure the data stage on `rows` synthetic rows; `tokenizer` is a folder, None is one trained as tiny's is.

    rows_per_second: sources read to rows written, cold. peak_anon_mb: anonymous memory of this process above all, in
    MiB, mapped files not counted. first_batch_seconds, warm_first_batch_seconds: from the start of the data stage to
    the first batch of pairs, without and with the cache. share_of_bare_map: speed of tokenisation over the peer's.
    """
    with tempfile.TemporaryDirectory(prefix="dschat-bench-") as name:
        folder = Path(name)
        model = folder / "tokenizer"
        own = open_tokenizer(tokenizer) if tokenizer else train_tokenizer(
            (row["prompt"] + row["chosen"] for row in toy.toy_rows(TOY_TEXTS, 0)), TINY_VOCABULARY)
        own.save_pretrained(model)
        files = _write_sources(folder, rows, own)
        report(f"bench {rows} rows of about {TOKENS} tokens in {len(files)} files")
        pipeline = Pipeline(data=Data(sources=",".join(files), max_prompt_tokens=TOKENS, max_response_tokens=TOKENS),
                            model=Model(name=str(model)))
        with PeakMemory() as memory:
            built, cold = _first_batch(folder / "cold", pipeline, report)
        _, warm = _first_batch(folder / "warm", pipeline, report)
        return {"rows_per_second": rows / built, "peak_anon_mb": memory.peak_mb, "first_batch_seconds": cold,
                "warm_first_batch_seconds": warm, "share_of_bare_map": _share_of_bare_map(folder / "cold", pipeline)}


def _write_sources(folder: Path, rows: int, tokenizer) -> list[str]:
    """Four JSON-lines files of sentences of the toy world, numbered so that no two prompts are the same."""
    rng, facts = random.Random(0), toy.all_facts()
    answers = [toy.write_answer(rng.sample(facts, 2), rng) for _ in range(2000)]
    tokens = len(tokenizer("".join(answers), add_special_tokens=False)["input_ids"]) / len(answers)
    pick, files = max(1, round((TOKENS - 20) / 3 / tokens)), [f"{folder}/source{i}.jsonl" for i in range(SOURCES)]
    for source, name in enumerate(files):
        with open(name, "w", encoding="utf-8") as file:
            for number in range(source, rows, SOURCES):
                prompt, chosen, rejected = ("".join(rng.choices(answers, k=pick)) for _ in range(3))
                file.write(json.dumps({"prompt": f"\n\nHuman: {number}{prompt}\n\nAssistant:", "chosen": chosen,
                                       "rejected": rejected}) + "\n")
    return files


def _first_batch(root: Path, pipeline: Pipeline, report) -> tuple[float, float]:
    """(seconds until the rows were built, seconds until the first batch of pairs)."""
    started = time.perf_counter()
    run, _ = prepare_stage(root, "data", pipeline)
    build_stage_data(run, report)
    built = time.perf_counter() - started
    rows = TokenRows(run.path, "reward")
    sampler = StepSampler(rows=len(rows), batch_size=min(BATCH, len(rows)), seed=0)
    preference_batch(rows.take(sampler.indices(0)), pad_id_of(tokenizer_of(run)))
    return built, time.perf_counter() - started


def _share_of_bare_map(root: Path, pipeline: Pipeline) -> float:
    """Median over five alternating rounds of the peer's time over ours, on the same rows; both write what they made."""
    import datasets
    datasets.disable_progress_bars()
    rows = TokenRows(root / "data", "reward")
    texts = [list(column) for column in zip(*([row[name] for name in TEXTS] for row in rows.take(
        range(min(PEER_ROWS, len(rows))))), strict=True)]
    stream, write = table_writer(root / "texts.arrow", with_tokens=False)
    with stream:
        for start in range(0, len(texts[0]), 1000):
            write([column[start:start + 1000] for column in texts])
    table, sides = datasets.Dataset.from_file(str(root / "texts.arrow")), ("prompt", "chosen", "rejected")
    tokenizer, shares = open_tokenizer(root / "data" / "tokenizer"), []

    def bare(batch):
        return {f"{side}_ids": tokenizer(batch[side], add_special_tokens=False)["input_ids"] for side in sides}
    for number in range(5):
        clock = time.perf_counter()
        table.map(bare, batched=True, cache_file_name=str(root / f"bare{number}.arrow"), new_fingerprint=f"b{number}")
        middle = time.perf_counter()
        write_tokens(root / "texts.arrow", root / f"ours{number}.arrow", tokenizer, pipeline.data)
        shares.append((middle - clock) / (time.perf_counter() - middle))
    return sorted(shares)[2]
