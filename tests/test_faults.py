"""One PPO run on two ranks that meets every fault in turn and is the uninterrupted run in the end, bit for bit; and one
SFT run that is asked to end and goes on with another number of ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_checkpoints import flip
from test_ranks import SETTINGS, environment, metrics, processes, without_times
from tiny_models import VOCABULARY, folder, tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from dschat_kit.config import Pipeline
from dschat_kit.runs import StageRun, open_run

pytestmark = [pytest.mark.ranks, pytest.mark.slow,
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher is Linux only")]

FAULTS = {  # exit code, state, what status.json says, whether the step that was under way was saved
    "generation:kill": (247, "failed", "killed by signal 9", False),
    "scoring:kill": (247, "failed", "killed by signal 9", False),
    "backward:kill": (247, "failed", "killed by signal 9", False),
    "saving:kill": (247, "failed", "killed by signal 9", False),
    "backward:nan": (2, "failed", "not finite at step", False),
    "backward:hang": (1, "failed", "no progress for 30 s", False),
    "generation:term": (130, "interrupted", "asked to end, saved after step", True),
}
STEPS = len(FAULTS) + 3
SETS = [f"ppo.max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=3", "telemetry.hang_minutes=0.5"]


def reward_model(path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                                  num_labels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def prepared(root: Path, stage: str, sets) -> StageRun:
    """A stage folder that is ready to be launched, with the models of the stages before it."""
    for name in ("model", "sft/model"):
        folder(root / name)
    reward_model(root / "reward" / "model")
    run = open_run(root, stage)
    run.path.mkdir(parents=True, exist_ok=True)
    short = ["data.max_prompt_tokens=64", "data.max_response_tokens=48"]
    pipeline = Pipeline().with_overrides([*SETTINGS, *short, f"model.name={root / 'model'}", *sets])
    (run.path / "config.json").write_text(json.dumps({"stage": stage, "preset": "tiny", "config_hash": "x", "seed": 0,
                                                      "pipeline": pipeline.to_dict()}))
    return run


def launch(run: StageRun, *options: str, ranks: int = 2, fault: str = "", **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "dschat_kit.notebook.launch", "--", "deepspeed", "--num_gpus", str(ranks),
               "--module", "faulty", "--run", str(run.path), *options]
    tests = Path(__file__).parent
    env = {**environment(), "FAULT": fault, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def finished(job: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = job.communicate(timeout=600)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict:
    """{fault: what was seen after it}, with "whole" the uninterrupted run and "end" the one that went on to the end."""
    place = tmp_path_factory.mktemp("faults")
    whole, cut = prepared(place / "whole", "ppo", SETS), prepared(place / "cut", "ppo", SETS)
    done = finished(launch(whole))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {"whole": look(whole, done)}
    shutil.copytree(whole.root / "data", cut.root / "data")
    for fault in FAULTS:
        seen[fault] = look(cut, finished(launch(cut, *["--resume"] * (fault != "generation:kill"), fault=fault)))
    newest = sorted(cut.checkpoints.glob("step-*"))[-1]
    flip(next((newest / "critic").rglob("*optim_states.pt")))
    seen["end"] = look(cut, finished(launch(cut, "--resume")))
    return seen


def look(run: StageRun, done: subprocess.CompletedProcess) -> dict:
    return {"run": run, "done": done, "status": run.status, "left": processes(run.root),
            "lines": run.metrics_path.read_bytes().splitlines(),
            "logs": {path.name: path.read_text() for path in run.logs.iterdir()},
            "checkpoints": sorted(path.name for path in run.checkpoints.glob("*"))}


@pytest.mark.parametrize("number, fault", enumerate(FAULTS, 1), ids=lambda value: str(value))
def test_every_fault_is_named_and_leaves_no_process_and_a_valid_checkpoint(story, number, fault):
    seen, (code, state, words, saved) = story[fault], FAULTS[fault]
    done, status = seen["done"], seen["status"]
    assert (done.returncode, status["state"]) == (code, state), (done.stdout + done.stderr, status)
    assert words in status["error"] and words in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert seen["left"] == {}
    assert seen["checkpoints"][-1] == f"step-{number + saved:06d}"


def test_a_hanging_rank_leaves_the_stack_of_every_rank(story):
    logs = story["backward:hang"]["logs"]
    assert "in hang" in logs["rank1.log"].rpartition("most recent call first")[2]
    assert "all_reduce" in logs["rank0.log"] or "wait" in logs["rank0.log"]


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_taken(story):
    done, newest = story["end"]["done"], story["generation:term"]["checkpoints"][-1]
    assert done.returncode == 0 and f"{newest} is damaged" in done.stdout and "checksum" in done.stdout
    assert f"damaged-{newest}" in story["end"]["checkpoints"]


def test_after_all_of_them_it_is_the_uninterrupted_run(story):
    whole, cut = story["whole"]["run"], story["end"]["run"]
    assert without_times(metrics(cut.root, "ppo")) == without_times(metrics(whole.root, "ppo"))
    lines = [seen["lines"] for name, seen in story.items() if name != "whole"]
    assert [json.loads(line)["step"] for line in lines[-1]] == list(range(1, STEPS + 1))
    for number, (before, after) in enumerate(zip(lines, lines[1:], strict=False), 1):
        assert after[:number] == before[:number]  # byte for byte, times included
    assert cut.result["resumed_from"] == list(range(1, len(FAULTS) + 1))
    assert cut.samples_path.read_bytes() == whole.samples_path.read_bytes()
    ours, theirs = (run.model_dir / "model.safetensors" for run in (cut, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_asked_to_end_it_saves_and_goes_on_with_another_number_of_ranks(tmp_path):
    sets = ["sft.max_steps=40", "checkpoint.every_steps=0", "sft.lr=1e-3"]
    cut = prepared(tmp_path / "cut", "sft", sets)
    one = prepared(tmp_path / "one", "sft", [*sets, "checkpoint.every_minutes=0.002"])
    job = launch(cut)
    while not cut.metrics_path.exists() or len(metrics(cut.root, "sft")) < 5:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    done, line = finished(job), metrics(cut.root, "sft")[-1]["step"]
    assert done.returncode == 128 + signal.SIGTERM and processes(cut.root) == {}
    assert cut.status["state"] == "interrupted" and f"saved after step {line}" in cut.status["error"], cut.status
    assert [path.name for path in cut.checkpoints.glob("step-*")] == [f"step-{line:06d}"]

    shutil.copytree(cut.root / "data", one.root / "data")
    before = cut.metrics_path.read_bytes()
    for run, options in ((one, []), (cut, ["--resume"])):
        done = finished(launch(run, *options, ranks=1))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "is of 2 ranks, now 1" in done.stdout and cut.result["resumed_from"] == [line]
    assert cut.metrics_path.read_bytes().startswith(before)
    for left, right in zip(metrics(cut.root, "sft"), metrics(one.root, "sft"), strict=True):
        assert left["step"] == right["step"] and left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    assert not list(cut.checkpoints.glob("*/universal"))
    assert len(list(one.checkpoints.glob("step-*"))) == 2  # the clock asked for them
