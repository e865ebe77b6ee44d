"""DeepSpeed's configuration and the learning rate, without starting a rank."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dschat_kit.config import ConfigError, Model, Pipeline, Zero
from dschat_kit.engine.ds_config import deepspeed_config, optimizer_device
from dschat_kit.engine.engines import _adam, learning_rate
from dschat_kit.presets import PRESETS

GOLDEN = Path(__file__).parent / "golden" / "ds_config.json"
CASES = {"zero0-fp32": (Zero(stage=0), "fp32"), "zero1-bf16": (Zero(stage=1), "bf16"),
         "zero2-fp16": (Zero(stage=2), "fp16"), "zero2-offload": (Zero(stage=2, offload_optimizer=True), "fp32"),
         "zero3-fp32": (Zero(stage=3), "fp32"),
         "zero3-offload": (Zero(stage=3, offload_optimizer=True, offload_parameters=True), "bf16"),
         "zero3-own-json": (Zero(stage=3, deepspeed=json.dumps({
             "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8, "zero_quantized_weights": True,
                                   "reduce_bucket_size": 1000, "offload_optimizer": {"device": "nvme",
                                                                                     "nvme_path": "/nvme"}},
             "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "communication_data_type": "fp32"})), "bf16")}


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_the_golden_one(name):
    """To accept a change on purpose, write the new text into tests/golden/ds_config.json."""
    zero, dtype = CASES[name]
    found = deepspeed_config(zero, dtype, micro_batch_size=4, accumulation=3, grad_clip=1.5)
    assert found == json.loads(GOLDEN.read_text())[name], json.dumps(found, indent=1)


@pytest.mark.parametrize("tree, said", [
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2, which zero.stage decides"),
    ({"train_batch_size": 8}, "train_batch_size 8, which STAGE.batch_size decides"),
    ({"fp16": {"enabled": True}, "optimizer": {"type": "Lion"}}, 'optimizer {"type": "Lion"}, which STAGE.lr'),
    ({"gradient_clipping": 3.0, "scheduler": {}}, "gradient_clipping 3.0")])
def test_a_json_that_contradicts_a_setting_is_refused_by_name(tree, said):
    with pytest.raises(ConfigError, match="zero.deepspeed") as caught:
        Pipeline(zero=Zero(stage=3, deepspeed=json.dumps(tree)), model=Model(dtype="fp32"))
    assert said in str(caught.value) and "expected:" in str(caught.value) and "change:" in str(caught.value)


@pytest.mark.parametrize("key, setting", [("offload_optimizer", "offload_optimizer"),
                                          ("offload_param", "offload_parameters")])
def test_a_json_that_takes_offloading_back_is_refused_by_name(key, setting):
    own = {device: json.dumps({"zero_optimization": {key: {"device": device}}}) for device in ("none", "nvme")}
    with pytest.raises(ConfigError, match=f'{key}.device "none", which zero.{setting} decides'):
        Pipeline(zero=Zero(stage=3, deepspeed=own["none"], **{setting: True}))
    Pipeline(zero=Zero(stage=3, deepspeed=own["none"]))
    Pipeline(zero=Zero(stage=3, deepspeed=own["nvme"], **{setting: True}))  # where, not whether


@pytest.mark.parametrize("tree, said", [
    ({"zero_optimization": []}, "zero_optimization []"), ({"bf16": True}, "bf16 true"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, 'zero_optimization.offload_optimizer "cpu"')])
def test_a_section_that_is_no_object_is_refused_and_null_is_ours_to_fill(tree, said):
    with pytest.raises(ConfigError, match="expected: a JSON object") as caught:
        Zero(stage=3, deepspeed=json.dumps(tree))
    assert f"zero.deepspeed: got {said}" in str(caught.value)
    nothing = {"zero_optimization": {"offload_optimizer": None, "offload_param": None}, "bf16": None, "fp16": None}
    for own in (nothing, {"zero_optimization": None}):
        zero = Zero(stage=3, offload_optimizer=True, deepspeed=json.dumps(own))
        how = dict(micro_batch_size=4, accumulation=3, grad_clip=1.5)
        assert deepspeed_config(zero, "bf16", **how) == deepspeed_config(Zero(stage=3, offload_optimizer=True), "bf16",
                                                                         **how)


@pytest.mark.parametrize("key, stage", [("offload_optimizer", 0), ("offload_param", 2)])
def test_a_json_that_offloads_what_is_not_sharded_is_refused_too(key, stage):
    own = json.dumps({"zero_optimization": {key: {"device": "nvme", "nvme_path": "/nvme"}}})
    with pytest.raises(ConfigError, match=f"offloading with zero.stage {stage}"):
        Zero(stage=stage, deepspeed=own)
    Zero(stage=3, deepspeed=own)


def test_optimizer_states_are_where_the_merged_configuration_says():
    for name, place in (("zero0-fp32", "none"), ("zero2-offload", "cpu"), ("zero3-own-json", "nvme")):
        zero, dtype = CASES[name]
        assert optimizer_device(deepspeed_config(zero, dtype, micro_batch_size=1, accumulation=1, grad_clip=1)) == place


@pytest.mark.parametrize("gpu, config, kind", [
    (False, {}, None), (True, {}, "FusedAdam"), (False, {"offload_optimizer": {"device": "cpu"}}, "DeepSpeedCPUAdam"),
    (True, {"offload_optimizer": {"device": "nvme"}}, "DeepSpeedCPUAdam")])
@pytest.mark.parametrize("builds", [True, False])
def test_the_log_says_which_adam(monkeypatch, capsys, gpu, config, kind, builds):
    made = []

    def build(groups, **how):
        if not builds:
            raise RuntimeError("no compiler\nand more")
        made.append(torch.optim.AdamW(groups, **how))
        return made[0]
    for name in ("FusedAdam", "DeepSpeedCPUAdam"):
        other = build if name == kind else (lambda *_, **__: pytest.fail("the wrong Adam"))
        monkeypatch.setattr(deepspeed.ops.adam, name, other)
    accelerator = SimpleNamespace(device_name=lambda: "cuda" if gpu else "cpu")
    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: accelerator)
    weights = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    found, said = _adam(weights, {"zero_optimization": config}, lr=0.1, eps=1e-5, weight_decay=0.1), capsys.readouterr()
    assert (found in made) == (builds and kind is not None) and found.defaults["betas"] == (0.9, 0.95)
    reason = "" if builds or not kind else f", since {kind} cannot be built: no compiler"
    assert said.out == f"optimizer: {kind if builds and kind else 'torch AdamW'}{reason}\n"


@pytest.mark.parametrize("name, ranks", [(name, int(found[1])) for name in PRESETS
                                         if (found := re.search(r"-(\d+)gpu$", name))])
def test_larger_presets_build_and_divide_on_their_ranks(name, ranks):
    from deepspeed.runtime.config import DeepSpeedConfig
    pipeline = PRESETS[name]
    for stage in ("sft", "reward", "ppo"):
        pipeline.check_ranks(stage, ranks)
        settings = getattr(pipeline, stage)
        size = getattr(settings, "mini_batch_size", 0) or settings.batch_size
        accumulation = size // (settings.micro_batch_size * ranks)
        found = deepspeed_config(pipeline.zero, "bf16", micro_batch_size=settings.micro_batch_size,
                                 accumulation=accumulation, grad_clip=settings.grad_clip)
        assert DeepSpeedConfig(found).train_batch_size * ranks == size


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deepspeed_accepts_the_configuration(stage, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig
    found = deepspeed_config(Zero(stage=stage), dtype, micro_batch_size=4, accumulation=3, grad_clip=1.5)
    assert found["zero_optimization"]["stage"] == stage and found["bf16"] == {"enabled": dtype == "bf16"}
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 3)
    assert found["gradient_clipping"] == 1.5 and "optimizer" not in found and "scheduler" not in found
    parsed = DeepSpeedConfig(found)
    assert parsed.zero_config.stage == stage and parsed.train_batch_size == 12


def test_deepspeed_accepts_a_json_of_the_user_merged_over_ours():
    from deepspeed.runtime.config import DeepSpeedConfig
    zero, dtype = CASES["zero3-own-json"]
    parsed = DeepSpeedConfig(deepspeed_config(zero, dtype, micro_batch_size=4, accumulation=3, grad_clip=1.5))
    own = parsed.zero_config
    assert (own.offload_optimizer.device, own.zero_hpz_partition_size, own.reduce_bucket_size) == ("nvme", 8, 1000)
    assert own.zero_quantized_weights and parsed.communication_data_type == torch.float32


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["cosine", "linear"]))
def test_learning_rate_rises_then_falls_to_its_minimum(steps, warmup, minimum, shape):
    rates = [learning_rate(2.0, step, steps, warmup, minimum, shape) for step in range(steps + 1)]
    rising = int(warmup * steps)
    assert all(0 <= rate <= 2 for rate in rates) and all(rate > 0 for rate in rates[:rising])
    assert rates[:rising] == sorted(rates[:rising])
    assert all(after <= before + 1e-12 for before, after in zip(rates[rising:], rates[rising + 1:], strict=False))
    if rising < steps:
        assert rates[-1] == pytest.approx(2.0 * minimum, abs=1e-9)


def test_learning_rate_at_known_places():
    linear = [learning_rate(1.0, step, 10, 0.2, 0.0, "linear") for step in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0] and linear[6] == 0.5
    assert learning_rate(1.0, 5, 10, 0.0, 0.1, "cosine") == pytest.approx(0.55)
