"""The data stage: what ends up on disk, what is said about it, and how bad input ends it."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from dschat_kit.config import Data, Model, Pipeline
from dschat_kit.data import pipeline as stage
from dschat_kit.data.datasets import TokenRows
from dschat_kit.data.pipeline import build_stage_data, tokenizer_of
from dschat_kit.data.splits import PARTS
from dschat_kit.runs import RunError, open_run, prepare_stage, stage_hash


def rows(path, count: int, words: str = "why") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for i in range(count):
            file.write(json.dumps({"prompt": f"{words} {i}?", "chosen": f"because {i}.", "rejected": "no."}) + "\n")
    return str(path)


def build(root, sources: str, **data):
    pipeline = Pipeline(data=Data(sources=sources, **data), model=Model(vocab_size=300))
    run, _ = prepare_stage(root, "data", pipeline, fresh=True)
    said = []
    return run, build_stage_data(run, report=said.append), said


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two sources that share prompts; the second one holds out every tenth of its own."""
    folder = tmp_path_factory.mktemp("data")
    first = rows(folder / "first.jsonl", 300)
    rows(folder / "second" / "train.jsonl", 200, words="how")
    rows(folder / "second" / "eval.jsonl", 30, words="why")
    return build(folder / "run", f"{first},{folder}/second", stage_split="1,1,2", max_prompt_tokens=4,
                 max_response_tokens=8)


def test_no_prompt_stands_in_two_parts(built):
    run, result, _ = built
    prompts = {part: set(TokenRows(run.path, part).table["prompt"]) for part in PARTS}
    assert sum(len(p) for p in prompts.values()) == len(set().union(*prompts.values()))
    assert set(result["overlaps"].values()) == {0} and len(result["overlaps"]) == 6


def test_what_one_source_holds_out_the_other_does_not_train_on(built):
    run, result, _ = built
    assert result["dropped_because_held_out"]["first.jsonl"] > 0
    held = {f"\n\nHuman: why {i}?\n\nAssistant:" for i in range(30)}
    assert not any(held & set(TokenRows(run.path, part).table["prompt"]) for part in ("sft", "reward", "ppo"))


def test_rows_are_counted_by_source_and_part(built):
    run, result, said = built
    for part in PARTS:
        found = Counter(TokenRows(run.path, part).table["source"])
        assert {source: counts[part] for source, counts in result["rows"].items()} == found
        assert result["realised_weights"][part] == {s: n / sum(found.values()) for s, n in found.items()}
        assert any(part in line and str(sum(found.values())) in line for line in said)
    assert result["read"] == {"first.jsonl": 300, "second": 230}


