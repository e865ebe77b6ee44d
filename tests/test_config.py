"""The configuration: strict names, types and bounds; JSON both ways; a hash that follows what a stage reads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat_kit.config import STAGES, ConfigError, Data, Pipeline, Ppo
from dschat_kit.presets import PRESETS, get_preset


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Pipeline().with_overrides([text])
    message = str(caught.value)
    assert "got" in message and "expected:" in message and "change:" in message
    return message


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    pipeline = get_preset(name)
    assert Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict()))) == pipeline


def test_an_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match="tiny, smollm2-hh"):
        get_preset("tyni")


def test_overrides_are_applied_in_order_and_leave_the_original_alone():
    before = Pipeline()
    after = before.with_overrides(["ppo.kl_coef=0.3", "ppo.kl_coef = 0.05", "seed=7", "ppo.missing_eos_score=-1"])
    assert (after.ppo.kl_coef, after.seed, after.ppo.missing_eos_score) == (0.05, 7, -1.0)
    assert before == Pipeline() and after.with_overrides(["ppo.missing_eos_score=null"]).ppo.missing_eos_score is None


@pytest.mark.parametrize("text", ["007", "true", "1.10", "null", "my file, really", 'NaN', "[1]"])
def test_a_field_of_text_takes_text_as_it_is(text):
    assert Pipeline().with_overrides([f"model.name={text}"]).model.name == text


@pytest.mark.parametrize("text, said", [
    ("ppo.klcoef=1", "did you mean ppo.kl_coef"), ("pppo.kl_coef=1", "pppo.kl_coef"), ("ppo=3", "ppo.max_steps"),
    ("ppo.kl_coef", "section.field=value"), ("a.b.c=1", "a.b.c"), ("ppo.kl_coef=high", "a finite float"),
    ("ppo.kl_coef=NaN", "a finite float"), ("ppo.kl_coef=-1", "at least 0"), ("sft.max_steps=1.5", "int"),
    ("reward.scale=1", "bool"), ("sft.max_steps=true", "int"), ("zero.stage=4", "one of 0 | 1 | 2 | 3"),
    ("model.architecture=gpt", "llama | qwen3"), ("data.eval_fraction=1", "below 1"), ("seed=-1", "at least 0"),
    ("model.heads=3", "a divisor of model.hidden_size (128)"), ("sft.micro_batch_size=5", "sft.batch_size (32)"),
    ("ppo.mini_batch_size=48", "ppo.rollout_batch_size (128)"), ("ppo.micro_batch_size=5", "ppo.mini_batch_size (32)"),
    ("data.stage_split=2,4", "three positive numbers"), ("data.stage_split=2,0,4", "three positive numbers"),
    ("data.columns=a,b,c,d", "three names"),
    ("data.columns=a,,c", "three names"), ("data.bad_rows=go", "stop | skip"),
    ("data.sources=", "PATH[:weight]"), ("data.sources=a:0", "weights above 0"),
    ("data.sources=a.jsonl,a.jsonl:2", "each source once"), ("sampling.top_p=0.9", "filtered tokens"),
    ("sampling.temperature=0", "above 0"), ("model.vocab_size=100", "256 bytes"),
    ("zero.offload_parameters=true", "zero.stage of at least 3"), ("lora.share_base=true", "lora.rank=16"),
    ("ppo.ema_decay=1", "below 1"), ("model.dtype=fp8", "fp32 | bf16 | fp16"), ("zero.deepspeed=[1]", "no JSON object"),
    ("zero.deepspeed={1}", "no JSON object"), ("ppo.kl_target=-1", "at least 0"),
    ("ppo.dual_clip=1.1", "above 1 + the clip range"),
    ("ppo.advantage=rloo", "at least 2 for rloo"), ("ppo.samples_per_prompt=3", "a divisor of ppo.rollout_batch_size"),
])
def test_what_cannot_work_is_refused(text, said):
    assert said in refused(text)


@pytest.mark.parametrize("tree, said", [({"ppo": 3}, "a section"), ({"ppo": {"kl": 1}}, "ppo.kl"), ([], "a section"),
                                        ({"pppo": {}}, "pppo"), ({"model": {"name": 3}}, "model.name")])
def test_a_damaged_file_is_refused(tree, said):
    with pytest.raises(ConfigError, match=said):
        Pipeline.from_dict(tree)


@pytest.mark.parametrize("sets, said", [
    (["zero.stage=0", "zero.offload_optimizer=true"], "zero.stage of at least 1"),
    (["lora.rank=4", "lora.share_base=true", "reward.model=x"], "the roles share one model"),
    (["lora.rank=4", "lora.share_base=true", "zero.offload_optimizer=true"], "take turns")])
def test_settings_that_contradict_each_other_are_refused(sets, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Pipeline().with_overrides(sets)
    assert "change:" in str(caught.value)


def test_a_section_made_in_python_is_checked_as_well():
    with pytest.raises(ConfigError, match="ppo.kl_coef"):
        Ppo(kl_coef="high")


@pytest.mark.parametrize("text, expected", [
    ("toy", [("toy", None)]),
    ("my file.jsonl:2, other one.jsonl:0.5", [("my file.jsonl", 2.0), ("other one.jsonl", 0.5)]),
    ("/a:b/rows.jsonl", [("/a:b/rows.jsonl", None)]),
    ("C:rows.jsonl:3", [("C:rows.jsonl", 3.0)]),
    (r"a\,b.jsonl:3,c", [("a,b.jsonl", 3.0), ("c", None)]),
])
def test_sources_with_weights(text, expected):
    assert Data(sources=text).weighted_sources() == expected


@given(st.lists(st.integers(1, 50), min_size=3, max_size=3))
def test_shares_sum_to_one(parts):
    shares = Data(stage_split=",".join(map(str, parts))).split_shares()
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(parts[0] / sum(parts))


def test_global_batches_have_to_divide_over_the_ranks():
    pipeline = Pipeline()  # sft: 32 rows, 8 at a time; ppo: 32 responses a step, 16 at a time
    for stage in STAGES:
        pipeline.check_ranks(stage, 2)
        for preset in PRESETS.values():
            preset.check_ranks(stage, 2)
    with pytest.raises(ConfigError, match=r"sft.batch_size: got 32\n.*multiple of 24.*3 ranks\n.*sft.batch_size=48"):
        pipeline.check_ranks("sft", 3)
    with pytest.raises(ConfigError, match=r"ppo.mini_batch_size: got 32\n.*multiple of 64"):
        pipeline.check_ranks("ppo", 4)
    with pytest.raises(ConfigError, match=r"inference_tp_size: got 3\n.*divisor of 2 ranks"):
        pipeline.with_overrides(["rollout.inference_tp_size=3"]).check_ranks("ppo", 2)
    for more, said in (["zero.stage=2"], "step with zero.stage 2"), (["rollout.inference_tp_size=2"], "step with sp"):
        with pytest.raises(ConfigError, match=f"rollout.gather: got {said}"):
            pipeline.with_overrides(["zero.stage=3", "rollout.gather=step", *more]).check_ranks("ppo", 2)
    pipeline.with_overrides(["zero.stage=3", "rollout.gather=step"]).check_ranks("ppo", 2)


def test_the_hash_of_a_stage_follows_what_it_reads():
    before, after = Pipeline(), Pipeline().with_overrides(["reward.lr=0.5"])

    def same(one: Pipeline, other: Pipeline) -> list[str]:
        return [stage for stage in STAGES if one.config_hash(stage) == other.config_hash(stage)]

    assert same(before, after) == ["data", "sft"]
    assert same(before, before.with_overrides(["ppo.seed=1"])) == ["data", "sft", "reward", "dpo"]
    assert same(before, before.with_overrides(["dpo.beta=1"])) == ["data", "sft", "reward", "ppo", "chat"]
    seeded = Pipeline(seed=1)
    assert all(before.config_hash(s) != seeded.config_hash(s) for s in STAGES)
    adapted = before.with_overrides(["lora.rank=2"])
    shared = adapted.with_overrides(["lora.share_base=true"])
    assert same(adapted, shared) == ["data", "sft", "reward", "dpo"]
    watched = before.with_overrides(["telemetry.samples=1", "checkpoint.keep=9"])
    assert all(before.config_hash(s) == watched.config_hash(s) for s in STAGES)
