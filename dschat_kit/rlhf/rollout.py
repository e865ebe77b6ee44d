"""Sampled responses -> Experience: the four roles look at the same sequences, then rewards and advantages follow."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dschat_kit.config import Ppo
from dschat_kit.models.loading import response_logits
from dschat_kit.models.scalar_model import last_token
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.losses import entropy_of, token_logprobs
from dschat_kit.rlhf.rewards import clip_scores, compute_rewards, gae, masked_moments, whiten

__all__ = ["Scored", "make_experience", "score_responses"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What actor, ref, critic and reward model say about B sequences; see Experience for the names."""
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    scores: Tensor


@torch.no_grad()
def score_responses(sequences: Tensor, attention_mask: Tensor, response_length: int, *, actor: nn.Module, ref: nn.Module,
                    reward: nn.Module, critic: nn.Module | None, temperature: float, micro_batch_size: int) -> Scored:
    """One pass of each role over (B, T) sequences, a few rows at a time. Values stand one position before their token:
    V(s_t) is read where token t is predicted. Without a critic there are no values."""
    parts, A = [], response_length
    for start in range(0, sequences.shape[0], micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        tokens, mask = sequences[rows], attention_mask[rows]
        logits = response_logits(actor, tokens, mask, A)
        ref_logits = response_logits(ref, tokens, mask, A)
        parts.append(Scored(
            logprobs=token_logprobs(logits, tokens[:, -A:], temperature), entropy=entropy_of(logits, temperature),
            ref_logprobs=token_logprobs(ref_logits, tokens[:, -A:], temperature),
            values=critic(tokens, mask)[:, -A - 1:-1] if critic is not None else None,
            scores=last_token(reward(tokens, mask), mask)))
    return Scored(**{name: None if value is None else torch.cat([getattr(part, name) for part in parts])
                     for name, value in vars(parts[0]).items()})


def make_experience(sequences: Tensor, attention_mask: Tensor, response_mask: Tensor, finished: Tensor, scored: Scored,
                    settings: Ppo, kl_coef: float, global_sum: Callable[[Tensor], Tensor]) -> Experience:
    """Rewards, advantages and returns. `global_sum` adds a tensor over ranks: advantages are whitened over all of them."""
    scores = clip_scores(scored.scores, finished, settings.score_clip, settings.missing_eos_score)
    rewards = compute_rewards(scores, scored.logprobs, scored.ref_logprobs, response_mask, kl_coef)
    advantages, returns = gae(rewards, scored.values, response_mask, settings.gamma, settings.gae_lambda)
    moments = global_sum(masked_moments(advantages, response_mask))
    return Experience(sequences=sequences, attention_mask=attention_mask, response_mask=response_mask,
                      logprobs=scored.logprobs, ref_logprobs=scored.ref_logprobs, values=scored.values, scores=scores,
                      rewards=rewards, advantages=whiten(advantages, response_mask, moments), returns=returns)
