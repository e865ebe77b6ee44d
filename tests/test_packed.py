"""Frozen models whose weights are packed say the same, and hold nothing twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SHAPES, causal_lm
from torch import nn
from transformers import AutoModelForSequenceClassification

from dschat_kit import machine
from dschat_kit.config import Pipeline
from dschat_kit.models import packed
from dschat_kit.models.packed import PackedLinear, pack
from dschat_kit.models.scalar_model import ScalarModel, response_scores
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.train.roles import scorer


@pytest.fixture(autouse=True)
def of_real_size(monkeypatch):
    """Tiny weights are packed as those of a model of real size are, and bf16 counts as multiplied by hardware."""
    monkeypatch.setattr(packed, "LEAST", 0)
    monkeypatch.setattr(packed, "detect", lambda: replace(machine.detect(), bf16=True))


def rows():
    torch.manual_seed(0)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4] = mask[1, 10:] = False
    return torch.randint(2, 100, mask.shape), mask


def frozen(model: nn.Module) -> nn.Module:
    return scorer(SimpleNamespace(pipeline=Pipeline(), device=torch.device("cpu")), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_a_reference_says_the_same(architecture, dtype):
    model, (ids, mask) = causal_lm(architecture).to(dtype), rows()
    before, names = response_logprobs(model, ids, mask, 6)[0], [name for name, _ in model.named_parameters()]
    layers = [part for part in frozen(model).modules() if isinstance(part, PackedLinear) and part.packed is not None]
    error = (response_logprobs(model, ids, mask, 6)[0] - before).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.05) and before.std() > 0.01
    assert all(layer.weight.is_meta for layer in layers) and (layers or architecture == "gpt2")  # which has Conv1D
    assert names == [name for name, _ in model.named_parameters()]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_says_the_same(dtype):
    config = causal_lm().config
    config.num_labels, (ids, mask) = 1, rows()
    model = ScalarModel(AutoModelForSequenceClassification.from_config(config).to(dtype))
    before, head = response_scores(model, ids, mask), model.classifier.score
    error = (response_scores(frozen(model), ids, mask) - before).abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 0.01) and before.std() > 1e-3
    assert head.weight.is_meta and head.packed is not None


def test_weights_that_others_need_stay():
    """A head that is the embedding too, and shards of ZeRO-3."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
    model[3].weight, model[1].weight.ds_id = model[0].weight, 0
    before = model(torch.arange(9))
    pack(model.requires_grad_(False))
    assert [layer.weight.is_meta for layer in model] == [False, False, True, False]
    assert torch.allclose(model(torch.arange(9)), before, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_what_no_kernel_multiplies_stays_plain(monkeypatch, dtype, bf16):
    monkeypatch.setattr(packed, "detect", lambda: replace(machine.detect(), bf16=bf16))
    assert type(pack(nn.Sequential(nn.Linear(8, 8, dtype=dtype)))[0]) is nn.Linear


def test_small_weights_in_fp32_stay_plain(monkeypatch):
    monkeypatch.undo()
    layers = pack(nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 256)))
    assert [layer.weight.is_meta for layer in layers] == [False, True]
