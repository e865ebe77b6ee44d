"""From scores to advantages: KL penalty, per-token rewards, GAE and whitening. Nothing mutates its arguments."""

import torch
from torch import Tensor


def clip_scores(scores: Tensor, finished: Tensor, clip: float, missing_eos_score: float | None) -> Tensor:
    """(B,) scores clipped to +-clip (0: not at all); a response without EOS gets `missing_eos_score` unless None."""
    clipped = scores.clamp(-clip, clip) if clip > 0 else scores
    if missing_eos_score is None:
        return clipped
    return torch.where(finished, clipped, torch.full_like(clipped, missing_eos_score))


def compute_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(B, A) rewards: -kl_coef * (logprob - ref_logprob) at each real token, the score added at the last of them.

    Ouyang et al. 2022 (2203.02155), eq. 2; the per-token form is that of Stiennon et al. 2020.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1
    at_last = torch.zeros_like(rewards).scatter(1, last.clamp(min=0)[:, None], scores[:, None].to(rewards.dtype))
    return rewards + at_last * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, A), zero outside the mask. Real tokens stand first in each row.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; the value after the last real token
    is 0. Schulman et al. 2016 (1506.02438), eq. 16.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    following, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def group_advantages(rewards: Tensor, mask: Tensor, samples: int, normalise: bool) -> Tensor:
    """(B, A): a response's whole reward, its KL penalty included, against the other responses to its prompt.

    Rows b, b + B / samples, b + 2 B / samples, ... answer one prompt. Plain, it is the reward less the mean of the
    others, RLOO (Ahmadian et al. 2024, 2402.14740); normalised, (reward - mean) / deviation of the group, GRPO (Shao et
    al. 2024, 2402.03300), whose per-prompt scale changes what each prompt counts.
    """
    totals = (rewards * mask).sum(1).view(samples, -1)
    centred = totals - totals.mean(0)
    if normalise:
        centred = centred / (totals.std(0, correction=0) + 1e-4)
    else:
        centred = centred * samples / (samples - 1)
    return centred.view(-1, 1) * mask


ADVANTAGES = {
    "gae": lambda rewards, values, mask, ppo: gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda),
    "reinforce": lambda rewards, values, mask, ppo: gae(rewards, values * 0, mask, ppo.gamma, 1.0),
    "rloo": lambda rewards, values, mask, ppo: (
        group_advantages(rewards, mask, ppo.samples_per_prompt, normalise=False), values * 0),
    "grpo": lambda rewards, values, mask, ppo: (
        group_advantages(rewards, mask, ppo.samples_per_prompt, normalise=True), values * 0),
}
"""ppo.advantage -> (advantages, returns). All are whitened afterwards: that is reinforce's baseline, the batch's mean.
The KL stands in the reward, so gae, reinforce and rloo aim at the KL-regularised optimum, grpo too where all prompts
have one spread of rewards; GRPO as published, with the k3 estimate as a loss, does not (`dschat verify --methods`)."""


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares over the mask. Summed over ranks, they are those of the whole."""
    kept = x[mask].double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8), population variance, from `moments`; shift_mean=False adds the mean again."""
    count, total, squares = moments.unbind()
    mean = total / count
    scale = torch.rsqrt((squares / count - mean.square()).clamp(min=0) + 1e-8)
    white = (x - mean) * scale if shift_mean else (x - mean) * scale + mean
    return (white * mask).to(x.dtype)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """(B,) estimates of KL(policy || ref) a response, in nats, from tokens sampled by the policy.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d with d = logprob - ref_logprob. For logging: as a loss term their
    gradients are not that of the KL (see docs of notebook 04). Schulman, "Approximating KL divergence", 2020.
    """
    d = (logprobs - ref_logprobs) * mask
    return {"k1": d.sum(1), "k2": d.square().sum(1) / 2, "k3": ((-d).exp() - 1 + d).sum(1)}


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """kl_coef after a rollout of so many responses with `kl` nats each: up where it is above the target, by at most a
    fifth in `horizon` responses. Ziegler et al. 2019 (1909.08593), section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)
