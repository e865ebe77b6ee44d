"""The training engine on real ranks: every ZeRO stage and rank count gives the same losses and the same moving average;
every family passes all three stages; adapters share one base; DPO beside PPO. Many stages go into one launch."""

import csv
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import job, launch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILIES, SHAPES, folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat_kit.metrics import read_metrics
from dschat_kit.runs import link_stages
from dschat_kit.study import SHARED

pytestmark = pytest.mark.ranks
CHAIN = ("sft", "reward", "ppo")
NAMES = ("score_mean", "kl", "policy_loss", "value_loss", "entropy", "grad_norm_actor", "clip_fraction")
SHARD = 60_000
"""Bytes of a file of weights here: less than any of these models."""
SAVING = ["zero.stage=2", "ppo.max_steps=3", "ppo.ema_decay=0.9", "checkpoint.every_steps=1"]
SHORT = ["data.rows=120", "data.eval_rows=16", "sft.max_steps=2", "reward.max_steps=2", "ppo.mini_batch_size=8",
         "ppo.micro_batch_size=2"]


def replayed(root: Path, zero: int, *sets: str, average_of: Path | None = None) -> list[dict]:
    """SFT and reward model of 20 steps each, then 20 PPO updates on one experience."""
    saved = str(average_of / "ppo" / "ema") if average_of else ""
    return [job(root / f"zero{zero}", stage, f"zero.stage={zero}", *sets, replay=stage == "ppo", shard_bytes=SHARD,
                saved_average=saved) for stage in CHAIN]


def upon(root: Path, name: str, *sets: str) -> dict:
    """PPO in root/name, upon the stages that stand in root."""
    (root / name).mkdir(parents=True)
    for stage in ("data", "sft", "reward"):
        (root / name / stage).symlink_to(root / stage)
    return job(root / name, "ppo", *sets)


def seen(root: Path, zero: int) -> dict[str, list[float]]:
    place = root / f"zero{zero}"
    rows = {stage: read_metrics(place / stage / "metrics.jsonl") for stage in ("sft", "reward")}
    rows["ppo"] = json.loads((place / "ppo" / "replay.json").read_text())["rows"]
    return {f"{stage} {name}": [row[name] for row in rows[stage]] for stage, name in (
        ("sft", "loss"), ("reward", "loss"), ("ppo", "policy_loss"), ("ppo", "value_loss"), ("ppo", "grad_norm_actor"),
        ("sft", "grad_norm"))}


def same(one: dict, other: dict) -> None:
    for name, values in one.items():
        assert len(values) == len(other[name]) == 20
        for step, (left, right) in enumerate(zip(values, other[name], strict=True)):
            assert math.isclose(left, right, rel_tol=1e-5), (name, step, left, right)


def average_is_right(root: Path, zero: int) -> None:
    found = json.loads((root / f"zero{zero}" / "ppo" / "replay.json").read_text())
    assert found["ema_error"] < 2e-6 and found["ema_distance"] > 1e-3 and found["dtypes"] == ["torch.float32"]
    assert found["ema_elements"] == found["elements"]  # no part twice, none missing
    assert found["ema_moved"] < 1e-5  # that of another job: other ranks, another stage, the same losses


