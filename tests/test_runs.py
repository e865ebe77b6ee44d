"""The run folder: atomic files, honest states, locks, and what a second start of a stage does."""

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dschat_kit.config import ConfigError, Data, Pipeline
from dschat_kit.runs import (
    RunError,
    StageRun,
    open_run,
    prepare_stage,
    read_json,
    source_files,
    stage_hash,
    take_lock,
    write_json,
)

PIPELINE = Pipeline()
ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"


def make(root: Path, stage: str, state: str = "finished", pipeline: Pipeline = PIPELINE) -> StageRun:
    """A stage as a launched program leaves it."""
    run = open_run(root, stage)
    run.path.mkdir(parents=True)
    write_json(run.path / "config.json", {"stage": stage, "preset": "tiny", "config_hash": stage_hash(pipeline, stage),
                                          "seed": 0, "pipeline": pipeline.to_dict()})
    run.update_status(state=state, step=5, total=10)
    if stage != "data":
        run.metrics_path.write_text('{"step": 5}\n')
    return run


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"text": "ü\u2028"})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert read_json(path) == {"text": "ü\u2028"}


@pytest.mark.parametrize("content, said", [(None, "does not exist"), (b'{"a": ', "not readable JSON"),
                                           (b"\xff\xfe", "not readable JSON")])
def test_a_missing_or_damaged_file_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=f"{tmp_path}/config.json .*{said}"):
        read_json(tmp_path / "config.json")


def test_a_folder_that_is_no_stage_is_refused(tmp_path):
    with pytest.raises(RunError, match="no stage folder"):
        StageRun(tmp_path / "training")


@pytest.mark.parametrize("write", [lambda: write_json("/proc/result.json", {}), lambda: open_run("/proc", "sft").lock(),
                                   lambda: prepare_stage("/proc/runs", "data", PIPELINE)])
