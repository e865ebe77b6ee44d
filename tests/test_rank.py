"""How one rank ends: what is said, the exit code, and whose status it may write. No ranks are launched here."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dschat_kit.config import ConfigError, Pipeline
from dschat_kit.runs import RunError, open_run, write_json
from dschat_kit.train import rank
from dschat_kit.train.rank import _claim, _explain, _failed
from dschat_kit.train.watch import Interrupted


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A stage folder whose job is running."""
    monkeypatch.delenv("DSCHAT_LAUNCH_TAG", raising=False)
    found = open_run(tmp_path, "sft")
    found.logs.mkdir(parents=True)
    write_json(found.path / "config.json", {"stage": "sft", "preset": "", "config_hash": "x", "seed": 0,
                                            "pipeline": Pipeline().to_dict()})
    found.metrics_path.write_text('{"step": 4}\n{"step": 5}\n{"ste')
    found.update_status(state="running", step=3)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("error", "code", "words"), [
    (ConfigError("a: got 1"), 2, "a: got 1"),
    (RunError("loss is not finite"), 2, "not finite"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left"),
    (MemoryError(), 2, "sft.micro_batch_size"),
    (RuntimeError("[1] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "sft.micro_batch_size"),
    (RuntimeError("[../gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), 1, "another rank has ended"),
    (Interrupted("SIGTERM"), 130, "SIGTERM"),
    (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
])
def test_every_end_has_a_sentence_and_a_code(run, error, code, words):
    assert _explain(error, run)[1] == code and words in _explain(error, run)[0]


@pytest.mark.parametrize(("error", "state"), [(RunError("x"), "failed"), (KeyError("x"), "failed"),
                                              (Interrupted("SIGTERM"), "interrupted")])
def test_the_status_says_how_it_ended(run, error, state, capsys):
    _failed(run, 0, error, sys.stderr)
    assert run.status["state"] == state and run.status["step"] == 5 and run.status["error"]
    assert "error: " in capsys.readouterr().err


def test_under_dschat_launch_the_launcher_settles_an_end_that_only_followed(run, monkeypatch, capsys):
    monkeypatch.setenv("DSCHAT_LAUNCH_TAG", "x")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for error in (Interrupted("SIGTERM"), RuntimeError("Connection closed by peer")):
        _failed(run, 0, error, sys.stderr)
        assert run.status["state"] == "running" and "error: " not in capsys.readouterr().err
    _failed(run, 0, RunError("the own fault"), sys.stderr)
    assert run.status["state"] == "failed"


def test_a_rank_that_never_met_the_others_writes_nobodys_status(run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    _failed(run, 1, RuntimeError("cannot connect"), sys.stderr)
    assert run.status["state"] == "running"


@pytest.mark.parametrize(("state", "resume", "refused"), [
    ("missing", False, False), ("running", True, False), ("failed", True, False), ("interrupted", True, False),
    ("failed", False, True), ("running", False, True), ("finished", True, True), ("finished", False, True)])
def test_a_launch_never_writes_over_an_earlier_one(run, state, resume, refused):
    if state == "missing":
        (run.path / "status.json").unlink()
    else:
        run.update_status(state=state)
    if refused:
        with pytest.raises(RunError, match="change:"):
            _claim(run, resume)
        assert run.status["state"] == state
    else:
        _claim(run, resume)
        assert run.status["state"] == "running" and run.status["pid"] == os.getpid()


def test_what_failed_before_its_first_step_may_be_launched_again(run):
    run.update_status(state="failed")
    run.metrics_path.unlink()
    _claim(run, False)
    assert run.status["state"] == "running"


def start(run, *options, program=("-m", "dschat_kit.train.sft")):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *program, "--run", str(run.path), *options], text=True,
                          capture_output=True, env=environment, timeout=120, cwd=Path(__file__).parents[1])


def test_a_rank_that_hangs_before_its_first_step_is_ended_with_its_stack(run):
    config = run.config
    config["pipeline"]["telemetry"]["hang_minutes"] = 0.02
    write_json(run.path / "config.json", config)
    loading = "import time\nfrom dschat_kit.train import rank\ndef load(session): time.sleep(60)\nrank.main(load)"
    done = start(run, "--resume", program=("-c", loading))
    assert done.returncode == 1 and "no progress for 1.2 s" in done.stderr and run.status["state"] == "failed"
    assert "in load" in (run.logs / "rank0.log").read_text()


@pytest.mark.parametrize(("name", "threads"), [("LOCAL_SIZE", 4), ("LOCAL_WORLD_SIZE", 4), ("", 1)])
def test_the_ranks_of_one_machine_share_its_cores_not_those_of_all(monkeypatch, name, threads):
    for variable in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"RANK": "0", "WORLD_SIZE": "8", **({name: "2"} if name else {})}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(rank, "detect", lambda: SimpleNamespace(accelerator="cpu", cores=8))
    monkeypatch.setattr(rank, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(rank.deepspeed, "init_distributed", lambda **how: None)
    found = []
    monkeypatch.setattr(rank.torch, "set_num_threads", found.append)
    rank.start_distributed(0)
    assert found == [threads]


def test_a_folder_in_use_is_left_alone(run):
    with run.lock():
        done = start(run, "--resume")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "in use" in done.stderr
    assert run.status["state"] == "running" and "Traceback" not in done.stderr
    (run.path / "config.json").write_text("{")
    done = start(run, "--resume")
    assert done.returncode == 2 and "config.json" in done.stderr and "Traceback" not in done.stderr
