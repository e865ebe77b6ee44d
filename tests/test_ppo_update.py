"""One optimiser step of PPO: what its gradients are made of, and that the moving average follows once."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from references import response_loss
from tiny_models import SETTINGS, VOCABULARY, causal_lm, folder

from dschat_kit.config import Ppo
from dschat_kit.data.datasets import SequenceBatch
from dschat_kit.models.scalar_model import load_scalar_model, response_values
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.rlhf.losses import value_loss
from dschat_kit.rlhf.rollout import Roles
from dschat_kit.train import ppo

B, P, A = 4, 3, 5


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    critic = load_scalar_model(folder(tmp_path_factory.mktemp("model")), SETTINGS, 1, new_head=True)
    return Roles(actor=causal_lm(), critic=critic, ref=None, reward=None)


@pytest.fixture(scope="module")
def minibatch(roles):
    torch.manual_seed(0)
    mask = torch.arange(A) < torch.tensor([[5], [2], [4], [1]])
    attention = torch.cat([torch.ones(B, P, dtype=torch.bool), mask], dim=1)
    numbers = {name: torch.randn(B, A) * mask for name in ("values", "rewards", "advantages", "returns")}
    logprobs = -3 - torch.rand(B, A)
    return Experience(sequences=torch.randint(2, VOCABULARY, (B, P + A)), attention_mask=attention, response_mask=mask,
                      logprobs=logprobs, ref_logprobs=logprobs, scores=torch.zeros(B), **numbers)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([[7], [4], [6], [3]])
    return SequenceBatch(sequences=torch.randint(2, VOCABULARY, (B, 7)), attention_mask=mask,
                         response_mask=mask & (torch.arange(7) > 1))


def gradients(model, loss=None) -> torch.Tensor:
    """Of `loss`, or those that are there."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in model.parameters()])


def updated(monkeypatch, roles, minibatch, texts, **settings) -> tuple[torch.Tensor, torch.Tensor, list[str], dict]:
    """(gradients of actor and critic, what happened in turn, metrics) of the shipped update on one rank."""
    happened = []

    def backward(model, loss):
        happened.append("actor" if model is roles.actor else "critic")
        loss.backward()

    monkeypatch.setattr(ppo, "set_learning_rate", lambda engine, lr: None)
    monkeypatch.setattr(ppo, "grad_norm", lambda engine: 0.0)
    session = SimpleNamespace(sum=lambda *values: [float(value) for value in values], backward=backward,
                              largest=lambda *values: list(values))
    for model in (roles.actor, roles.critic):
        model.zero_grad()
    row = ppo.update(session, roles, minibatch, Ppo(**settings), 1.0, {"lr_actor": 0.0, "lr_critic": 0.0}, texts,
                     SimpleNamespace(update=lambda: happened.append("average")))
    return gradients(roles.actor), gradients(roles.critic), happened, row


def cut(text: SequenceBatch, size: int) -> list[SequenceBatch]:
    parts = zip(*(getattr(text, name).split(size) for name in ("sequences", "attention_mask", "response_mask")),
                strict=True)
    return [SequenceBatch(sequences=ids, attention_mask=mask, response_mask=answer) for ids, mask, answer in parts]


@pytest.mark.parametrize("size", [4, 2, 1])
def test_text_is_mixed_into_the_same_step_with_its_weight_however_the_batch_is_cut(monkeypatch, roles, minibatch, text,
                                                                                   size):
    alone, *_ = updated(monkeypatch, roles, minibatch, [], micro_batch_size=4)
    logits = roles.actor(input_ids=text.sequences, attention_mask=text.attention_mask.long()).logits
    loss = response_loss(logits, text.sequences, text.response_mask)
    wanted = alone + 0.5 * gradients(roles.actor, loss)
    found, _, happened, row = updated(monkeypatch, roles, minibatch, cut(text, size), micro_batch_size=size,
                                      ptx_coef=0.5)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float((found - alone).norm() / wanted.norm()) > 0.1
    assert row["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert happened == ["actor", "critic"] * (4 // size) + ["average"]  # one step, and one of the average after it


@pytest.mark.parametrize("size", [4, 1])
def test_the_critic_learns_the_returns_of_real_tokens(monkeypatch, roles, minibatch, size):
    values = response_values(roles.critic, minibatch.sequences, minibatch.attention_mask, A)
    loss, _ = value_loss(values, minibatch.values, minibatch.returns, minibatch.response_mask, 0.2,
                         minibatch.response_mask.sum())
    wanted = gradients(roles.critic, loss)
    wild = minibatch.returns.masked_fill(~minibatch.response_mask, 1e3)
    _, found, *_ = updated(monkeypatch, roles, dataclasses.replace(minibatch, returns=wild), [], micro_batch_size=size)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_settings_of_the_clip_reach_the_loss(monkeypatch, roles, minibatch):
    with torch.no_grad():
        now, _ = response_logprobs(roles.actor, minibatch.sequences, minibatch.attention_mask, A)
    far = dataclasses.replace(minibatch, logprobs=now - 1.5)  # all ratios are 4.5
    losses = [updated(monkeypatch, roles, far, [], micro_batch_size=4, **how)[3]["policy_loss"]
              for how in ({}, {"dual_clip": 3.0}, {"clip_range": 0.1}, {"clip_range_high": 0.5})]
    assert len(set(losses)) == 4 and losses[1] < losses[0]