def test_a_place_that_cannot_be_written_is_an_error_in_words(write):
    with pytest.raises(RunError, match="cannot write .*/proc(.|\n)*--run-root"):
        with write() or open(os.devnull):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_an_error_in_words(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        prepare_stage(tmp_path / "run", "data", PIPELINE)


def test_a_new_stage_gets_its_whole_configuration(tmp_path):
    run, action = prepare_stage(tmp_path, "data", PIPELINE, preset="tiny")
    assert action == "train" and run.state == "missing"
    assert run.pipeline == PIPELINE and run.config["preset"] == "tiny"


@pytest.mark.parametrize("state, resume, action", [("finished", "never", "reuse"), ("interrupted", "auto", "resume"),
                                                   ("failed", "auto", "resume"), ("running", "auto", "resume")])
def test_the_same_configuration_goes_on(tmp_path, state, resume, action):
    make(tmp_path, "data"), make(tmp_path, "sft", state)
    assert prepare_stage(tmp_path, "sft", PIPELINE, resume=resume)[1] == action


@pytest.mark.parametrize("state", ["interrupted", "failed", "running"])
def test_what_was_cut_short_asks_for_resume(tmp_path, state):
    make(tmp_path, "data"), make(tmp_path, "sft", state)
    with pytest.raises(RunError, match=r"at step 5\n.*--resume auto.*--fresh"):
        prepare_stage(tmp_path, "sft", PIPELINE)


def test_what_failed_before_its_first_step_begins_again(tmp_path):
    make(tmp_path, "data", "failed")
    mended = PIPELINE.with_overrides(["data.rows=10"])
    assert prepare_stage(tmp_path, "data", mended)[1] == "train"
    assert open_run(tmp_path, "data").pipeline == mended


def test_a_changed_configuration_is_refused_and_named(tmp_path):
    run = make(tmp_path, "data")
    changed = PIPELINE.with_overrides(["data.rows=10", "seed=3"])
    with pytest.raises(RunError, match=r"data.rows: 0 -> 10; seed: 0 -> 3\n.*--fresh"):
        prepare_stage(tmp_path, "data", changed)
    assert run.pipeline == PIPELINE
    with pytest.raises(RunError, match="another configuration"):
        prepare_stage(tmp_path, "data", changed, resume="auto")


def test_fresh_moves_the_old_folder_aside(tmp_path):
    for _ in range(2):  # twice within a second
        run = make(tmp_path, "data")
        (run.path / "keep.txt").write_text("old")
        run, action = prepare_stage(tmp_path, "data", PIPELINE.with_overrides(["data.rows=10"]), fresh=True)
        assert action == "train" and run.state == "missing" and run.pipeline.data.rows == 10
        (run.path / "config.json").unlink(), (run.path / ".lock").unlink(missing_ok=True), run.path.rmdir()
    assert [(p / "keep.txt").read_text() for p in tmp_path.glob("data.old-*")] == ["old", "old"]


def test_changed_rows_are_a_changed_stage(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW)
    pipeline = Pipeline(data=Data(sources=str(file)))
    make(tmp_path, "data", pipeline=pipeline)
    assert prepare_stage(tmp_path, "data", pipeline)[1] == "reuse"
    file.write_text(ROW * 2)
    with pytest.raises(RunError, match="changed: the content of data.sources"):
        prepare_stage(tmp_path, "data", pipeline)


@pytest.mark.parametrize("stage, done, missing", [("reward", ["data"], "sft"), ("ppo", ["data", "sft"], "reward"),
                                                  ("reward", [], "sft")])
def test_a_missing_earlier_stage_is_named(tmp_path, stage, done, missing):
    for name in done:
        make(tmp_path, name)
    said = f"{stage} needs a finished {missing} stage.*missing\n.*dschat {missing} --run-root"
    with pytest.raises(RunError, match=said):
        prepare_stage(tmp_path, stage, PIPELINE)
    assert not (tmp_path / stage).exists()


@pytest.mark.parametrize("state", [None, "failed", "interrupted"])
def test_data_that_is_not_there_is_built_on_the_way(tmp_path, state):
    if state:
        make(tmp_path, "data", state)
    assert prepare_stage(tmp_path, "sft", PIPELINE)[1] == "train"


def test_an_earlier_stage_of_another_configuration_is_refused(tmp_path):
    make(tmp_path, "data", pipeline=PIPELINE.with_overrides(["data.rows=10"]))
    with pytest.raises(RunError, match=r"the data stage(.|\n)*data.rows: 10 -> 0(.|\n)*dschat data .*--fresh"):
        prepare_stage(tmp_path, "sft", PIPELINE)


def _hold(path: Path, name: str, ready, done) -> None:
    with take_lock(path / "data" / name):
        ready.set()
        done.wait(30)


@pytest.mark.parametrize("name", [".lock", ".launch.lock"])
def test_a_folder_in_use_is_left_alone(tmp_path, name):
    run = make(tmp_path, "data", "running")
    assert run.state == "interrupted"  # nobody holds it
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, name, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        assert run.state == "running" and run.in_use()
        for fresh in (False, True):
            with pytest.raises(RunError, match="in use by another process"):
                prepare_stage(tmp_path, "data", PIPELINE, fresh=fresh, resume="auto")
        with pytest.raises(RunError, match="in use by another process"):
            with take_lock(run.path / name):
                pass
    finally:
        done.set()
        other.join()
    assert not run.in_use() and prepare_stage(tmp_path, "data", PIPELINE, resume="auto")[1] == "resume"


def test_who_only_looks_never_turns_a_lock_away(tmp_path):
    run = make(tmp_path, "data")
    with run.lock():
        pass
    with open(run.path / ".lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not run.in_use()  # two may look at once


def test_status_is_merged_and_keeps_its_start(tmp_path):
    run = make(tmp_path, "data", "running")
    started = run.status["started"]
    run.update_status(step=7)
    assert run.status["step"] == 7 and run.status["total"] == 10 and run.status["started"] == started
    assert run.status["updated"] >= started


def test_files_of_a_source(tmp_path):
    assert source_files("org/name") == source_files("toy") == []
    (tmp_path / "train.jsonl").touch()
    assert [f.name for f in source_files(str(tmp_path))] == ["train.jsonl"]
    (tmp_path / "eval.jsonl").touch()
    assert [f.name for f in source_files(str(tmp_path))] == ["eval.jsonl", "train.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    for path in (str(tmp_path), str(tmp_path / "none.txt"), "none.jsonl"):
        with pytest.raises(ConfigError, match="does not exist"):
            source_files(path)


def test_a_source_that_cannot_be_read_is_named():
    with pytest.raises(RunError, match="/proc/self/mem cannot be read"):
        stage_hash(Pipeline(data=Data(sources="/proc/self/mem")), "data")