def test_a_prompt_keeps_its_end_and_a_response_its_start(built):
    run, result, said = built
    tokenizer, table = tokenizer_of(run), TokenRows(run.path, "sft")
    cut = Counter()
    for row in table.take(range(len(table))):
        for side, limit in (("prompt", 4), ("chosen", 8), ("rejected", 8)):
            whole = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            whole += [tokenizer.eos_token_id] if side != "prompt" else []
            ids, cut[side] = row[f"{side}_ids"], cut[side] + (len(whole) > limit)
            assert ids == (whole[-limit:] if side == "prompt" else whole[:limit])
    assert result["truncated"]["sft"] == dict(cut) and cut["prompt"] == len(table)
    assert "cut" in said[-1] and "{" not in said[-1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_what_a_result_always_holds(built):
    run, result, _ = built
    assert run.result == json.loads(json.dumps(result)) and run.state == "finished"
    assert {"config_hash", "seed", "world_size", "resumed_from", "versions"} <= result.keys()


def test_the_same_configuration_makes_the_same_rows(tmp_path, built):
    run, result, _ = built
    other, again, _ = build(tmp_path / "run", run.pipeline.data.sources, stage_split="1,1,2", max_prompt_tokens=4,
                            max_response_tokens=8)
    for part in PARTS:
        assert TokenRows(run.path, part).table.to_dict() == TokenRows(other.path, part).table.to_dict()
    assert again["config_hash"] == result["config_hash"]


def test_a_finished_stage_is_not_built_again(built, monkeypatch):
    monkeypatch.setattr(stage, "_build", lambda *_: pytest.fail("built again"))
    assert build_stage_data(built[0]) == built[1]


def test_weights_bind_the_training_rows(tmp_path):
    first, second = rows(tmp_path / "my rows.jsonl", 400), rows(tmp_path / "b.jsonl", 400, words="how")
    _, result, _ = build(tmp_path / "run", f"{first}:3,{second}:1", stage_split="1,1,1")
    for part in ("sft", "reward", "ppo"):
        assert result["realised_weights"][part]["my rows.jsonl"] == pytest.approx(0.75, abs=0.01)
    used = sum(sum(by.values()) for by in result["rows"].values())
    assert result["left_out"].keys() == {"beyond the weights of the blend", "held out, not evaluated on"}
    assert used + sum(result["left_out"].values()) == 800


def test_files_of_the_same_name_are_told_apart(tmp_path):
    names = [rows(tmp_path / name / "train.jsonl", 100, words=name) for name in ("hh", "shp")]
    assert build(tmp_path / "run", ",".join(names))[1]["read"] == {"hh/train.jsonl": 100, "shp/train.jsonl": 100}


def test_an_equal_configuration_of_another_run_takes_the_rows_from_the_cache(tmp_path, monkeypatch):
    source = rows(tmp_path / "mine.jsonl", 200)
    first, result, _ = build(tmp_path / "one", source)
    monkeypatch.setattr(stage, "write_rows", lambda *_: pytest.fail("built again"))
    again, same, said = build(tmp_path / "two", source)
    assert "taken from" in said[-1] and {k: v for k, v in same.items() if k != "seconds"} == {
        k: v for k, v in result.items() if k != "seconds"}
    for change in (lambda: rows(tmp_path / "mine.jsonl", 201),
                   lambda: monkeypatch.setattr(stage.metadata, "version", lambda _: "another")):
        change()
        with pytest.raises(pytest.fail.Exception):
            build(tmp_path / "three", source)


def test_damaged_rows_of_a_finished_stage_are_built_anew(tmp_path):
    run, result, _ = build(tmp_path / "run", rows(tmp_path / "mine.jsonl", 200))
    (run.path / "rows" / "table.arrow").write_bytes(b"damaged")  # the cache's file too: it is the same one
    assert build_stage_data(run, report=lambda _: None)["rows"] == result["rows"]
    assert len(TokenRows(run.path, "sft").take([0])) == 1


MODULE = """
from dschat_kit.data.sources import register_source
@register_source("mine")
def mine(data, seed):
    for i in range(60):
        yield f"row {i}", "", {"question": f"who {i}?", "answer": f"so {i}."}
"""


def test_a_source_of_ones_own_works_in_a_process_of_its_own(tmp_path):
    """As a launched rank builds it: nothing but the run folder is handed over."""
    (tmp_path / "mine.py").write_text(MODULE)
    good = rows(tmp_path / "good.jsonl", 200)
    data = Data(sources=f"mine,{good}", module=str(tmp_path / "mine.py"))
    pipeline = Pipeline(data=data, model=Model(vocab_size=300))
    run, _ = prepare_stage(tmp_path / "run", "data", pipeline)
    done = subprocess.run([sys.executable, "-m", "dschat_kit.data.pipeline", "--run", str(run.path)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = run.result["rows"]["mine"]
    assert counts["reward"] == 0 and counts["sft"] + counts["ppo"] > 40 and run.result["read"]["mine"] == 60
    assert not list(tmp_path.glob(".data-cache/*/rows"))  # only the user's code knows whether it is still the same
    (tmp_path / "mine.py").write_text(MODULE.replace("60", "70"))
    assert stage_hash(pipeline, "data") != run.config["config_hash"]


def test_rows_of_the_users_code_that_a_killed_build_left_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(stage.sources.SOURCES, "mine", lambda data, seed: (
        (f"row {i}", "", {"prompt": f"why {i}?", "chosen": "so", "rejected": "no"}) for i in range(next(numbers))))
    numbers = iter((100, 200))
    pipeline = Pipeline(data=Data(sources="mine"), model=Model(vocab_size=300))
    run, _ = prepare_stage(tmp_path / "run", "data", pipeline)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(stage, "place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build_stage_data(run, report=lambda _: None)
    assert build_stage_data(run, report=lambda _: None)["read"] == {"mine": 200}
    assert not (run.path / ".build").exists()


def test_skipped_rows_filters_and_defused_markers_stand_in_the_result(tmp_path):
    path = rows(tmp_path / "mine.jsonl", 200)
    with open(path, "a") as file:
        file.write('no json\n{"prompt": "x", "chosen": "<|end|> y", "rejected": " "}\n')
        file.write(json.dumps({"prompt": "<|end|>?", "chosen": "because 0.", "rejected": "no."}) + "\n")
        file.write(json.dumps({"prompt": "why 0?", "chosen": "because 0.", "rejected": "no."}) + "\n")
    run, result, said = build(tmp_path / "run", path, bad_rows="skip", drop_duplicates=True)
    assert result["skipped"] == {"mine.jsonl": {"is no JSON": 1, "'rejected' is no text": 1}}
    assert result["left_out"] == {"duplicate": 1} and result["markers_defused"] == 1
    assert result["read"] == {"mine.jsonl": 202}
    assert sum("skipped" in line for line in said) == 2 and any("(guessed: preference)" in line for line in said)
    eos = tokenizer_of(run).eos_token_id
    for part in PARTS:
        table = TokenRows(run.path, part)
        for row in table.take(range(len(table))):
            assert eos not in row["prompt_ids"] + row["chosen_ids"][:-1] and row["chosen_ids"][-1] == eos


def test_responses_and_plain_text_beside_preferences(tmp_path):
    pairs, answers = rows(tmp_path / "pairs.jsonl", 200), tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"how {i}?", "response": f"so {i}."}) + "\n" for i in range(200)))
    (tmp_path / "book.txt").write_text("\n\n".join(f"part {i} of a story" for i in range(100)))
    run, result, _ = build(tmp_path / "run", f"{pairs},{answers},{tmp_path}/book.txt")
    assert result["rows"]["answers.jsonl"]["reward"] == result["rows"]["answers.jsonl"]["eval"] == 0
    assert result["rows"]["book.txt"]["ptx"] > 80 and set(result["overlaps"].values()) == {0}
    assert sum(result["left_out"].values()) + sum(map(sum, (by.values() for by in result["rows"].values()))) == 500
    text = TokenRows(run.path, "ptx").take([0])[0]
    assert text["prompt_ids"] == [] == text["rejected_ids"] and text["chosen"].startswith("part")


