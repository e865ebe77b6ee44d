"""DeepSpeed's configuration and the learning rate, without starting a rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat_kit.config import Zero
from dschat_kit.engine.ds_config import deepspeed_config
from dschat_kit.engine.engines import learning_rate


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
