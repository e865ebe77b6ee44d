"""The losses. Each returns (loss, metrics); sums over tokens are divided by `tokens`, the real tokens of the **global**
batch, so neither gradient accumulation nor the number of ranks changes a loss. So are the metrics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(logprobs: Tensor, tokens: float | Tensor) -> tuple[Tensor, dict]:
    """Cross-entropy of response tokens from their log-probabilities (any shape)."""
    loss = -logprobs.sum() / tokens
    return loss, {"loss": loss.detach()}


def preference_loss(scores_chosen: Tensor, scores_rejected: Tensor, pairs: float | Tensor) -> tuple[Tensor, dict]:
    """-log sigmoid(s_chosen - s_rejected) over (B,) pairs; Bradley-Terry, Ouyang et al. 2022 eq. 1."""
    margin = scores_chosen - scores_rejected
    loss = -F.logsigmoid(margin).sum() / pairs
    metrics = {"loss": loss, "accuracy": ((margin > 0).float() + 0.5 * (margin == 0)).sum() / pairs,
               "margin": margin.sum() / pairs}
    return loss, {name: value.detach() for name, value in metrics.items()}


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, beta: float, pairs: float | Tensor) -> tuple[Tensor, dict]:
    """`preference_loss` of the implicit rewards beta * (log pi - log pi_ref) of whole responses (2B,), the chosen ones
    first. Rafailov et al. 2023 (2305.18290), eq. 7."""
    chosen, rejected = (beta * (logprobs - ref_logprobs)).chunk(2)
    return preference_loss(chosen, rejected, pairs)


def policy_loss(new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
                tokens: float | Tensor, clip_range_high: float = 0.0, dual_clip: float = 0.0) -> tuple[Tensor, dict]:
    """The clipped surrogate -min(ratio A, clip(ratio) A) over (B, A). Schulman et al. 2017 (1707.06347), eq. 7.

    `clip_range_high` lets the ratio rise further than it may fall (DAPO, Yu et al. 2025, 2503.14476); 0 is clip_range.
    With `dual_clip` a bad token counts at most so many times, however far its ratio has risen (Ye et al. 2020,
    1912.09729, eq. 5); 0 is off.
    """
    high = clip_range_high or clip_range
    log_ratio = (new_logprobs - logprobs) * mask
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages
    kept = torch.minimum(unclipped, clipped)
    if dual_clip:
        kept = torch.maximum(kept, dual_clip * advantages.clamp(max=0))
    loss = -(kept * mask).sum() / tokens
    metrics = {"policy_loss": loss, "approx_kl": ((ratio - 1 - log_ratio) * mask).sum() / tokens,
               "clip_fraction": ((kept != unclipped) & mask).sum() / tokens, "ratio_max": (ratio * mask).max()}
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, clip_range: float,
               tokens: float | Tensor) -> tuple[Tensor, dict]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) over (B, A), V_clipped within +-clip_range of the rollout's value."""
    clipped = values + (new_values - values).clamp(-clip_range, clip_range)
    errors, clipped_errors = (new_values - returns).square(), (clipped - returns).square()
    loss = 0.5 * (torch.maximum(errors, clipped_errors) * mask).sum() / tokens
    metrics = {"value_loss": loss, "value_clip_fraction": ((clipped_errors > errors) & mask).sum() / tokens}
    return loss, {name: value.detach().float() for name, value in metrics.items()}
