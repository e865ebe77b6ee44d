"""The line of an iteration: every number is what its name says, of real tokens and of the answers of all ranks."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dschat_kit.config import Pipeline
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.rollout import Scored
from dschat_kit.train.ppo_metrics import rollout_metrics

B, A = 6, 4
MASK = torch.arange(A) < torch.tensor([[4], [1], [3], [2], [4], [2]])


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(B, A, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def rollout():
    """(experience, scored, batch); what is not real is wild."""
    wild = {name: numbers(i).masked_fill(~MASK, 1e3) for i, name in enumerate(
        ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"))}
    experience = Experience(sequences=torch.zeros(B, A, dtype=torch.long), attention_mask=MASK, response_mask=MASK,
                            scores=torch.zeros(B), **wild)
    scored = Scored(logprobs=wild["logprobs"], ref_logprobs=wild["ref_logprobs"], values=wild["values"],
                    entropy=numbers(7).abs().masked_fill(~MASK, 1e3), scores=torch.tensor([3., -1, 2, 0, 9, 5]))
    batch = SimpleNamespace(finished=torch.tensor([1, 1, 0, 1, 0, 1]).bool(), entropy=scored.entropy,
                            logprobs=(scored.logprobs + 0.25 * (torch.arange(B) == 2)[:, None]) * MASK)
    return experience, scored, batch


def row_of(experience, scored, batch, updates, others=1, reuse="never"):
    """The metrics where `others` ranks have the same answers."""
    pipeline = Pipeline().with_overrides([f"rollout.reuse_logprobs={reuse}"])
    session = SimpleNamespace(pipeline=pipeline, sum_tensor=lambda x: others * x, largest=lambda *values: list(values))
    return rollout_metrics(session, experience, scored, batch, updates)


UPDATES = [{"policy_loss": 0.2, "ratio_max": 1.0, "approx_kl": 0.0, "value_loss": 1.0},
           {"policy_loss": 0.4, "ratio_max": 1.7, "approx_kl": 0.2, "value_loss": 3.0}]


@pytest.mark.parametrize("others", [1, 2])
def test_every_metric_is_what_its_name_says(rollout, others):
    experience, scored, batch = rollout
    row = row_of(*rollout, UPDATES, others)
    d = ((scored.logprobs - scored.ref_logprobs) * MASK).double().numpy()
    returns, values, entropy, logprobs, advantages = (x[MASK].double().numpy() for x in (
        experience.returns, experience.values, scored.entropy, scored.logprobs, experience.advantages))
    scores = scored.scores.numpy()
    assert row == pytest.approx({
        "score_mean": scores.mean(), "score_std": scores.std(), "score_min": -1, "score_max": 9,
        "kl": d.sum(1).mean(), "kl_k2": (d ** 2).sum(1).mean() / 2,
        "kl_k3": (np.exp(-d) - 1 + d).sum(1).mean(), "response_length": 16 / 6, "eos_rate": 4 / 6,
        "entropy": entropy.mean(), "surprisal": -logprobs.mean(), "advantage_std": advantages.std(),
        "tokens": 16 * others, "sampler_gap": 0.25, "explained_variance": 1 - (returns - values).var() / returns.var(),
        "policy_loss": 0.3, "ratio_max": 1.7, "approx_kl": 0.1, "value_loss": 2.0, "first_ratio_max": 1.0,
        "first_approx_kl": 0.0}, rel=1e-5, abs=1e-6)


def test_nothing_is_said_of_what_was_not_measured(rollout):
    alone = [{name: value for name, value in update.items() if name != "value_loss"} for update in UPDATES]
    row = row_of(*rollout, alone, reuse="always")
    assert "explained_variance" not in row and "sampler_gap" not in row


def test_a_critic_that_knows_the_returns_explains_all_of_them_and_one_that_says_nothing_none(rollout):
    experience, *rest = rollout
    for values, share in ((experience.returns, 1.0), (0 * experience.returns, 0.0), (-experience.returns, -3.0)):
        row = row_of(dataclasses.replace(experience, values=values), *rest, UPDATES)
        assert row["explained_variance"] == pytest.approx(share, abs=1e-5)
