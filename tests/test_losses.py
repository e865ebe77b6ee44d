"""The losses against their textbook forms, and their independence of how a batch is cut."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import entropy_of, token_logprobs

from dschat_kit.rlhf.logprobs import chunked_logprobs
from dschat_kit.rlhf.losses import (
    dpo_loss,
    policy_loss,
    preference_loss,
    sft_loss,
    value_loss,
)


def test_sft_loss_is_the_cross_entropy_of_the_response_tokens():
    torch.manual_seed(0)
    logits, sequences = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]).bool()
    loss, metrics = sft_loss(token_logprobs(logits[:, :-1], sequences[:, 1:])[mask[:, 1:]], mask.sum())
    by_hand = [F.cross_entropy(logits[i, t - 1], sequences[i, t]) for i in range(2) for t in range(6) if mask[i, t]]
    assert torch.allclose(loss, torch.stack(by_hand).mean()) and torch.equal(metrics["loss"], loss)


def test_logprobs_are_those_of_the_temperature_and_in_fp32():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 7).bfloat16(), torch.randint(0, 7, (2, 3))
    expected = (logits.float() / 0.7).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    found = chunked_logprobs(logits.flatten(0, 1), tokens.flatten(), 0.7)[0]
    assert found.dtype == torch.float32 and torch.allclose(found, expected.flatten(), atol=1e-6)
    assert torch.allclose(entropy_of(torch.zeros(1, 1, 8)), torch.tensor(8.0).log())


def test_preference_loss_is_minus_log_sigmoid_of_the_margin():
    chosen, rejected = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    loss, metrics = preference_loss(chosen, rejected, 3)
    assert torch.allclose(loss, -torch.sigmoid(chosen - rejected).log().mean())
    assert float(metrics["accuracy"]) == pytest.approx(0.5)  # right, wrong, a tie that counts half
    assert float(metrics["margin"]) == pytest.approx(1 / 3)


def test_dpo_begins_at_log_2_and_has_the_published_gradient():
    """-beta sigmoid(r_rejected - r_chosen) [grad log pi(chosen) - grad log pi(rejected)], the equation after eq. 7."""
    torch.manual_seed(0)
    logprobs, ref = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    start, metrics = dpo_loss(ref, ref, 0.3, 3)
    assert float(start) == pytest.approx(math.log(2)) and float(metrics["accuracy"]) == 0.5
    loss, _ = dpo_loss(logprobs, ref, 0.3, 3)
    loss.backward()
    chosen, rejected = (0.3 * (logprobs - ref)).detach().chunk(2)
    push = -0.3 * torch.sigmoid(rejected - chosen) / 3
    assert torch.allclose(logprobs.grad, torch.cat([push, -push]))


def test_policy_loss_clips_only_what_would_go_too_far():
    log_ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    advantages, mask = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(log_ratio, torch.zeros(1, 4), advantages, mask, 0.2, 4)
    assert float(loss) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert float(metrics["clip_fraction"]) == 0.5 and float(metrics["ratio_max"]) == pytest.approx(1.5)


def test_the_ratio_may_rise_further_than_it_falls():
    log_ratio = torch.tensor([[1.5, 1.25, 0.5]]).log()
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, metrics = policy_loss(log_ratio, torch.zeros(1, 3), torch.ones(1, 3), mask, 0.2, 3, clip_range_high=0.3)
    assert float(loss) == pytest.approx(-(1.3 + 1.25 + 0.5) / 3)
    assert float(metrics["clip_fraction"]) == pytest.approx(1 / 3)
    _, down = policy_loss(log_ratio, torch.zeros(1, 3), -torch.ones(1, 3), mask, 0.2, 3, clip_range_high=0.3)
    assert float(down["clip_fraction"]) == pytest.approx(1 / 3)  # only the one that has fallen below 0.8


def test_dual_clip_bounds_what_a_bad_token_can_do():
    new = torch.tensor([[9.0, 2.0, 0.5, 9.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[-1.0, -1.0, -1.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(new, torch.zeros(1, 4), advantages, mask, 0.2, 4, dual_clip=3.0)
    loss.backward()
    assert float(metrics["policy_loss"]) == pytest.approx((3 + 2 + 0.8 - 1.2) / 4)
    assert float(metrics["clip_fraction"]) == 0.75 and (new.grad != 0).tolist() == [[False, True, False, False]]
    plain, metrics = policy_loss(new, torch.zeros(1, 4), advantages, mask, 0.2, 4)
    assert plain.item() == pytest.approx((9 + 2 + 0.8 - 1.2) / 4) and float(metrics["clip_fraction"]) == 0.5


def test_first_minibatch_has_ratio_one_and_the_policy_gradient():
    new = torch.randn(2, 3, requires_grad=True)
    advantages, mask = torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    loss, metrics = policy_loss(new, new.detach(), advantages, mask, 0.2, mask.sum())
    loss.backward()
    assert (float(metrics["ratio_max"]), float(metrics["approx_kl"]), float(metrics["clip_fraction"])) == (1, 0, 0)
    assert torch.allclose(new.grad, -advantages * mask / mask.sum())


def test_value_loss_takes_the_larger_of_both_errors():
    values, returns, mask = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = value_loss(torch.tensor([[0.9, 0.1]]), values, returns, mask, 0.2, 2)
    assert float(loss) == pytest.approx(0.5 * (0.8**2 + 0.9**2) / 2)
    assert float(metrics["value_clip_fraction"]) == 0.5


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_cutting_a_batch_changes_no_loss(seed, cut):
    """Sums over tokens of the global batch: what gradient accumulation and ranks rest on."""
    torch.manual_seed(seed)
    rows, A = 6, 4
    new, old, advantages, values, returns = torch.randn(5, rows, A, dtype=torch.float64)
    mask = torch.arange(A)[None] < torch.randint(1, A + 1, (rows, 1))
    tokens = mask.sum()

    def both(part):
        return (policy_loss(new[part], old[part], advantages[part], mask[part], 0.2, tokens)[0]
                + value_loss(new[part], values[part], returns[part], mask[part], 0.2, tokens)[0]
                + preference_loss(new[part, 0], old[part, 0], rows)[0])
    assert torch.allclose(both(slice(None)), both(slice(0, cut)) + both(slice(cut, None)))


def test_nothing_outside_the_mask_matters():
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    for loss in (policy_loss, lambda a, b, c, m, *rest: value_loss(a, b, c, m, *rest)):
        first, _ = loss(new, old, advantages, mask, 0.2, mask.sum())
        wild, _ = loss(new.masked_fill(~mask, 9.0), old, advantages.masked_fill(~mask, -7.0), mask, 0.2, mask.sum())
        assert torch.equal(first, wild)