def test_bad_rows_end_the_stage_with_exit_code_2(tmp_path, capsys):
    path, said = rows(tmp_path / "bad.jsonl", 1), "bad.jsonl, line 2: 'chosen' is ' '"
    with open(path, "a") as file:
        file.write('{"prompt": "a", "chosen": " ", "rejected": "c"}\n')
    run, _ = prepare_stage(tmp_path / "run", "data", Pipeline(data=Data(sources=path)))
    assert stage.main(["--run", str(run.path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}") and "Traceback" not in shown and "change:" in shown
    assert run.state == "failed" and run.status["error"].startswith(said)
    rows(tmp_path / "bad.jsonl", 200)  # mended: no --fresh, no --resume
    assert prepare_stage(tmp_path / "run", "data", run.pipeline)[1] == "train"
    assert stage.main(["--run", str(run.path)]) == 0 and run.state == "finished" and run.status["error"] is None


def test_a_source_with_nothing_left_is_named(tmp_path):
    small, large = rows(tmp_path / "small.jsonl", 3), rows(tmp_path / "large.jsonl", 200, words="how")
    with pytest.raises(RunError, match=r"no rows of small.jsonl are left for \w+\n.*expected(.|\n)*change"):
        build(tmp_path / "run", f"{small}:1,{large}:1")
    with pytest.raises(RunError, match=r"no rows of small.jsonl are left for"):
        build(tmp_path / "run", small)
    assert open_run(tmp_path / "run", "data").state == "failed"


def test_the_command_line_refuses_what_is_no_data_folder(tmp_path, capsys):
    assert stage.main(["--run", str(tmp_path / "nothing")]) == 2
    assert stage.main(["--run", str(tmp_path / "data")]) == 2
    assert "no stage folder" in (shown := capsys.readouterr().err) and "config.json does not exist" in shown


@pytest.mark.parametrize("error, shown, state", [
    (KeyboardInterrupt("Ctrl-C"), "Ctrl-C", "interrupted"), (ZeroDivisionError("a bug"), "a bug", "failed"),
    (OSError(28, "No space left on device"), "cannot write in .*: No space left on device", "failed")])
def test_however_it_ends_the_status_says_so(tmp_path, monkeypatch, error, shown, state):
    run, _ = prepare_stage(tmp_path / "run", "data", Pipeline())

    def build(*_):
        raise error
    monkeypatch.setattr(stage, "_build", build)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error), match=shown):
        build_stage_data(run)
    assert run.state == state and run.status["error"]


@pytest.mark.skipif("DSCHAT_DATA" not in os.environ, reason="DSCHAT_DATA names no folder with real rows")
def test_real_preferences(tmp_path):
    _, result, _ = build(tmp_path / "run", os.path.join(os.environ["DSCHAT_DATA"], "hh_helpful_256"), rows=400)
    counts = result["rows"]["hh_helpful_256"]
    assert counts["eval"] == 367 and counts["sft"] + counts["reward"] + counts["ppo"] == 400
    assert set(result["overlaps"].values()) == {0}
