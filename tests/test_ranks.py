"""Real `deepspeed` jobs on two ranks, at smoke scale. One chain is launched once and looked at by many tests; the rest
(ZeRO stages, adapters, resume of every stage) is marked slow."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from references import response_loss
from tiny_models import causal_lm, folder, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import dschat_kit
from dschat_kit.config import Pipeline
from dschat_kit.data.datasets import TokenRows, chunks, preference_batch, sft_batch
from dschat_kit.data.tokenizer import open_tokenizer, pad_id_of
from dschat_kit.metrics import read_metrics
from dschat_kit.runs import open_run

pytestmark = [pytest.mark.ranks,
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher is Linux only")]

SETTINGS = """data.rows=900 data.eval_rows=96 data.stage_split=1,1,1 model.hidden_size=32 model.layers=1 model.heads=2
    model.intermediate_size=64 model.vocab_size=300 model.dtype=fp32 sampling.max_new_tokens=16 zero.stage=2
    sft.max_steps=60 sft.epochs=9 sft.batch_size=16 sft.micro_batch_size=8 sft.eval_every=20 sft.eval_rows=96
    reward.max_steps=24 reward.epochs=9 reward.batch_size=16 reward.micro_batch_size=8 reward.eval_every=12
    reward.scale=true ppo.max_steps=4 ppo.rollout_batch_size=16 ppo.mini_batch_size=8 ppo.micro_batch_size=2
    ppo.eval_prompts=15 rollout.micro_batch_size=6 checkpoint.every_steps=10 telemetry.samples=5""".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "DSCHAT_GRACE": "3"}


def command(stage: str, root: Path, *options: str, sets=(), ranks: int = 2) -> list[str]:
    return [sys.executable, "-m", "dschat_kit.cli", stage, "--preset", "tiny", "--run-root", str(root), "--num-gpus",
            str(ranks), *options, "--set", *SETTINGS, *sets]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DSCHAT_")}
    return {**kept, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])}


def dschat(*args, **how) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **how), env=environment(), capture_output=True, text=True, timeout=600)


def succeed(*args, **how) -> None:
    done = dschat(*args, **how)
    assert done.returncode == 0, done.stdout + done.stderr


def processes(root: Path) -> dict[int, str]:
    """Command lines of the living processes that name the run folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"{root}/" in words:
                found[int(entry.name)] = words
    return found


