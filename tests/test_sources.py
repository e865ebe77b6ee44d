"""Raw rows -> records: ids, columns, held-out parts, and every kind of row that cannot be used."""

import json
import os
from collections import Counter

import pytest

from dschat_kit.config import Data
from dschat_kit.data import sources
from dschat_kit.data.sources import DataError, gold_of, labels_of, read_source, register_source

ROW = {"prompt": "why?", "chosen": "because.", "rejected": "no."}


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(name: str, **settings):
    return list(read_source(name, labels_of([name])[0], Data(**settings), 0))


def test_a_row_becomes_a_record(tmp_path):
    record, other = read(lines(tmp_path / "rows.jsonl", ROW, "", ROW | {"chosen": "so."}))
    assert (record.turns, record.chosen, record.rejected, record.source) == ((("user", "why?"),), "because.", "no.",
                                                                             "rows.jsonl")
    assert record.prompt == "\n\nHuman: why?\n\nAssistant:"
    assert record.sample_id.startswith("rows.jsonl-") and record.sample_id != other.sample_id
    assert record.split_key == other.split_key == "Human: why? Assistant:" and record.part == ""


def test_the_id_follows_the_content_not_the_place(tmp_path):
    first = read(lines(tmp_path / "rows.jsonl", ROW))[0]
    (tmp_path / "other").mkdir()
    second = read(lines(tmp_path / "other" / "rows.jsonl", ROW | {"chosen": "x"}, ROW))[1]
    assert first.sample_id == second.sample_id


def test_the_pairs_of_a_ranking_share_the_first_part_of_their_ids(tmp_path):
    def said(text, *replies, role="assistant", rank=None):
        return {"text": text, "role": role, "rank": rank, "replies": list(replies)}

    tree = said("why?", *(said(f"answer {n}", rank=n) for n in range(3)), role="prompter")
    pair = said("who?", said("I", rank=0), said("you", rank=1), role="prompter")
    records = read(lines(tmp_path / "rows.jsonl", {"prompt": tree, "message_tree_id": "t"},
                         {"prompt": pair, "message_tree_id": "u"}))
    ids = [record.sample_id.rpartition("+") for record in records]
    assert len(ids) == 4 and len({first for first, *_ in ids[:3]}) == 1 and ids[0][0].startswith("rows.jsonl-")
    assert len({last for *_, last in ids}) == 4 and ids[3][:2] == ("", "")


def test_columns_may_have_other_names(tmp_path):
    row = {"q": "why?", "good": "because.", "bad": "no.", "split_key": "w"}
    record, = read(lines(tmp_path / "rows.jsonl", row), columns="q, good,bad")
    assert (record.chosen, record.split_key) == ("because.", "w")


@pytest.mark.parametrize("bad, said", [
    ('{"prompt": "why?",', "is no JSON"), ('["why?"]', "got list"), ('{"prompt": "why?"}', "has no column 'chosen'"),
    (json.dumps(ROW | {"prompt": " \n"}), "'prompt' is ' \\n'"), (json.dumps(ROW | {"chosen": ""}), "'chosen' is ''"),
    (json.dumps(ROW | {"rejected": None}), "'rejected' is None"),
    (json.dumps(ROW | {"chosen": "a\0"}), "holds a NUL"),
    (json.dumps(ROW | {"chosen": "\ud800"}), "holds half of a surrogate pair"), ("\0", "is no JSON"),
    (json.dumps(ROW | {"prompt": 3}), "'prompt' is 3"),
])
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, bad, said):
    with pytest.raises(DataError) as caught:
        read(lines(tmp_path / "rows.jsonl", ROW, bad, ROW))
    assert str(caught.value).startswith(f"rows.jsonl, line 2: {said}") and "change:" in str(caught.value)


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="rows.jsonl, line 2: is not UTF-8"):
        read(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_source_without_rows_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match="rows.jsonl has no rows(.|\n)*expected(.|\n)*change"):
        read(str(tmp_path / "rows.jsonl"))


def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match="/proc/self/mem cannot be read"):
        read("/proc/self/mem")


def test_a_folder_holds_out_its_eval_file_and_rows_bound_the_training(tmp_path):
    lines(tmp_path / "train.jsonl", *(ROW | {"prompt": f"why {i}?"} for i in range(9)))
    lines(tmp_path / "eval.jsonl", *(ROW | {"prompt": f"how {i}?"} for i in range(5)))
    records = read(str(tmp_path), rows=4)
    assert Counter(r.part for r in records) == {"eval": 5, "": 4}
    assert all(r.turns[0][1].startswith("how" if r.part else "why") for r in records)
    assert {r.source for r in records} == {tmp_path.name}


