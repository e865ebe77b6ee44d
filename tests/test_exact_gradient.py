"""PPO's first gradient against the true one, in a world small enough to enumerate: every answer, no sampling.

Vocabulary 4, at most 3 tokens, a bigram policy, r = count(1) - count(2); with and without a token that ends the answer.
The gradient of the clipped loss over the enumerated space must be that of E[r] - beta KL.
"""

import itertools

import numpy as np
import pytest
import torch

from dschat_kit.config import Ppo
from dschat_kit.rlhf.losses import policy_loss, token_logprobs
from dschat_kit.rlhf.rollout import Scored, make_experience

BETA = 0.5
REF = torch.tensor(np.random.default_rng(0).normal(size=(5, 4)), dtype=torch.float32)
"""Logits of the next token; row 4 is the start."""


def world(eos):
    """(tokens (N, 3), mask (N, 3)) of every answer; `eos` ends one, None: all have three tokens."""
    answers = {row[:row.index(eos) + 1] if eos in row else row for row in itertools.product(range(4), repeat=3)}
    tokens, mask = torch.zeros(len(answers), 3, dtype=torch.long), torch.zeros(len(answers), 3, dtype=torch.bool)
    for i, row in enumerate(sorted(answers)):
        tokens[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), True
    return tokens, mask


def reward_of(tokens, mask):
    return (((tokens == 1) & mask).sum(1) - ((tokens == 2) & mask).sum(1)).float()


def logprobs_of(table, tokens, temperature=1.0):
    before = torch.cat([torch.full((len(tokens), 1), 4), tokens[:, :-1]], dim=1)
    return token_logprobs(table[before], tokens, temperature)


def exact_gradient(table, tokens, mask):
    table = table.clone().requires_grad_()
    logprobs, ref = (logprobs_of(t, tokens) * mask for t in (table, REF))
    p = logprobs.sum(1).exp()
    assert abs(p.sum().item() - 1) < 1e-5
    (p * (reward_of(tokens, mask) - BETA * (logprobs - ref).sum(1))).sum().backward()
    return table.grad


def ppo_gradient(table, tokens, mask, *, kl_coef=BETA, gamma=1.0, early=False, temperature=1.0):
    """Of the shipped functions; the arguments break it on purpose. Whitening is undone: it only moves and scales."""
    table = table.clone().requires_grad_()
    with torch.no_grad():
        logprobs, ref = (logprobs_of(t, tokens, temperature) for t in (table, REF))
        weights = (logprobs_of(table, tokens) * mask).sum(1).exp()
    scored = Scored(logprobs=logprobs, ref_logprobs=ref, entropy=ref, values=torch.zeros_like(ref),
                    scores=reward_of(tokens, mask))
    settings = Ppo(kl_coef=kl_coef, gamma=gamma, gae_lambda=1.0, score_clip=0.0, missing_eos_score=None)
    reward_mask = mask & torch.tensor([True, True, False]) if early else mask
    experience = make_experience(tokens, mask, reward_mask, mask.any(1), scored, settings, lambda moments: moments)
    new = logprobs_of(table, tokens, temperature)
    loss, metrics = policy_loss(new, experience.logprobs, experience.returns * weights[:, None], mask, 0.2, 1.0)
    assert float(metrics["ratio_max"]) == 1
    (-loss).backward()
    return table.grad


@pytest.mark.parametrize("eos", [None, 3])
def test_first_gradient_is_the_exact_one(eos):
    tokens, mask = world(eos)
    table = REF + torch.tensor(np.random.default_rng(1).normal(size=(5, 4)), dtype=torch.float32)
    truth = exact_gradient(table, tokens, mask)
    assert float((ppo_gradient(table, tokens, mask) - truth).abs().max()) < 2e-6
    assert float(truth.abs().max()) > 0.05
    for broken in ({"kl_coef": 1.2 * BETA}, {"gamma": 0.99}, {"early": True}, {"temperature": 0.7}):
        assert float((ppo_gradient(table, tokens, mask, **broken) - truth).abs().max()) > 5e-4, broken


def test_the_world_is_that_of_the_published_numbers():
    tokens, mask = world(None)
    ref = (logprobs_of(REF, tokens) * mask).sum(1)
    reward = reward_of(tokens, mask)
    assert float((ref.exp() * reward).sum()) == pytest.approx(-0.10254, abs=1e-5)
    for beta, expected_reward, expected_kl in ((0.5, 1.881807, 1.724266), (1.0, 1.088530, 0.564721)):
        best = (ref + reward / beta).log_softmax(0)
        assert float((best.exp() * reward).sum()) == pytest.approx(expected_reward, abs=1e-5)
        assert float((best.exp() * (best - ref)).sum()) == pytest.approx(expected_kl, abs=1e-5)
