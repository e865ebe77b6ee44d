"""Worlds small enough to list every answer, so that PPO's optimum is known: pi* ~ pi_ref exp(r / beta).

The value E[r] - beta KL(pi || pi_ref) is at most beta log Z, reached by pi* alone. Everything here is float64.
Shapes: P prompts, N answers, L the longest answer, V vocabulary. Tokens V, V+1, ... stand for the prompts; prompt p is
its token p + 1 times, so that prompts have different lengths. Source: Ziegler et al. 2019 (1909.08593), eq. 2-4.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from dschat_kit.rlhf.rewards import kl_estimates


@dataclass(frozen=True)
class World:
    """A reference table and a reward, drawn from `seed`.

    bandit: one token, normal rewards. bigram: up to L tokens, reward = count of token p + 1 less count of token p + 2.
    With `eos` the last token of the vocabulary ends an answer; without, all have L tokens.
    """
    kind: str = "bigram"
    vocab: int = 4
    length: int = 3
    seed: int = 0
    eos: bool = False
    prompts: int = 1

    @cached_property
    def table(self) -> Tensor:
        """(V + P, V) log-probabilities of the next token; the last P rows are those of the first token."""
        rows = self.prompts + (self.vocab if self.kind == "bigram" else 0)
        logits = torch.from_numpy(np.random.default_rng(self.seed).normal(size=(rows, self.vocab)))
        return torch.cat([torch.zeros(self.vocab + self.prompts - rows, self.vocab).double(), logits]).log_softmax(-1)

    @cached_property
    def token_rewards(self) -> Tensor:
        """(P, V) what each token adds to the reward."""
        if self.kind == "bandit":  # drawn after the table
            return torch.from_numpy(np.random.default_rng(self.seed).normal(size=(2, self.prompts, self.vocab))[1])
        rewards = torch.zeros(self.prompts, max(self.vocab, 3)).double()
        for p in range(self.prompts):
            rewards[p, (p + 1) % rewards.shape[1]] += 1
            rewards[p, (p + 2) % rewards.shape[1]] -= 1
        return rewards[:, :self.vocab]

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """(tokens (N, L), mask (N, L)) of every answer."""
        tokens = torch.tensor(list(itertools.product(range(self.vocab), repeat=self.length)))
        ends = (tokens == self.vocab - 1) if self.eos else torch.zeros_like(tokens).bool()
        mask = (ends.cumsum(1) - ends.long()) == 0
        tokens, first = torch.unique(torch.where(mask, tokens, 0), dim=0, return_inverse=True)
        kept = torch.zeros(len(tokens), self.length, dtype=torch.bool)
        kept[first] = mask
        return tokens, kept

    @cached_property
    def rewards(self) -> Tensor:
        """(P, N)"""
        tokens, mask = self.answers
        return (self.token_rewards[:, tokens] * mask).sum(-1)

    @cached_property
    def reference(self) -> Tensor:
        """(P, N) log-probabilities of whole answers."""
        tokens, mask = self.answers
        starts = self.vocab + torch.arange(self.prompts)[:, None, None].expand(-1, len(tokens), 1)
        before = torch.cat([starts, tokens[None, :, :-1].expand(self.prompts, -1, -1)], dim=-1)
        return (self.table[before, tokens[None]] * mask).sum(-1)

    def best(self, beta: float) -> Tensor:
        """(P, N) log-probabilities of the optimum."""
        return (self.reference + self.rewards / beta).log_softmax(-1)

    def frontier(self) -> list[tuple[float, float]]:
        """(KL, E[r]) of the optima from beta 20 down to 0.05: no policy has more reward at its KL."""
        points = [reached(self, self.best(float(beta)), float(beta)) for beta in np.geomspace(20, 0.05, 40)]
        return [(point["optimal_kl"], point["optimal_reward"]) for point in points]

    def highest_reward(self, kl: float) -> float:
        """E[r] of the frontier at this KL, which no policy exceeds: the least of its tangents beta log Z + beta kl, a
        convex function of beta, found by thirds."""
        def tangent(log_beta: float) -> float:
            beta = math.exp(log_beta)
            return beta * (float((self.reference + self.rewards / beta).logsumexp(-1).mean()) + kl)

        low, high = math.log(1e-2), math.log(1e4)
        for _ in range(80):
            third = (high - low) / 3
            low, high = (low, high - third) if tangent(low + third) < tangent(high - third) else (low + third, high)
        return tangent((low + high) / 2)

    def prompt_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, mask), both (B, P): the prompts `rows` (B,), padded on the left."""
        mask = torch.arange(self.prompts) >= self.prompts - 1 - rows[:, None]
        return torch.where(mask, self.vocab + rows[:, None], 0), mask

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequences (P N, T), attention_mask (P N, T), response_mask (P N, L)) of every prompt with every answer."""
        tokens, mask = (part.repeat(self.prompts, 1) for part in self.answers)
        prompts, prompt_mask = self.prompt_batch(torch.arange(self.prompts).repeat_interleave(len(self.answers[0])))
        return torch.cat([prompts, tokens], dim=1), torch.cat([prompt_mask, mask], dim=1), mask


class WorldReward(nn.Module):
    """The world's reward in the place of a reward model: at each position that of the answer so far."""

    def __init__(self, world: World):
        super().__init__()
        self.vocab, self.prompts = world.vocab, world.prompts
        self.register_buffer("token_rewards", torch.cat([world.token_rewards,
                                                         torch.zeros(world.prompts, world.prompts)], 1).float())

    def forward(self, sequences: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) scores. Rows that begin in the first column need no mask."""
        attention_mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        prompt = (sequences * attention_mask).amax(1) - self.vocab
        return (self.token_rewards[prompt[:, None], sequences] * attention_mask).cumsum(1)


def reached(world: World, logprobs: Tensor, beta: float) -> dict[str, float]:
    """Exact figures of a policy, (P, N) log-probabilities of whole answers, as means over the prompts.

    gap_closed = 1 - KL(pi || pi*) / KL(pi_ref || pi*), the share of the possible gain in value. beta_hat = var(r) /
    cov(r, log pi / pi_ref) under the policy: beta at the optimum, in first order of every error.
    """
    def mean(x: Tensor, logs: Tensor = logprobs) -> Tensor:
        return (logs.exp() * x).sum(-1)  # (P,)

    reference, rewards, best = world.reference, world.rewards, world.best(beta)
    centred, away = rewards - mean(rewards)[:, None], logprobs - reference
    value = beta * (reference + rewards / beta).logsumexp(-1)
    figures = {"reference_reward": mean(rewards, reference), "optimal_value": value,
               "optimal_reward": mean(rewards, best), "optimal_kl": mean(best - reference, best),
               "reached_reward": mean(rewards), "reached_kl": mean(away),
               "reached_value": mean(rewards) - beta * mean(away)}
    lost, first = mean(logprobs - best), mean(reference - best, reference)
    spread, moved = mean(centred.square()), mean(centred * (away - mean(away)[:, None]))
    return {name: float(value.mean()) for name, value in figures.items()} | {
        "gap_closed": 1 - float(lost.sum() / first.sum()), "beta_hat": float(spread.sum() / moved.sum())}


def best_of_n(world: World, n: int) -> Tensor:
    """(P, N) log-probabilities of the best of n reference answers: the baseline that needs no training.

    An answer is taken where none of the n is better and one is this: F(r)^n - F(r-)^n, shared by answers that tie. The
    KL is at most log n - (n - 1) / n (Beirami et al. 2024, 2401.01879).
    """
    below = torch.stack([(world.reference.exp() * (world.rewards < world.rewards[:, i:i + 1] - 1e-9)).sum(-1)
                         for i in range(world.rewards.shape[1])], dim=-1)
    tied = torch.stack([(world.reference.exp() * ((world.rewards - world.rewards[:, i:i + 1]).abs() <= 1e-9)).sum(-1)
                        for i in range(world.rewards.shape[1])], dim=-1)
    chosen = (below + tied).clamp(max=1) ** n - below ** n
    return (world.reference - tied.log() + chosen.clamp(min=1e-300).log()).log_softmax(-1)


def kl_gradients(seed: int = 0, arms: int = 10) -> dict[str, list[float]]:
    """Expected gradients over all arms of a bandit, by the policy's logits: of KL(policy || ref), and of its estimates
    as a loss term or as a charge in the reward. Two of them may be used."""
    ref = World("bandit", arms, 1, seed).reference[0]
    logits = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=arms)).requires_grad_()
    logprobs = logits.log_softmax(0)
    p, estimates = logprobs.detach().exp(), kl_estimates(logprobs[:, None], ref[:, None], torch.ones(arms, 1).bool())
    losses = {"true KL": (logprobs.exp() * (logprobs - ref)).sum(),
              "k1 in the reward": (p * estimates["k1"].detach() * logprobs).sum(),
              **{f"{name} as a loss": (p * estimate).sum() for name, estimate in estimates.items()},
              "KL(ref || policy)": (ref.exp() * (ref - logprobs)).sum()}
    return {name: torch.autograd.grad(loss, logits, retain_graph=True)[0].tolist() for name, loss in losses.items()}
