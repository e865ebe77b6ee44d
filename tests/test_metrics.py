"""metrics.jsonl: whole lines out, a tolerant reader, and no step twice after a resume."""

import json

import pytest

from dschat_kit.metrics import JsonlWriter, MetricsTail, read_metrics, truncate_after
from dschat_kit.runs import RunError

ROWS = [{"step": 0, "text": "before"}, {"step": 1, "loss": 0.5}, {"step": 2, "text": "line\u2028break\x85\nüß"}]


@pytest.fixture
def path(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for row in ROWS:
        writer.write(row)
    writer.close()
    return tmp_path / "metrics.jsonl"


def test_what_is_written_is_read(path):
    assert read_metrics(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS)


def test_a_line_is_there_before_the_writer_is_closed(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    writer.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write({"a": float("nan"), "b": [1.0, float("-inf")], "c": {"d": float("inf")}})
    assert (tmp_path / "m.jsonl").read_text() == '{"a": null, "b": [1.0, null], "c": {"d": null}}\n'


def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path):
    JsonlWriter(tmp_path / "m.jsonl").write({"text": "half a \ud83d"})
    assert read_metrics(tmp_path / "m.jsonl") == [{"text": "half a \ud83d"}]


def test_the_tail_waits_for_the_end_of_a_line(tmp_path):
    tail, file = MetricsTail(tmp_path / "m.jsonl"), tmp_path / "m.jsonl"
    assert tail.poll() == []  # not there yet
    file.write_text('{"step": 1}\n{"st')
    assert tail.poll() == [{"step": 1}]
    assert tail.poll() == []
    with open(file, "a") as more:
        more.write('ep": 2}\n')
    assert tail.poll() == [{"step": 2}]
    file.write_text('{"step": 9}\n')  # a new run
    assert tail.poll() == [{"step": 9}]


def test_a_resumed_run_begins_after_its_checkpoint(path):
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    truncate_after(path, 1)
    assert read_metrics(path) == ROWS[:2] and path.read_bytes().endswith(b"\n")
    truncate_after(path, 0)
    assert path.read_bytes() == b""
    truncate_after(path.with_name("absent.jsonl"), 3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl"]


def test_a_full_disk_is_said_in_words():
    with pytest.raises(RunError, match="cannot write /dev/full: No space left on device"):
        JsonlWriter("/dev/full").write(json.loads('{"step": 1}'))
