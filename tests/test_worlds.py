"""Enumerable worlds: published numbers, and that nothing is above the optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.models.scalar_model import last_token
from dschat_kit.rlhf.losses import dpo_loss
from dschat_kit.rlhf.rewards import kl_estimates
from dschat_kit.rlhf.worlds import World, WorldReward, best_of_n, kl_gradients, reached

worlds = st.builds(World, kind=st.sampled_from(["bigram", "bandit"]), vocab=st.integers(2, 5), length=st.just(1),
                   seed=st.integers(0, 99), eos=st.booleans(), prompts=st.integers(1, 3)) | st.builds(
    World, vocab=st.integers(2, 4), length=st.integers(1, 4), seed=st.integers(0, 99), eos=st.booleans(),
    prompts=st.integers(1, 3))


@pytest.mark.parametrize("beta, reward, kl", [(0.1, 1.040332, 3.884873), (0.5, 0.125642, 0.767691),
                                              (1.0, -0.254870, 0.190142)])
def test_the_bandit_is_the_published_one(beta, reward, kl):
    world = World("bandit", 10, 1)
    found = reached(world, world.best(beta), beta)
    assert found["optimal_reward"] == pytest.approx(reward, abs=1e-6)
    assert found["optimal_kl"] == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("beta, reward, kl", [(0.5, 1.881807, 1.724266), (1.0, 1.088530, 0.564721)])
def test_the_bigram_world_is_the_published_one(beta, reward, kl):
    world = World()
    found = reached(world, world.best(beta), beta)
    assert found["reference_reward"] == pytest.approx(-0.10254, abs=1e-5)
    assert found["optimal_reward"] == pytest.approx(reward, abs=1e-6)
    assert found["optimal_kl"] == pytest.approx(kl, abs=1e-6)
    raw = np.random.default_rng(0).normal(size=(5, 4))
    assert np.allclose(world.table.exp(), np.exp(raw) / np.exp(raw).sum(1, keepdims=True))


@given(worlds, st.floats(0.1, 2.0), st.floats(0.0, 3.0))
@settings(deadline=None, max_examples=60)
def test_nothing_is_above_the_optimum(world, beta, far):
    assert torch.allclose(world.reference.exp().sum(-1), torch.ones(world.prompts).double())
    noise = torch.randn(world.reference.shape, generator=torch.Generator().manual_seed(world.seed)).double()
    found = reached(world, (world.best(beta) + far * noise).log_softmax(-1), beta)
    assert found["reached_value"] <= found["optimal_value"] + 1e-12 and found["gap_closed"] <= 1 + 1e-9
    assert found["reached_reward"] <= world.highest_reward(found["reached_kl"]) + 1e-9
    assert world.highest_reward(found["optimal_kl"]) == pytest.approx(found["optimal_reward"], abs=1e-6)
    start = reached(world, world.reference, beta)
    assert start["gap_closed"] == pytest.approx(0, abs=1e-9) and start["reached_kl"] == pytest.approx(0, abs=1e-9)
    value = (found["reached_value"] - found["reference_reward"]) / (found["optimal_value"] - found["reference_reward"])
    assert found["gap_closed"] == pytest.approx(value, abs=1e-6)  # the same share, said in values
    best = reached(world, world.best(beta), beta)
    assert best["gap_closed"] == pytest.approx(1) and best["beta_hat"] == pytest.approx(beta)
    assert best["optimal_value"] == pytest.approx(best["optimal_reward"] - beta * best["optimal_kl"])


@given(worlds)
@settings(deadline=None, max_examples=40)
def test_the_reward_model_says_the_worlds_reward_at_the_last_token(world):
    sequences, attention_mask, mask = world.sequences()
    scores = WorldReward(world)(sequences, attention_mask)
    assert torch.allclose(last_token(scores, attention_mask).double(), world.rewards.flatten(), atol=1e-6)
    assert len({tuple(row) for row in sequences[:len(world.answers[0])].tolist()}) == len(world.answers[0])
    for p in range(world.prompts):
        row = p * len(world.answers[0])
        assert sequences[row][attention_mask[row]].tolist()[:p + 1] == [world.vocab + p] * (p + 1)


def test_an_answer_ends_with_eos_which_belongs_to_it():
    tokens, mask = World(vocab=3, length=2, eos=True).answers
    answers = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    assert sorted(answers) == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2]]


def test_kl_estimates_have_the_true_kl_as_their_mean_and_only_k1_in_the_reward_and_k2_have_its_gradient():
    """Over all answers of a bandit: k1 as a loss has no gradient, k3 has that of the other KL, KL(ref || policy)."""
    world, logprobs = World("bandit", 6, 1), torch.randn(6, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    estimates = kl_estimates(logprobs[:, None], world.reference[0][:, None], torch.ones(6, 1).bool())
    p, kl = logprobs.exp(), (logprobs.exp() * (logprobs - world.reference[0])).sum()
    assert torch.allclose((p * estimates["k1"]).sum(), kl) and torch.allclose((p * estimates["k3"]).sum(), kl)
    assert abs(float((p * estimates["k2"]).sum() - kl)) > 0.01

    found = {name: np.array(value) for name, value in kl_gradients(seed=3).items()}
    true = found.pop("true KL")
    right = {name for name, value in found.items() if np.allclose(value, true)}
    assert right == {"k1 in the reward", "k2 as a loss"}
    assert np.allclose(found["k1 as a loss"], 0) and np.allclose(found["k3 as a loss"], found["KL(ref || policy)"])
    assert np.abs(true - found["k3 as a loss"]).max() > 0.01


@given(st.integers(0, 99), st.sampled_from([0.3, 1.0, 3.0]))
@settings(deadline=None, max_examples=6)
def test_dpo_on_all_pairs_ends_at_the_optimum(seed, beta):
    """Each pair with the weight that reference answers ordered by Bradley-Terry give it."""
    world = World("bandit", 5, 1, seed)
    ref, rewards, pairs = world.reference[0], world.rewards[0], list(itertools.permutations(range(5), 2))
    weights = [float((ref[i] + ref[j]).exp() * (rewards[i] - rewards[j]).sigmoid()) for i, j in pairs]
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logprobs = logits.log_softmax(0)
        total = sum(weight * dpo_loss(logprobs[list(pair)], ref[list(pair)], beta, 1)[0]
                    for weight, pair in zip(weights, pairs, strict=True))
        total.backward()
        return total

    optimizer.step(loss)
    found = reached(world, logits.detach().log_softmax(0)[None], beta)
    assert found["gap_closed"] > 1 - 1e-6 and found["beta_hat"] == pytest.approx(beta, rel=1e-3)


@pytest.mark.parametrize("n, bound", [(2, 0.193), (4, 0.636), (16, 1.835), (64, 3.175)])
def test_best_of_n_stays_under_its_bounds_and_the_frontier(n, bound):
    """KL <= log n - (n - 1) / n, and it wins against one sample n / (n + 1) of the time where no rewards tie."""
    assert np.log(n) - (n - 1) / n == pytest.approx(bound, abs=1e-3)
    world = World("bandit", 50, 1)
    policy = best_of_n(world, n)
    found = reached(world, policy, 1.0)
    assert 0 < found["reached_kl"] <= bound
    kls, rewards = zip(*world.frontier(), strict=True)
    assert found["reached_reward"] <= np.interp(found["reached_kl"], kls, rewards) + 1e-3
    p, q, r = policy[0].exp(), world.reference[0].exp(), world.rewards[0]
    wins = (p[:, None] * q * ((r[:, None] > r) + 0.5 * (r[:, None] == r))).sum()
    assert float(wins) == pytest.approx(n / (n + 1), abs=0.03)
