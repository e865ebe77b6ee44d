"""From four roles to an Experience: what they see does not depend on padding, micro batches or ranks."""

import dataclasses

import pytest
import torch
from references import response_logits, token_logprobs
from test_decode import request, run
from tiny_models import SETTINGS, causal_lm, folder

from dschat_kit.config import Ppo
from dschat_kit.models.scalar_model import last_token, load_scalar_model
from dschat_kit.rlhf.losses import policy_loss
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses

PPO = Ppo(kl_coef=0.3, missing_eos_score=-3.0)


def alone(tensor):
    return tensor


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    path = folder(tmp_path_factory.mktemp("model"))
    return Roles(actor=causal_lm(seed=0), ref=causal_lm(seed=1),
                 critic=load_scalar_model(path, SETTINGS, 2, new_head=True),
                 reward=load_scalar_model(path, SETTINGS, 3, new_head=True))


@pytest.fixture(scope="module")
def batch(roles):
    return run(roles.actor, request(lengths=(3, 6, 4, 6, 5, 2)))


def scored_of(roles, batch, micro=2, temperature=1.0):
    return score_responses(roles, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1], temperature,
                           micro)


def experience_of(roles, batch, global_sum=alone, **how):
    return make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished,
                           scored_of(roles, batch, **how), PPO, global_sum)


def test_micro_batches_change_nothing(roles, batch):
    one, six = (vars(scored_of(roles, batch, micro)) for micro in (1, 6))
    for name in one:
        mask = batch.response_mask if one[name].dim() == 2 else slice(None)
        assert torch.allclose(one[name][mask], six[name][mask], atol=1e-5), name


def test_left_padding_changes_nothing(roles, batch):
    padded = dataclasses.replace(batch, input_ids=torch.nn.functional.pad(batch.input_ids, (4, 0)),
                                 attention_mask=torch.nn.functional.pad(batch.attention_mask, (4, 0)))
    narrow, wide = vars(scored_of(roles, batch)), vars(scored_of(roles, padded))
    for name in narrow:
        mask = batch.response_mask if narrow[name].dim() == 2 else torch.ones(6, dtype=torch.bool)
        assert torch.allclose(narrow[name][mask], wide[name][mask], atol=1e-5), name


def test_each_role_says_its_own(roles, batch):
    scored, A = scored_of(roles, batch), batch.response_mask.shape[1]
    assert torch.allclose(scored.logprobs * batch.response_mask, batch.logprobs, atol=1e-4)
    assert not torch.allclose(scored.ref_logprobs, scored.logprobs, atol=0.1)
    with torch.no_grad():
        assert torch.allclose(scored.scores, last_token(roles.reward(batch.input_ids, batch.attention_mask),
                                                        batch.attention_mask), atol=1e-5)
        values = roles.critic(batch.input_ids, batch.attention_mask)[:, -A - 1:-1]
        assert torch.allclose(scored.values[batch.response_mask], values[batch.response_mask], atol=1e-5)


def test_the_sampler_is_believed_where_its_logprobs_are_handed_over(roles, batch):
    again = scored_of(roles, batch)
    A = batch.response_mask.shape[1]
    handed = score_responses(dataclasses.replace(roles, actor=None), batch.input_ids, batch.attention_mask, A, 1.0, 2,
                             sampled=(batch.logprobs, batch.entropy))
    assert torch.equal(handed.logprobs, batch.logprobs) and torch.equal(handed.entropy, batch.entropy)
    assert torch.allclose(handed.logprobs, again.logprobs, atol=1e-5)
    assert torch.allclose(handed.entropy, again.entropy, atol=1e-4)
    assert torch.equal(handed.ref_logprobs, again.ref_logprobs)


def test_temperature_reaches_actor_and_ref(roles, batch):
    cold, A = scored_of(roles, batch, temperature=0.5), batch.response_mask.shape[1]
    for model, found in ((roles.actor, cold.logprobs), (roles.ref, cold.ref_logprobs)):
        with torch.no_grad():
            logits = response_logits(model, batch.input_ids, batch.attention_mask, A)
        expected = token_logprobs(logits / 0.5, batch.input_ids[:, -A:]) * batch.response_mask
        assert torch.allclose(found, expected, atol=1e-4)


def test_first_minibatch_has_ratio_1_and_a_policy_equal_to_ref_has_no_kl(roles, batch):
    experience = experience_of(dataclasses.replace(roles, ref=causal_lm(seed=0)), batch)
    assert torch.equal(experience.logprobs, experience.ref_logprobs)
    for part in experience.select([5, 0, 3, 1]).split(2):
        A = part.response_mask.shape[1]
        logits = response_logits(roles.actor, part.sequences, part.attention_mask, A)
        _, metrics = policy_loss(token_logprobs(logits, part.sequences[:, -A:]), part.logprobs, part.advantages,
                                 part.response_mask, 0.2, part.response_mask.sum())
        assert abs(float(metrics["ratio_max"]) - 1) < 1e-5 and abs(float(metrics["approx_kl"])) < 1e-5


def test_rewards_are_scores_less_the_kl_penalty(roles, batch):
    experience, mask = experience_of(roles, batch), batch.response_mask
    expected_scores = torch.where(batch.finished, scored_of(roles, batch).scores.clamp(-5, 5), torch.tensor(-3.0))
    assert torch.allclose(experience.scores, expected_scores)
    kl = ((experience.logprobs - experience.ref_logprobs) * mask).sum(1)
    assert torch.allclose(experience.rewards.sum(1), expected_scores - 0.3 * kl, atol=1e-4)


@pytest.mark.parametrize("global_sum", [alone, lambda moments: 3 * moments + torch.tensor([0.0, 0.0, 40.0])],
                         ids=["one rank", "others too"])
def test_rewards_are_whitened_without_a_shift_of_their_mean_over_all_ranks(roles, batch, global_sum):
    """Divided by the deviation over all ranks about the mean, which stays: a shift would pay for length."""
    def with_rewards(whiten):
        return make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished,
                               scored_of(roles, batch), dataclasses.replace(PPO, whiten_rewards=whiten), global_sum)

    plain, white = with_rewards(False), with_rewards(True)
    real = plain.rewards[batch.response_mask].double()
    count, total, squares = global_sum(torch.stack([torch.tensor(len(real)).double(), real.sum(),
                                                    real.square().sum()])).tolist()
    mean = total / count
    expected = ((real - mean) / (squares / count - mean ** 2) ** 0.5 + mean).float()
    assert torch.allclose(white.rewards[batch.response_mask], expected, atol=1e-4)
    assert not white.rewards[~batch.response_mask].any() and abs(mean) > 0.01


def test_advantages_are_whitened_over_all_ranks(roles, batch):
    """Two halves that share their sums must equal the whole."""
    whole = experience_of(roles, batch)
    kept = whole.advantages[batch.response_mask].double()
    assert abs(float(kept.mean())) < 1e-5 and abs(float(kept.square().mean()) - 1) < 1e-3
    moments = []
    experience_of(roles, batch, global_sum=lambda m: moments.append(m) or m)
    names = ("input_ids", "attention_mask", "response_mask", "logprobs", "entropy", "finished", "response_start_idx")
    for half in (slice(0, 3), slice(3, 6)):
        part = dataclasses.replace(batch, **{name: getattr(batch, name)[half] for name in names})
        shared = experience_of(roles, part, global_sum=lambda _: moments[0])
        assert torch.allclose(shared.advantages, whole.advantages[half], atol=1e-4)
        assert not torch.allclose(experience_of(roles, part).advantages, whole.advantages[half], atol=1e-2)