def test_which_columns_are_read_is_said_before_the_first_row(tmp_path):
    said = []
    name = lines(tmp_path / "rows.jsonl", {"question": "why?", "answer": "so."})
    record = next(read_source(name, "mine", Data(), 0, said.append))
    assert said == ["data  mine: columns prompt=question, response=answer (guessed: response)"]
    assert (record.chosen, record.rejected) == ("so.", "")
    with pytest.raises(DataError, match=r"line 1: no format fits its columns 'a', 'b'\n.*prompt, chosen, rejected"):
        read(lines(tmp_path / "other.jsonl", {"a": 1, "b": 2}))


def test_every_bad_row_is_counted_by_reason(tmp_path):
    bad = ["{", json.dumps(ROW | {"chosen": ""}), json.dumps(ROW | {"chosen": 3}), json.dumps({"prompt": "x"})]
    name = lines(tmp_path / "rows.jsonl", ROW, *bad, ROW)
    with pytest.raises(DataError) as caught:
        read(name)
    assert "line 2: is no JSON" in str(caught.value) and "2 rows: 'chosen' is no text" in str(caught.value)
    skipped: dict = {}
    assert len(list(read_source(name, "rows", Data(bad_rows="skip"), 0, skipped=skipped))) == 2
    assert {reason: count for reason, (count, _) in skipped.items()} == {
        "is no JSON": 1, "'chosen' is no text": 2, "has no column 'chosen'": 1}
    assert skipped["'chosen' is no text"][1].startswith("rows.jsonl, line 3")
    with pytest.raises(DataError, match="no rows to train on(.|\n)*skipped: rows.jsonl, line 1"):
        read(lines(tmp_path / "rows.jsonl", "{"), bad_rows="skip")


def test_a_source_that_changed_its_schema_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"line 1: has no column 'rejected'\n  got:    prompt, chosen, worst"):
        read(lines(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "worst": "c"}),
             columns="prompt,chosen,rejected")


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    module = tmp_path / "mine.py"
    module.write_text("from dschat_kit.data.sources import register_source\n"
                      "@register_source('five lines')\ndef rows(data, seed):\n"
                      "    yield 'row 0', '', {'prompt': 'why?', 'response': 'so.'}\n")
    sources.load_module(str(module))
    assert read("five lines")[0].chosen == "so."
    module.write_text("1 / 0")
    with pytest.raises(DataError, match="data.module(.|\n)*ZeroDivisionError(.|\n)*change"):
        sources.load_module(str(module))


def test_labels_tell_sources_apart():
    assert labels_of(["toy", "/data/hh/train.jsonl"]) == ["toy", "train.jsonl"]
    assert labels_of(["/a/hh/train.jsonl", "/a/shp/train.jsonl"]) == ["hh/train.jsonl", "shp/train.jsonl"]
    assert labels_of(["/data/toy"]) == ["data/toy"]  # not the toy world
    assert labels_of(["/train.jsonl", "train.jsonl"]) == ["/train.jsonl", "train.jsonl"]


def test_a_source_of_ones_own(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))

    @register_source("mine")
    def mine(data, seed):
        yield "mine, row 0", "eval", ROW | {"prompt": f"seed {seed}"}
        yield "mine, row 1", "", ROW
    assert [(r.turns[0][1], r.part, r.source) for r in read("mine")] == [("seed 0", "eval", "mine"),
                                                                         ("why?", "", "mine")]


def test_the_toy_world_is_a_source_with_a_known_reward():
    records = read("toy", rows=50)
    assert len(records) == 50 and records == read("toy", rows=60)[:50]
    assert 0 <= gold_of("toy").gold_reward(records[0].prompt, records[0].chosen) <= 1
    assert gold_of("rows.jsonl") is None


@pytest.mark.skipif("DSCHAT_DATA" not in os.environ, reason="DSCHAT_DATA names no folder with real rows")
def test_real_preferences():
    records = read(os.path.join(os.environ["DSCHAT_DATA"], "hh_helpful_256"))
    assert Counter(r.part for r in records) == {"": 2907, "eval": 367}
