"""KL penalty, GAE and whitening, against numbers that can be computed by hand or are published."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.rlhf.rewards import clip_scores, compute_rewards, gae, kl_estimates, masked_moments, whiten


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
