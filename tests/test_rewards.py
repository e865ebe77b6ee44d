"""KL penalty, GAE and whitening, against numbers that can be computed by hand or are published."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.config import Ppo
from dschat_kit.rlhf.rewards import (
    ADVANTAGES,
    clip_scores,
    compute_rewards,
    gae,
    group_advantages,
    kl_estimates,
    masked_moments,
    next_kl_coef,
    whiten,
)


def lengths_to_mask(lengths, width):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@st.composite
def batches(draw):
    """(rewards, values, mask) with answers of different lengths."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    numbers = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return numbers[0], numbers[1], lengths_to_mask(lengths, width)


def test_score_stands_at_the_last_real_token_and_the_penalty_everywhere():
    logprobs, ref = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    rewards = compute_rewards(torch.tensor([2.0]), logprobs, ref, torch.tensor([[True, True, False]]), 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 2.1, 0.0]]))


def test_a_response_without_eos_gets_the_configured_score():
    scores, finished = torch.tensor([7.0, -9.0, 1.0]), torch.tensor([True, True, False])
    assert clip_scores(scores, finished, 5.0, None).tolist() == [5.0, -5.0, 1.0]
    assert clip_scores(scores, finished, 0.0, -2.0).tolist() == [7.0, -9.0, -2.0]


@given(batches(), st.floats(0.5, 1.0))
@settings(deadline=None, max_examples=60)
def test_gae_with_lambda_1_is_the_monte_carlo_return_less_the_value(batch, gamma):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, 1.0)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            monte_carlo = sum(gamma ** (k - t) * rewards[i, k] for k in range(t, length))
            assert math.isclose(advantages[i, t], monte_carlo - values[i, t], abs_tol=1e-9)
            assert math.isclose(returns[i, t], monte_carlo, abs_tol=1e-9)


@given(batches(), st.floats(0.5, 1.0))
@settings(deadline=None, max_examples=60)
def test_gae_with_lambda_0_is_the_td_error(batch, gamma):
    rewards, values, mask = batch
    advantages, _ = gae(rewards, values, mask, gamma, 0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(values), 1)], dim=1)
    assert torch.allclose(advantages, (rewards + gamma * following - values) * mask)


