"""Sampled responses -> Experience: the four roles look at the same sequences, then rewards and advantages follow."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dschat_kit.config import Ppo
from dschat_kit.models.scalar_model import response_scores, response_values
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.rlhf.rewards import ADVANTAGES, clip_scores, compute_rewards, masked_moments, whiten


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The four models of PPO, plain or inside an engine."""
    actor: nn.Module
    """the policy that is trained; starts as the SFT model"""
    critic: nn.Module | None
    """predicts the return before each token, trained; starts as the reward model. None where no advantage asks it"""
    ref: nn.Module
    """the frozen SFT model, from which the actor shall not move far"""
    reward: nn.Module
    """the frozen reward model"""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the roles say about B sequences; see Experience for the names."""
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    """(B, A) of the actor's next-token distribution, in nats"""
    values: Tensor
    scores: Tensor


@torch.no_grad()
def score_responses(roles: Roles, sequences: Tensor, attention_mask: Tensor, response_length: int, temperature: float,
                    micro_batch_size: int, sampled: tuple[Tensor, Tensor] | None = None) -> Scored:
    """One pass of each role over (B, T) sequences, micro_batch_size rows of similar length at a time.

    `sampled` holds the sampler's (logprobs, entropy), each (B, A), where they are to be used again: the actor's pass is
    then left out. Sequences are prompts padded on the left with responses padded on the right.
    """
    order, parts, A = attention_mask.sum(1).argsort(stable=True), [], response_length
    for rows in order.split(micro_batch_size):
        tokens, mask = sequences[rows], attention_mask[rows]
        logprobs, entropy = ([part[rows] for part in sampled] if sampled else
                             response_logprobs(roles.actor, tokens, mask, A, temperature))
        parts.append(Scored(logprobs=logprobs, entropy=entropy,
                            ref_logprobs=response_logprobs(roles.ref, tokens, mask, A, temperature)[0],
                            values=response_values(roles.critic, tokens, mask, A) if roles.critic is not None else
                            torch.zeros(tokens.shape[0], A, device=tokens.device),
                            scores=response_scores(roles.reward, tokens, mask)))
    back = order.argsort()
    return Scored(**{name: torch.cat([getattr(part, name) for part in parts])[back] for name in vars(parts[0])})


def make_experience(sequences: Tensor, attention_mask: Tensor, response_mask: Tensor, finished: Tensor, scored: Scored,
                    settings: Ppo, global_sum: Callable[[Tensor], Tensor]) -> Experience:
    """Rewards, advantages and returns. `global_sum` adds a tensor over ranks: advantages are whitened over all."""
    scores = clip_scores(scored.scores, finished, settings.score_clip, settings.missing_eos_score)
    rewards = compute_rewards(scores, scored.logprobs, scored.ref_logprobs, response_mask, settings.kl_coef)
    if settings.whiten_rewards:
        moments = global_sum(masked_moments(rewards, response_mask))
        rewards = whiten(rewards, response_mask, moments, shift_mean=False)
    advantages, returns = ADVANTAGES[settings.advantage](rewards, scored.values, response_mask, settings)
    moments = global_sum(masked_moments(advantages, response_mask))
    return Experience(sequences=sequences, attention_mask=attention_mask, response_mask=response_mask,
                      logprobs=scored.logprobs, ref_logprobs=scored.ref_logprobs, values=scored.values, scores=scores,
                      rewards=rewards, advantages=whiten(advantages, response_mask, moments), returns=returns)