def never_whole(stage: Path) -> None:
    """Under ZeRO-3 a stage gathered its model in parts, and wrote it as several files that plain transformers reads."""
    found = json.loads((stage / "gathered.json").read_text())
    assert 0 < found["export"] < 0.6 * found["whole"], (stage, found)
    assert 0 < found["loading"] < 0.6 * found["whole"], (stage, found)
    for name in ("model", "ema") if (stage / "ema").exists() else ("model",):
        index = json.loads((stage / name / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in (stage / name).glob("*.safetensors"))
        assert files == sorted(set(index["weight_map"].values())) and len(files) > 1
        kind = AutoModelForSequenceClassification if stage.name == "reward" else AutoModelForCausalLM
        _, said = kind.from_pretrained(stage / name, output_loading_info=True)
        assert not any(said.values()), (stage, said)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """ZeRO-0 on one rank: plain training, which all others are held against; and PPO that saves as it goes."""
    root = tmp_path_factory.mktemp("alone")
    launch(root, [*replayed(root, 0), upon(root / "zero0", "saving", *SAVING),
                  job(root / "zero0", "dpo", "zero.stage=0"), *judged(root)], 1)
    return root


def judged(root: Path) -> list[dict]:
    """DPO's model once more, and the best of several answers of the SFT model."""
    place, model = link_stages(root / "judged", root / "zero0", *SHARED) / "ppo", str(root / "zero0" / "{}" / "model")
    place.mkdir()
    cases = [{"model": model.format("dpo"), "seed": 0, "best_of": [1]},
             {"model": model.format("sft"), "seed": 1, "best_of": [1, 2, 4]}]
    (place / "cases.json").write_text(json.dumps(cases))
    return [job(root / "judged", "ppo", "zero.stage=0", judge=True)]


def test_two_ranks_with_zero_2_and_3_give_the_losses_and_the_average_of_one_rank(alone, tmp_path):
    average, more = {"average_of": alone / "zero0"}, job(tmp_path / "zero3", "dpo", "zero.stage=3",
                                                         "dpo.micro_batch_size=4")
    launch(tmp_path, [*replayed(tmp_path, 2, **average), *replayed(tmp_path, 3, **average), more], 2)
    for zero in (2, 3):
        same(seen(alone, 0), seen(tmp_path, zero))
        average_is_right(tmp_path, zero)
    average_is_right(alone, 0)
    one, two = (read_metrics(place / "dpo" / "metrics.jsonl") for place in (alone / "zero0", tmp_path / "zero3"))
    same(*({name: [row[name] for row in rows] for name in ("loss", "grad_norm")} for rows in (one, two)))
    accuracy = [rows[-1]["eval_accuracy"] for rows in (one, two)]  # of 15 pairs: one rank of two has a row less
    assert accuracy[0] == accuracy[1] and accuracy[0] * 15 == pytest.approx(round(accuracy[0] * 15))
    for stage in ("sft", "reward"):
        never_whole(tmp_path / "zero3" / stage)


def test_dpo_begins_at_the_sft_model_and_learns_its_pairs(alone):
    rows = read_metrics(alone / "zero0" / "dpo" / "metrics.jsonl")
    result = json.loads((alone / "zero0" / "dpo" / "result.json").read_text())
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(rows[0]["margin"]) < 1e-5
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02 and rows[-1]["margin"] > 0.05
    assert result["kl"] > 1e-3 and result["gold_before"] is not None and result["accuracy"] == rows[-1]["eval_accuracy"]
    assert result["rollout"]["path"] == "slots" and result["rollout"]["reason"]


def test_an_exported_model_is_judged_as_it_was_while_it_trained_and_best_of_n_takes_the_best(alone):
    trained, drawn = json.loads((alone / "judged" / "ppo" / "result.json").read_text())["cases"]
    result = json.loads((alone / "zero0" / "dpo" / "result.json").read_text())
    for name, there in (("score", "score_after"), ("kl", "kl"), ("gold", "gold_after"), ("finished", "eos_rate_after")):
        assert trained["means"]["1"][name] == pytest.approx(result[there], rel=1e-4, abs=1e-6), name
    assert trained["lm_loss"] == pytest.approx(result["lm_loss_after"], rel=1e-5)
    scores = [drawn["means"][n]["score"] for n in ("1", "2", "4")]
    assert scores == sorted(scores) and scores[2] > scores[0] + 1e-3
    drawn = [drawn["means"][n]["prompts"] for n in ("1", "2", "4")]
    assert drawn == [4 * drawn[2], 2 * drawn[2], drawn[2]] and drawn[2] > 8


def went_on(whole: Path, cut: Path) -> None:
    """A run that went on from step 2 on other ranks did what the whole one does, to rounding."""
    assert json.loads((cut / "result.json").read_text())["resumed_from"] == [2]
    rows, others = (read_metrics(path / "metrics.jsonl") for path in (whole, cut))
    assert rows[:2] == others[:2] and len(rows) == len(others) == 3
    for name in NAMES:
        assert rows[2][name] == pytest.approx(others[2][name], rel=1e-4, abs=1e-5), name
    for name in ("model", "ema"):
        one, other = (load_file(path / name / "model.safetensors") for path in (whole, cut))
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


@pytest.mark.slow
def test_every_other_zero_stage_gives_them_too(alone, tmp_path):
    """And PPO that was saved on one rank goes on on two, its moving average too."""
    cut, whole = upon(alone / "zero0", "cut", *SAVING), alone / "zero0" / "saving" / "ppo"
    shutil.copytree(whole / "checkpoints", Path(cut["path"]) / "checkpoints")
    shutil.rmtree(Path(cut["path"]) / "checkpoints" / "step-000003")
    shutil.copy(whole / "metrics.jsonl", cut["path"])
    two, average = [one for zero in (0, 1) for one in replayed(tmp_path / "two", zero)], tmp_path / "two" / "zero1"
    said = launch(tmp_path / "two", [*two, cut | {"resume": True}], 2)
    assert "step-000002 is of 1 ranks, now 2" in said[0]
    went_on(whole, Path(cut["path"]))
    launch(tmp_path / "one", [one for zero in (1, 2, 3) for one in
                              replayed(tmp_path / "one", zero, average_of=average)], 1)
    for place, zero in (("one", 1), ("one", 2), ("one", 3), ("two", 0), ("two", 1)):
        same(seen(alone, 0), seen(tmp_path / place, zero))
        average_is_right(tmp_path / place, zero)


@pytest.mark.slow
def test_offloaded_optimisers_and_parameters_and_checkpointing_give_them_too(alone, tmp_path):
    """With a compiler that fails, so that nothing is built: the log says that torch's AdamW steps in, and why."""
    sets = ["zero.offload_optimizer=true", "model.gradient_checkpointing=true"]
    jobs = replayed(tmp_path, 2, *sets) + replayed(tmp_path, 3, *sets, "zero.offload_parameters=true")
    said = launch(tmp_path, jobs, 2, CXX="false", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    for zero in (2, 3):
        same(seen(alone, 0), seen(tmp_path, zero))
        average_is_right(tmp_path, zero)
    assert all("optimizer: torch AdamW, since DeepSpeedCPUAdam cannot be built: " in text for text in said)


@pytest.mark.slow
def test_every_family_passes_all_three_stages_sharded(tmp_path):
    families = [*FAMILIES, *sorted(set(SHAPES) - set(FAMILIES))]
    models = {family: folder(tmp_path / "models" / family, family) for family in families}
    launch(tmp_path, [job(tmp_path / family, stage, f"model.name={models[family]}", "zero.stage=3", *SHORT,
                          shard_bytes=SHARD) for family in families for stage in CHAIN], 2)
    for family in families:
        first = read_metrics(tmp_path / family / "ppo" / "metrics.jsonl")[0]
        assert first["first_ratio_max"] == pytest.approx(1, abs=1e-5) and abs(first["kl"]) < 1e-5, family
        assert all(row["grad_norm"] > 0 for stage in ("sft", "reward")
                   for row in read_metrics(tmp_path / family / stage / "metrics.jsonl")), family
        for stage in CHAIN:
            never_whole(tmp_path / family / stage)


# -- adapters

LORA = [*SHORT, "lora.rank=4", "ppo.lr_actor=4e-3", "ppo.lr_critic=4e-3", "ppo.grad_clip=1000", "ppo.ema_decay=0.9",
        "sft.lr=1e-2", "reward.lr=1e-2", "telemetry.csv=true",
        f"telemetry.tensorboard={'true' if find_spec('tensorboard') else 'false'}"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """LoRA through the chain of two families, then PPO again upon one shared base."""
    root = tmp_path_factory.mktemp("adapted")
    jobs = []
    for family, zero in (("llama", 2), ("gpt2", 3)):
        sets = [*LORA, f"model.name={folder(root / 'models' / family, family)}", f"zero.stage={zero}"]
        chain = [*(job(root / family, stage, *sets) for stage in CHAIN), shared(root, family, "shared2", *sets)]
        jobs += [one | {"shard_bytes": SHARD if zero == 3 else 2**31} for one in chain]
    launch(root, jobs, 2)
    return root


def shared(root: Path, family: str, name: str, *sets: str) -> dict:
    return upon(root / family, name, *sets, "lora.share_base=true")


def first_row(*place) -> dict:
    return read_metrics(Path(*place) / "ppo" / "metrics.jsonl")[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_base_gives_what_four_models_give(adapted, family):
    four, one = first_row(adapted, family), first_row(adapted, family, "shared2")
    for name in ("score_mean", "score_std", "entropy", "kl", "response_length", "explained_variance"):
        assert one[name] == pytest.approx(four[name], rel=1e-4, abs=1e-5), name
    assert one["first_ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_one_base_gives_the_same_under_every_zero_stage_and_with_checkpointing(adapted):
    sets = [*LORA, f"model.name={adapted / 'models' / 'llama'}"]
    jobs = [shared(adapted, "llama", f"shared{zero}", *sets, f"zero.stage={zero}", f"model.gradient_checkpointing={gc}")
            for zero, gc in ((0, "false"), (1, "true"), (3, "true"))]
    launch(adapted / "stages", jobs, 2)
    reference = read_metrics(adapted / "llama" / "shared2" / "ppo" / "metrics.jsonl")
    for zero in (0, 1, 3):
        rows = read_metrics(adapted / "llama" / f"shared{zero}" / "ppo" / "metrics.jsonl")
        for left, right in zip(reference, rows, strict=True):
            for name in NAMES:
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), (zero, name)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_and_exported_adapter_say_the_same(adapted, family):
    ids, run = torch.arange(2, 26).view(2, 12), adapted / family
    if family == "gpt2":
        for place in (run, run / "shared2"):
            for stage in ("ppo",) if place.name == "shared2" else CHAIN:
                never_whole(place / stage)
    base = {"sft": adapted / "models" / family, "reward": run / "sft" / "model", "ppo": run / "sft" / "model"}
    for stage, name in (("sft", "model"), ("reward", "model"), ("ppo", "model"), ("ppo", "ema")):
        kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        more = {"num_labels": 1} if stage == "reward" else {}
        merged = kind.from_pretrained(run / stage / name).eval()(input_ids=ids).logits
        plain = kind.from_pretrained(base[stage], **more)
        plain.config.pad_token_id = merged_pad = 0
        adapter = PeftModel.from_pretrained(plain, run / stage / name / "adapter").eval()(input_ids=ids).logits
        assert merged_pad == 0 and float((merged - adapter).abs().max() / merged.abs().max()) < 1e-5, (stage, name)
        if stage != "reward":
            bare = kind.from_pretrained(base[stage]).eval()(input_ids=ids).logits
            assert not torch.allclose(bare, merged, atol=1e-4)  # the adapter is not empty


@pytest.mark.slow
def test_a_resumed_moving_average_is_the_uninterrupted_one(adapted):
    """Resumed half-way, and after the last step, where only evaluation and export are left."""
    sets = [*LORA, f"model.name={adapted / 'models' / 'llama'}", "zero.stage=3", "ppo.max_steps=4",
            "checkpoint.every_steps=2"]
    whole, cut, late = (shared(adapted, "llama", name, *sets) for name in ("whole", "cut", "late"))
    launch(adapted / "whole", [whole], 2)
    ended = Path(whole["path"])
    for left in (cut, late):
        shutil.copytree(ended, left["path"])
        for name in ("model", "ema", "csv"):
            shutil.rmtree(Path(left["path"]) / name)
        (Path(left["path"]) / "result.json").unlink()
    shutil.rmtree(Path(cut["path"]) / "checkpoints" / "step-000004")
    launch(adapted / "cut", [cut | {"resume": True}, late | {"resume": True}], 2)
    for left, step in ((cut, 2), (late, 4)):
        result = json.loads((Path(left["path"]) / "result.json").read_text())
        assert result["resumed_from"] == [step]
        for name in ("model", "ema"):
            one, other = (Path(path) / name / "model.safetensors" for path in (ended, left["path"]))
            assert one.read_bytes() == other.read_bytes(), (step, name)
    assert (ended / "model" / "model.safetensors").read_bytes() != (ended / "ema" / "model.safetensors").read_bytes()
    lines = [(Path(path) / "csv" / "score_mean.csv").read_text() for path in (ended, cut["path"])]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 5  # no step twice


# -- what a stage says of itself

@pytest.mark.slow
def test_csv_files_hold_the_metrics_and_the_card_the_result(adapted):
    for stage, name in (("sft", "loss"), ("reward", "margin"), ("ppo", "score_mean")):
        place = adapted / "llama" / stage
        rows = read_metrics(place / "metrics.jsonl")
        with open(place / "csv" / f"{name}.csv") as file:
            step, *lines = csv.reader(file)
        assert step == ["step", name] and [(int(a), float(b)) for a, b in lines] == [(r["step"], r[name]) for r in rows]
        assert all(0 < row["matmul_share"] < 1.2 and row["tokens_per_second"] > 0 for row in rows)
        result = json.loads((place / "result.json").read_text())
        assert result["memory_mb"] and all(value > 100 for value in result["memory_mb"].values())
        card = (place / "model" / "README.md").read_text()
        assert "| lora.rank" in card.replace("`", "") and "test" in card and f"ZeRO-{2}" in card and "toy" in card
        assert str(adapted) not in card
    assert "moving average" in (adapted / "llama" / "ppo" / "ema" / "README.md").read_text()
    assert {"memory_mb_generation", "memory_mb_scoring", "memory_mb_training"} <= set(first_row(adapted, "llama"))


@pytest.mark.slow
def test_tensorboard_reads_the_metrics(adapted):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="the extra tensorboard is not installed")
    for stage, name in (("sft", "loss"), ("ppo", "score_mean")):
        place = adapted / "llama" / stage
        found = events.EventAccumulator(str(place / "tensorboard")).Reload().Scalars(name)
        rows = read_metrics(place / "metrics.jsonl")
        assert [event.step for event in found] == [row["step"] for row in rows]
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows], rel=1e-6)