@given(batches(), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_padding_columns_change_nothing(batch, extra):
    rewards, values, mask = batch
    more, wild = torch.zeros(len(rewards), extra, dtype=torch.bool), torch.full((len(rewards), extra), 1e3).double()
    wide = [torch.cat(pair, dim=1) for pair in ((rewards, wild), (values, wild), (mask, more))]
    for narrow_one, wide_one in zip(gae(rewards, values, mask, 0.9, 0.8), gae(*wide, 0.9, 0.8), strict=True):
        assert torch.equal(wide_one[:, :-extra], narrow_one) and not wide_one[:, -extra:].any()
    white = whiten(rewards, mask, masked_moments(rewards, mask))
    wide_white = whiten(wide[0], wide[2], masked_moments(wide[0], wide[2]))
    assert torch.equal(wide_white[:, :-extra], white) and not wide_white[:, -extra:].any()


def test_whitening_reproduces_the_published_numbers():
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    mask = torch.ones_like(x, dtype=torch.bool)
    white = whiten(x, mask, masked_moments(x, mask), shift_mean=False)
    assert [round(v, 4) for v in white[0].tolist()] == [0.0508, 0.4381, 0.8254]
    shifted = whiten(x, mask, masked_moments(x, mask))
    assert abs(float(shifted.mean())) < 1e-6 and abs(float(shifted.square().mean()) - 1) < 1e-5


@given(batches(), st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_moments_add_up_over_ranks(batch, cut):
    x, _, mask = batch
    parts = masked_moments(x[:cut], mask[:cut]) + masked_moments(x[cut:], mask[cut:])
    assert torch.allclose(parts, masked_moments(x, mask))


def test_no_argument_is_changed():
    arguments = [torch.randn(3, 4), torch.randn(3, 4), lengths_to_mask([1, 4, 2], 4)]
    copies = [a.clone() for a in arguments]
    gae(*arguments, 1.0, 0.95)
    compute_rewards(torch.randn(3), *arguments, 0.1)
    whiten(arguments[0], arguments[2], masked_moments(arguments[0], arguments[2]))
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


@pytest.mark.parametrize(("name", "expected"), [("k1", 0.5), ("k2", 0.625), ("k3", 0.5)])
def test_kl_estimators_at_true_kl_one_half(name, expected):
    """Unit-variance Gaussians one apart: KL 0.5; k1 and k3 are unbiased, k2 is 25 % too high."""
    x = torch.randn(4_000_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1.0
    normal = torch.distributions.Normal
    estimates = kl_estimates(normal(1.0, 1.0).log_prob(x), normal(0.0, 1.0).log_prob(x), torch.ones_like(x).bool())
    assert abs(float(estimates[name].mean()) - expected) < 0.004


def test_kl_is_summed_over_the_real_tokens_of_a_response():
    logprobs, ref = torch.zeros(1, 3), torch.tensor([[-1.0, 0.5, 40.0]])
    assert kl_estimates(logprobs, ref, lengths_to_mask([2], 3))["k1"].tolist() == [0.5]


@pytest.mark.parametrize("kl, expected", [(12.0, 0.151536), (0.0, 0.148464), (6.0, 0.15), (6.6, 0.15 * 1.00512)])
def test_the_adaptive_controller_reproduces_the_published_numbers(kl, expected):
    assert next_kl_coef(0.15, kl, target=6.0, horizon=10_000, responses=512) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 500), st.integers(2, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_rloo_compares_with_the_others_and_grpo_with_the_group(seed, samples, prompts):
    torch.manual_seed(seed)
    rewards, mask = torch.randn(samples * prompts, 3).double(), lengths_to_mask([3, 1] * 10, 3)[:samples * prompts]
    totals = (rewards * mask).sum(1)
    rloo = ADVANTAGES["rloo"](rewards, rewards, mask, Ppo(samples_per_prompt=samples, rollout_batch_size=480))[0]
    grpo = ADVANTAGES["grpo"](rewards, rewards, mask, Ppo(samples_per_prompt=samples, rollout_batch_size=480))[0]
    for row in range(samples * prompts):
        group = totals[row % prompts::prompts]
        others = (group.sum() - totals[row]) / (samples - 1)
        assert torch.allclose(rloo[row], (totals[row] - others) * mask[row])
        assert torch.allclose(grpo[row], (totals[row] - group.mean()) / (group.std(correction=0) + 1e-4) * mask[row])


@given(batches())
@settings(deadline=None, max_examples=40)
def test_reinforce_is_the_reward_to_go(batch):
    rewards, values, mask = batch
    found, returns = ADVANTAGES["reinforce"](rewards, values, mask, Ppo(gae_lambda=0.3))
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(found, to_go) and torch.allclose(returns, to_go)
    gae_found, _ = ADVANTAGES["gae"](rewards, values, mask, Ppo(gae_lambda=0.3))
    assert torch.equal(gae_found, gae(rewards, values, mask, 1.0, 0.3)[0])


@given(batches(), st.floats(0.1, 5.0))
@settings(deadline=None, max_examples=40)
def test_a_constant_added_to_the_score_moves_no_group_advantage(batch, constant):
    rewards, _, mask = batch
    two, both = torch.cat([rewards, rewards.flip(0)]), torch.cat([mask, mask])
    more = two + constant * torch.nn.functional.one_hot(both.sum(1) - 1, two.shape[1])
    for normalise in (False, True):
        assert torch.allclose(group_advantages(two, both, 2, normalise), group_advantages(more, both, 2, normalise),
                              atol=1e-6)
