"""`dschat bench data`: exactly the keys that are promised, and figures that measure what they say."""

import json

import numpy as np
import pytest

from dschat_kit import cli
from dschat_kit.data.pipeline import build_stage_data
from dschat_kit.data.tokenizer import train_tokenizer
from dschat_kit.machine import PeakMemory


def test_what_is_printed(tmp_path, capsys, monkeypatch):
    train_tokenizer(["the cow says moo and eats grass"] * 9, 300).save_pretrained(tmp_path)
    monkeypatch.setattr("dschat_kit.data.benchmark.PEER_ROWS", 200)
    assert cli.main(["bench", "data", "--rows", "1000", "--json", "--tokenizer", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"rows_per_second", "peak_anon_mb", "first_batch_seconds", "warm_first_batch_seconds",
                          "share_of_bare_map"}
    assert all(value > 0 for value in found.values())
    assert found["warm_first_batch_seconds"] < found["first_batch_seconds"]
    assert found["rows_per_second"] > 1000 / found["first_batch_seconds"]


def test_too_few_rows_are_refused(capsys):
    assert cli.main(["bench", "data", "--rows", "3"]) == 2 and "--rows: got 3" in capsys.readouterr().err


def test_the_memory_that_is_measured_is_anonymous(tmp_path):
    """An array counts, a mapped file that is read does not."""
    np.save(tmp_path / "file.npy", np.ones(30_000_000, dtype=np.uint8))
    peaks = []
    for make in (lambda: np.load(tmp_path / "file.npy", mmap_mode="r").sum(),
                 lambda: np.ones(30_000_000, dtype=np.uint8).repeat(2).sum()):
        with PeakMemory() as memory:
            memory._done.wait(0.1)
            before = memory.peak_mb
            for _ in range(5):
                make()
                memory._done.wait(0.01)
        peaks.append(memory.peak_mb - before)
    assert peaks[0] < 20 < 40 < peaks[1]


def test_the_sources_are_blended_and_the_rows_have_the_length_they_should(tmp_path):
    from dschat_kit.config import Data, Model, Pipeline
    from dschat_kit.data import benchmark
    from dschat_kit.runs import prepare_stage
    tokenizer = train_tokenizer([" A cow says moo. Good question."] * 9, 300)
    files = benchmark._write_sources(tmp_path, 1000, tokenizer)
    run, _ = prepare_stage(tmp_path / "run", "data", Pipeline(data=Data(sources=",".join(files)),
                                                             model=Model(vocab_size=300)))
    tokenizer.save_pretrained(tmp_path / "t")
    result = build_stage_data(run, report=lambda _: None)
    assert set(result["read"].values()) == {250} and len(result["read"]) == 4
    total = sum(side["median"] for side in result["tokens"]["reward"].values())
    assert total == pytest.approx(200, rel=0.35)
