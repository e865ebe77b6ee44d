"""What a CUDA graph captures: a step that looks at sizes only, never at a value. Its tokens: tests/test_decode.py."""

import pytest
import torch
from tiny_models import causal_lm

from dschat_kit.engine.attention import ATTENTION, FAMILIES, KVSlots
from dschat_kit.engine.graphs import GraphedSlots
from dschat_kit.engine.replica import Replica


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_step_asks_for_no_value(architecture):
    """On the meta device there are no values; whatever asks for one raises."""
    model = Replica(causal_lm(architecture).to("meta"), torch.float32).fill()
    model.set_attn_implementation(ATTENTION)
    kv = KVSlots(4, 32)
    steps = GraphedSlots(model, kv, torch.device("meta"), capture=False)
    with torch.no_grad():
        prompts = torch.zeros(2, 3, dtype=torch.long, device="meta")
        steps.admit(prompts, torch.ones_like(prompts), [0, 1])
        assert steps._forward(16).shape == (4, model.config.vocab_size)
