"""Real runs made sick on purpose: the doctor names each sickness, and finds nothing wrong with a healthy run.

All in one process of one rank: a base of SFT and reward model, then a short PPO for each case.
"""

import json
import random

import pytest
from launching import job, launch
from tiny_models import folder

from dschat_kit.data.tokenizer import EOS
from dschat_kit.notebook.diagnosis import run_checks

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

BASE = ("data.stage_split=1,1,1", "data.eval_rows=48", "sampling.max_new_tokens=8", "sft.max_steps=60",
        "sft.batch_size=16", "sft.micro_batch_size=16", "sft.lr=0.004", "reward.max_steps=30", "reward.scale=true",
        "ppo.rollout_batch_size=64", "ppo.mini_batch_size=32", "ppo.micro_batch_size=32", "rollout.micro_batch_size=64",
        "ppo.max_steps=3", "ppo.missing_eos_score=null", "ppo.eval_prompts=16", "ppo.lr_actor=0.0005",
        "ppo.lr_critic=0.01", "ppo.value_clip_range=10", "ppo.grad_clip=50", "ppo.ppo_epochs=2")
NEVER = "rollout.reuse_logprobs=never"
HARD = "ppo.lr_actor=0.02", "ppo.kl_coef=0", "ppo.ppo_epochs=4", "ppo.score_clip=0"
CASES = {  # name -> what is made sick in the code, and in the settings, and what the doctor has to say about it
    "healthy": ([], ["ppo.max_steps=8"], set()),
    "filtered": (["filtered"], [], {"first ratio", "first approx_kl", "first KL"}),
    "greedy": (["greedy"], [NEVER], {"sampled tokens"}),
    "hot": (["hot"], [NEVER], {"sampler", "sampled tokens"}),
    "stale": (["stale"], [NEVER, "ppo.max_steps=8", "ppo.lr_actor=0.01", "ppo.kl_coef=0"], {"KL", "sampled tokens"}),
    "stale and believed": (["stale"], ["ppo.max_steps=8", "ppo.lr_actor=0.01", "ppo.kl_coef=0"],
                           {"first ratio", "first approx_kl", "clipping"}),
    "mute": (["mute"], [], {"stale metrics"}),
    "worthless": (["worthless"], [], {"scores"}),
    "unshifted": (["unshifted"], [], {"reference scores", "first scores"}),
    "backwards": (["backwards"], ["ppo.max_steps=8", "ppo.lr_actor=0.005", "ppo.kl_coef=0"], {"score"}),
    "dropout": (["dropout", "unwhitened"], [], {"first ratio", "first approx_kl", "advantages"}),
    "early score": (["early score"], ["ppo.grad_clip=0.0001", "ppo.lr_critic=0.3"],
                    {"reference scores", "gradients", "values"}),
    "long is good": (["long is good"], [*HARD, "ppo.max_steps=12"], {"length", "entropy"}),
    "growing": (["growing"], [*HARD, "ppo.max_steps=6"], {"score scale"}),
    "no leash": ([], ["ppo.max_steps=24", "ppo.lr_actor=0.01", "ppo.kl_coef=0", "ppo.ppo_epochs=4"],
                 {"EOS rate", "ends", "distance"}),
}

LATE = {"scores", "advantages"}
"""Fail where the policy has collapsed to one answer."""


def write_rows(path) -> str:
    """Short answers, some longer than others; which one is preferred is decided by a coin."""
    rng, words = random.Random(0), ("red", "blue", "green", "pink")
    answers = [" ".join(rng.choices(words, k=rng.choice((1, 1, 2)))) for _ in range(1200)]
    rows = [{"prompt": f"\n\nHuman: colour {i % 97}?\n\nAssistant:", "chosen": " " + a, "rejected": " " + b}
            for i, (a, b) in enumerate(zip(answers[::2], answers[1::2], strict=True)) if a != b]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.sources={path}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the doctor finds in PPO (and what in the reward model) by case: name -> state."""
    root = tmp_path_factory.mktemp("sick")
    rows = write_rows(root / "rows.jsonl")
    jobs = [job(root / "base", stage, *BASE, rows) for stage in ("sft", "reward")]
    for name, (patches, settings, _) in CASES.items():
        (root / name).mkdir()
        for stage in ("data", "sft", "reward"):
            (root / name / stage).symlink_to(root / "base" / stage)
        jobs.append(job(root / name, "ppo", *BASE, rows, *settings, sick=patches))
    model = folder(root / "pads with EOS model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": EOS}))
    jobs += [job(root / "pads with EOS", stage, *BASE, rows, f"model.name={model}", sick=["eos masked"])
             for stage in ("sft", "reward", "ppo")]
    launch(root / "jobs", jobs, 1)
    return {name: {check.name: check for check in run_checks(root / name)} for name in (*CASES, "pads with EOS")}


def sick(found: dict, stage: str, *states: str) -> set[str]:
    return {name.removeprefix(f"{stage} ") for name, check in found.items()
            if name.startswith(f"{stage} ") and check.state in states}


@pytest.mark.parametrize("case", CASES)
def test_the_doctor_names_what_was_made_sick(found, case):
    wanted, said = CASES[case][2], sick(found[case], "ppo", "warn", "fail")
    assert wanted <= said, said
    assert sick(found[case], "ppo", "fail") <= wanted | LATE
    if case == "healthy":
        assert not said & set().union(*(proven for _, _, proven in CASES.values()))


def test_eos_that_is_padding_is_never_learned(found):
    assert {"pad = EOS", "ends"} <= sick(found["pads with EOS"], "ppo", "warn", "fail")


def test_preferences_by_a_coin_are_chance(found):
    assert "accuracy" in sick(found["healthy"], "reward", "warn")