def kill_when(stage: str, root: Path, lines: int, whom: str, signum: int, sets=()) -> subprocess.CompletedProcess:
    """Launch, and after `lines` metrics send `signum` to what has `whom` in its words."""
    with subprocess.Popen(command(stage, root, sets=sets), env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as job:
        path, end = root / stage / "metrics.jsonl", time.monotonic() + 200
        while len(read_metrics(path)) < lines:
            assert job.poll() is None and time.monotonic() < end, job.communicate()
            time.sleep(0.01)
        for pid, words in processes(root).items():
            if whom in words:
                os.kill(pid, signum)
        out, err = job.communicate(timeout=120)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def metrics(root: Path, stage: str) -> list[dict]:
    return read_metrics(root / stage / "metrics.jsonl")


def without_times(rows: list[dict]) -> list[dict]:
    machine = ("second", "memory_mb", "matmul_share")
    return [{name: value for name, value in row.items() if not any(word in name for word in machine)} for row in rows]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """SFT, reward model and PPO after one another on two ranks, in a path with a space."""
    root = tmp_path_factory.mktemp("a run") / "tiny run"
    for stage in ("sft", "reward", "ppo"):
        succeed(stage, root)
    return root


def alone(chain: Path, root: Path, stage: str, sets=()) -> list[dict]:
    """The stage as a plain `python -m` of one rank, upon the chain's earlier stages; its metrics."""
    earlier = {"sft": ["data"], "reward": ["data", "sft"], "ppo": ["data", "sft", "reward"]}[stage]
    for name in earlier:
        shutil.copytree(chain / name, root / name)
    (root / stage).mkdir()
    config = json.loads((chain / stage / "config.json").read_text())
    config["pipeline"] = Pipeline.from_dict(config["pipeline"]).with_overrides(sets).to_dict()
    (root / stage / "config.json").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-m", f"dschat_kit.train.{stage}", "--run", str(root / stage)], text=True,
                          env=environment(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(root, stage)


def close(one: list[dict], other: list[dict], name: str, steps: int) -> None:
    for left, right in list(zip(one, other, strict=True))[:steps]:
        assert math.isclose(left[name], right[name], rel_tol=1e-5, abs_tol=1e-7), (name, left, right)


# -- what a run folder holds

PPO_METRICS = """step score_mean score_std score_min score_max kl kl_k3 kl_coef policy_loss value_loss approx_kl
    clip_fraction value_clip_fraction ratio_max entropy explained_variance response_length eos_rate grad_norm_actor
    kl_k2 advantage_std grad_norm_critic lr_actor lr_critic seconds_generation seconds_scoring
    seconds_training seconds_other tokens_per_second peak_memory_mb""".split()
RESULTS = {
    "data": "rows realised_weights overlaps truncated",
    "sft": "eval_loss_before eval_loss_after eval_perplexity steps tokens_per_second seconds",
    "reward": "accuracy accuracy_interval length_baseline_accuracy margin steps seconds bayes_accuracy "
              "gold_length_correlation",
    "ppo": """score_before score_after kl response_length_before response_length_after eos_rate_after steps
    tokens_per_second
        seconds gold_before gold_std_before gold_after lm_loss_before lm_loss_after""",
}


def test_result_and_metrics_hold_what_others_build_on(chain):
    common = {"config_hash", "seed", "world_size", "resumed_from", "versions"}
    for stage, names in RESULTS.items():
        run = open_run(chain, stage)
        assert set(names.split()) | common <= set(run.result), stage
        assert run.result["resumed_from"] == [] and run.status["state"] == "finished"
        assert run.status["step"] == run.status["total"]
        if stage != "data":
            assert run.result["world_size"] == 2
            assert [row["step"] for row in metrics(chain, stage)] == list(range(1, run.result["steps"] + 1))
            assert (run.logs / "rank1.log").exists() and list(run.path.rglob("*.tmp")) == []
    for row in metrics(chain, "ppo"):
        assert not set(PPO_METRICS) - set(row) and all(isinstance(row[name], (int, float)) for name in PPO_METRICS)
    assert set(open_run(chain, "ppo").result["seconds"]) == {"generation", "scoring", "training", "other"}
    assert processes(chain) == {}


def test_the_models_learn(chain):
    sft, reward = open_run(chain, "sft").result, open_run(chain, "reward").result
    assert sft["eval_loss_after"] < sft["eval_loss_before"] - 1.5
    low, high = reward["accuracy_interval"]
    assert reward["accuracy"] > 0.55 and low < reward["accuracy"] < high
    assert all(row["grad_norm"] > 0 for stage in ("sft", "reward") for row in metrics(chain, stage))


def test_first_update_of_ppo_starts_where_the_rollout_was(chain):
    first, second = metrics(chain, "ppo")[:2]
    assert first["first_ratio_max"] == pytest.approx(1, abs=1e-4) and abs(first["first_approx_kl"]) < 1e-5
    assert first["kl"] == pytest.approx(0, abs=1e-4) and first["kl_k3"] == pytest.approx(0, abs=1e-5)
    assert second["first_ratio_max"] == pytest.approx(1, abs=1e-4) and abs(second["kl"]) > 1e-4
    assert json.loads((chain / "ppo" / "result.json").read_text())["rollout"]["path"] == "slots"


def test_samples_are_there_before_during_and_after(chain):
    lines = read_metrics(chain / "ppo" / "samples.jsonl")
    by_phase = {phase: [line for line in lines if line["phase"] == phase] for phase in ("before", "rollout", "after")}
    assert len(by_phase["before"]) == len(by_phase["after"]) == 5 and len(by_phase["rollout"]) == 16
    assert [line["sample_id"] for line in by_phase["before"]] == [line["sample_id"] for line in by_phase["after"]]
    assert {"prompt", "response", "score", "kl", "gold", "step"} <= set(lines[0])
    held_out = set(TokenRows(chain / "data", "eval").table["sample_id"])
    assert all(line["sample_id"] in held_out for line in by_phase["after"])
    assert not any(line["sample_id"] in held_out for line in by_phase["rollout"])
    before, after = (max(abs(line["kl"]) for line in by_phase[phase]) for phase in ("before", "after"))
    assert before < 1e-4 < after


# -- what is exported

@torch.no_grad()
def exported_loss(root: Path, stage: str) -> float:
    """Loss on the held-out rows by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(root / stage / "model", dtype=torch.float32).eval()
    rows, total, tokens = TokenRows(root / "data", "eval"), 0.0, 0
    for indices in chunks(np.arange(min(96, len(rows))), 16):
        batch = sft_batch(rows.take(indices), pad_id_of(open_tokenizer(root / stage / "model")))
        logits = model(input_ids=batch.sequences, attention_mask=batch.attention_mask).logits
        answered = int(batch.response_mask.sum())
        total += answered * float(response_loss(logits, batch.sequences, batch.response_mask))
        tokens += answered
    return total / tokens


@torch.no_grad()
def exported_margins(root: Path) -> tuple[float, float]:
    """(accuracy, margin) on the held-out pairs by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(root / "reward" / "model", dtype=torch.float32).eval()
    rows, margins = TokenRows(root / "data", "eval"), []
    for indices in chunks(np.arange(len(rows)), 16):
        batch = preference_batch(rows.take(indices), model.config.pad_token_id)
        logits = model(input_ids=batch.sequences, attention_mask=batch.attention_mask.long()).logits.squeeze(-1)
        chosen, rejected = ((logits - model.config.score_shift) * model.config.score_scale).chunk(2)
        margins += (chosen - rejected).tolist()
    margins = np.array(margins)
    return float(((margins > 0) + 0.5 * (margins == 0)).mean()), float(margins.mean())


def check_exports(root: Path) -> None:
    assert exported_loss(root, "sft") == pytest.approx(open_run(root, "sft").result["eval_loss_after"], rel=1e-5)
    accuracy, margin = exported_margins(root)
    result = open_run(root, "reward").result
    assert accuracy == pytest.approx(result["accuracy"]) and margin == pytest.approx(result["margin"], rel=1e-4)
    assert exported_loss(root, "ppo") != pytest.approx(exported_loss(root, "sft"), abs=1e-4)


def test_exported_folders_say_the_same_in_plain_transformers(chain):
    check_exports(chain)


def test_the_result_answers(chain):
    session = dschat_kit.load(chain)
    answer = session.ask("what does a cow say?")
    assert isinstance(answer, str) and answer == session.ask("what does a cow say?")
    assert dschat_kit.load(chain, "sft").ask("what does a cow say?", temperature=1.0, seed=3)


# -- how many ranks, and how many rows at a time, change nothing

def test_one_rank_and_accumulation_give_the_same_losses(chain, tmp_path):
    one = alone(chain, tmp_path, "sft", ["sft.micro_batch_size=4"])
    close(metrics(chain, "sft"), one, "loss", 20)
    close(metrics(chain, "sft"), one, "grad_norm", 5)
    assert one[19]["eval_loss"] == pytest.approx(metrics(chain, "sft")[19]["eval_loss"], rel=1e-5)


def test_one_rank_and_accumulation_give_the_same_reward_model(chain, tmp_path):
    one = alone(chain, tmp_path, "reward", ["reward.micro_batch_size=4"])
    close(metrics(chain, "reward"), one, "loss", 10)
    close(metrics(chain, "reward"), one, "margin", 10)


@pytest.mark.slow
def test_one_rank_gives_the_same_ppo(chain, tmp_path):
    """Two minibatches, two epochs, other micro batches, text mixed in, kl_coef steered: ranks change nothing."""
    sets = ["ppo.ppo_epochs=2", "ppo.max_steps=2", "ppo.ptx_coef=0.5", "ppo.kl_target=0.01", "ppo.kl_horizon=100"]
    for ranks, name, micro in ((1, "one", 8), (2, "two", 2)):
        for stage in ("data", "sft", "reward"):
            shutil.copytree(chain / stage, tmp_path / name / stage)
        succeed("ppo", tmp_path / name, sets=[*sets, f"ppo.micro_batch_size={micro}"], ranks=ranks)
    one, two = metrics(tmp_path / "one", "ppo"), metrics(tmp_path / "two", "ppo")
    for name in ("score_mean", "policy_loss", "value_loss", "ptx_loss", "entropy", "response_length", "kl", "kl_coef",
                 "explained_variance", "grad_norm_actor", "grad_norm_critic"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-5, abs=1e-5), name
        assert one[1][name] == pytest.approx(two[1][name], rel=2e-4, abs=1e-5), name
    assert one[0]["kl_coef"] == 0.1 and one[1]["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 16 / 100))


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_advantages_without_a_critic(chain, tmp_path, advantage):
    for stage in ("data", "sft", "reward"):
        shutil.copytree(chain / stage, tmp_path / stage)
    sets = [f"ppo.advantage={advantage}", "ppo.samples_per_prompt=4", "ppo.max_steps=2"]
    succeed("ppo", tmp_path, sets=sets)
    for row in metrics(tmp_path, "ppo"):
        assert row["first_ratio_max"] == pytest.approx(1, abs=1e-5) and row["grad_norm_actor"] > 0
        assert row["advantage_std"] == pytest.approx(1, abs=1e-3) and "value_loss" not in row
    prompts = [line["prompt"] for line in read_metrics(tmp_path / "ppo" / "samples.jsonl") if line["step"] == 1]
    assert len(prompts) == 4  # rank 0's first four rows: two prompts, each of the two on this rank asked twice
    assert prompts[:2] == prompts[2:]


# -- what ends badly, and goes on

def test_a_killed_rank_is_said_and_the_resumed_run_is_the_uninterrupted_one(chain, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(chain / "data", root / "data")
    done = kill_when("sft", root, 15, "--local_rank=1", signal.SIGKILL)
    run = open_run(root, "sft")
    assert done.returncode not in (0, 2) and run.status["state"] == "failed", run.status
    assert "signal 9" in run.status["error"] and "signal 9" in done.stderr and "Traceback" not in done.stderr
    assert processes(root) == {} and len(metrics(root, "sft")) >= 15

    refused = dschat("sft", root)
    assert refused.returncode == 2 and "--resume auto" in refused.stderr
    succeed("sft", root, "--resume", "auto")
    assert run.result["resumed_from"] and run.result["resumed_from"][0] % 10 == 0
    assert without_times(metrics(root, "sft")) == without_times(metrics(chain, "sft"))
    same = ("eval_loss_before", "eval_loss_after", "steps")
    assert [run.result[name] for name in same] == [open_run(chain, "sft").result[name] for name in same]
    ours, theirs = (r / "sft" / "model" / "model.safetensors" for r in (root, chain))
    assert ours.read_bytes() == theirs.read_bytes()
    assert len(list(run.checkpoints.glob("step-*"))) == 2


@pytest.mark.slow
def test_a_resumed_reward_model_is_the_uninterrupted_one(chain, tmp_path):
    sets = ["checkpoint.every_steps=3"]
    for earlier in ("data", "sft"):
        shutil.copytree(chain / earlier, tmp_path / earlier)
    kill_when("reward", tmp_path, 7, "--local_rank=0", signal.SIGKILL, sets=sets)
    assert open_run(tmp_path, "reward").status["state"] == "failed" and processes(tmp_path) == {}
    succeed("reward", tmp_path, "--resume", "auto", sets=sets)
    assert without_times(metrics(tmp_path, "reward")) == without_times(metrics(chain, "reward"))
    whole, cut = (open_run(root, "reward").result for root in (chain, tmp_path))
    assert cut["resumed_from"] and whole["resumed_from"] == []
    differ = {name for name in whole if whole[name] != cut[name]}
    assert differ <= {"seconds", "tokens_per_second", "resumed_from", "memory_mb"}, differ


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_written_is_lost(chain, tmp_path):
    shutil.copytree(chain / "data", tmp_path / "data")
    limited = ["bash", "-c", 'ulimit -f 96; exec "$@"', "-", *command("sft", tmp_path)]  # no file may pass 48 or 96 KB
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=600)
    run = open_run(tmp_path, "sft")
    assert done.returncode == 2 and "cannot write" in done.stderr and "change:" in done.stderr, done.stderr
    assert run.status["state"] == "failed" and processes(tmp_path) == {} and len(metrics(tmp_path, "sft")) == 10
    succeed("sft", tmp_path, "--resume", "auto")
    assert without_times(metrics(tmp_path, "sft")) == without_times(metrics(chain, "sft"))


def _no_eos(path: Path) -> None:
    found = tokenizer()
    found.eos_token = None
    causal_lm().save_pretrained(path)
    found.save_pretrained(path)


def _masked(path: Path) -> None:
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=300, hidden_size=16, num_hidden_layers=1,
                                                          num_attention_heads=2)).save_pretrained(path)
    tokenizer().save_pretrained(path)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "sets", "words"), [
    (_no_eos, (), "no EOS"), (_masked, (), "no causal language model"),
    (folder, ["data.max_prompt_tokens=100"], "at most 128, the model's positions"), (Path.mkdir, (), "model.name")])
def test_a_model_that_cannot_be_used_is_said(tmp_path, make, sets, words):
    make(tmp_path / "model")
    done = dschat("sft", tmp_path / "run", sets=[f"model.name={tmp_path / 'model'}", *sets], ranks=1)
    assert done.returncode == 2 and words in done.stderr and "change:" in done.stderr, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert open_run(tmp_path / "run", "sft").state in ("failed", "missing")


# -- ZeRO stages, adapters, bf16

@pytest.mark.slow
@pytest.mark.parametrize("sets", [["zero.stage=0"], ["lora.rank=4", "zero.stage=2"], ["lora.rank=4", "zero.stage=3"]],
                         ids=" ".join)
def test_other_zero_stages_and_adapters(chain, tmp_path, sets):
    """As launched from the command line; test_engine_ranks.py holds that all stages give the same losses."""
    sets = [*sets, "sft.max_steps=20", "reward.max_steps=12", "ppo.max_steps=2", "ppo.lr_actor=4e-3"]
    shutil.copytree(chain / "data", tmp_path / "data")
    for stage in ("sft", "reward", "ppo"):
        succeed(stage, tmp_path, sets=sets)
    check_exports(tmp_path)
    assert metrics(tmp_path, "ppo")[0]["first_ratio_max"] == pytest.approx(1, abs=1e-5)
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path, "sft"))
    if "lora.rank=4" not in sets:
        first, reference = metrics(tmp_path, "sft")[0], metrics(chain, "sft")[0]
        assert first["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_bf16_trains_the_whole_chain(chain, tmp_path):
    sets = ["model.dtype=bf16", "sft.max_steps=20", "reward.max_steps=12", "ppo.max_steps=2"]
    for stage in ("sft", "reward", "ppo"):
        succeed(stage, tmp_path, sets=sets)
    assert metrics(tmp_path, "sft")[-1]["loss"] < metrics(tmp_path, "sft")[0]["loss"] - 1
    first = metrics(tmp_path, "ppo")[0]
    assert abs(first["kl"]) < 0.05 and abs(first["first_approx_kl"]) < 0.01
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model").dtype == torch.bfloat16
