"""The line that PPO writes each iteration, and the numbers it ends with: every mean is over the real tokens or
responses of all ranks."""

import time

import deepspeed
import torch

from dschat_kit.engine.rollout_types import KitBatch
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.rewards import kl_estimates, masked_moments
from dschat_kit.rlhf.rollout import Roles, Scored
from dschat_kit.train.prompts import reused
from dschat_kit.train.telemetry import forward_flop, peak_memory_mb


class Clock:
    """Seconds of the parts of an iteration, and the peak memory of each in MB."""

    def __init__(self):
        self.seconds, self.memory, self._last = {}, {}, time.perf_counter()
        peak_memory_mb()

    def lap(self, name: str) -> None:
        """Everything since the last lap belongs to `name`."""
        deepspeed.get_accelerator().synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self.memory[name] = peak_memory_mb()

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def row(self, session, tokens: float) -> dict:
        """The metrics of time and memory, the worst of all ranks; `tokens` are the response tokens of all ranks."""
        seconds = dict(zip(self.seconds, session.largest(*self.seconds.values()), strict=True))
        memory = dict(zip(self.memory, session.largest(*self.memory.values()), strict=True))
        return {f"seconds_{name}": value for name, value in seconds.items()} | {
            f"memory_mb_{name}": value for name, value in memory.items()} | {
            "peak_memory_mb": max(memory.values()), "tokens_per_second": tokens / sum(seconds.values())}


def add_metrics(totals: dict[str, float], metrics: dict) -> dict[str, float]:
    """Sums of the parts that micro batches contribute to a mean; of `ratio_max` the largest."""
    found = {name: float(value) for name, value in metrics.items()}
    return {name: max(totals.get(name, 0.0), value) if name == "ratio_max" else totals.get(name, 0.0) + value
            for name, value in found.items()}


def over_ranks(session, updates: list[dict]) -> list[dict]:
    """The metrics of optimiser steps from each rank's parts, in two exchanges for all of them: parts of means are
    added, of `ratio_max` the largest counts, and every rank knows the gradients' norms."""
    parts = [name for name in updates[0] if name != "ratio_max" and not name.startswith("grad_norm")]
    sums = iter(session.sum(*(update[name] for update in updates for name in parts)))
    highest = session.largest(*(update["ratio_max"] for update in updates))
    return [update | {name: next(sums) for name in parts} | {"ratio_max": largest}
            for update, largest in zip(updates, highest, strict=True)]


def rollout_metrics(session, experience: Experience, scored: Scored, batch: KitBatch, updates: list[dict]) -> dict:
    """Metrics of one iteration. Rollout figures are of the sampled batch; those of the updates are means over the
    optimiser steps, except ratio_max (the largest)."""
    mask, every = experience.response_mask, torch.ones_like(batch.finished)
    kl = kl_estimates(experience.logprobs, experience.ref_logprobs, mask)
    moments = torch.stack([masked_moments(scored.scores, every), masked_moments(kl["k1"], every),
                           masked_moments(kl["k3"], every), masked_moments(mask.sum(1), every),
                           masked_moments(batch.finished, every),
                           masked_moments(scored.entropy, mask), masked_moments(experience.returns, mask),
                           masked_moments(experience.returns - experience.values, mask),
                           masked_moments(kl["k2"], every), masked_moments(experience.advantages, mask),
                           masked_moments(-scored.logprobs, mask)])
    count, total, squares = session.sum_tensor(moments).unbind(1)
    mean, variance = (total / count).tolist(), (squares / count - (total / count).square()).clamp(min=0).tolist()
    apart = ((scored.logprobs - batch.logprobs) * mask).abs().max()
    highest, negated_lowest, apart = session.largest(float(scored.scores.max()), -float(scored.scores.min()),
                                                     float(apart))
    row = {"score_mean": mean[0], "score_std": variance[0] ** 0.5, "score_min": -negated_lowest, "score_max": highest,
           "kl": mean[1], "kl_k2": mean[8], "kl_k3": mean[2], "response_length": mean[3], "eos_rate": mean[4],
           "entropy": mean[5], "surprisal": mean[10], "advantage_std": variance[9] ** 0.5, "tokens": float(total[3])}
    if reused(session.pipeline, batch) is None:
        row["sampler_gap"] = apart  # else nobody has computed them a second time
    if "value_loss" in updates[0]:
        row["explained_variance"] = 1 - variance[7] / max(variance[6], 1e-12)
    for name in updates[0]:
        values = [update[name] for update in updates]
        row[name] = max(values) if name == "ratio_max" else sum(values) / len(values)
    first = updates[0]
    return row | {"first_ratio_max": first["ratio_max"], "first_approx_kl": first["approx_kl"]}


def work_of(roles: Roles, batch: KitBatch, ppo_epochs: int, adapters: bool) -> float:
    """FLOP that an iteration needs on this rank: every answer is generated, scored by ref, reward model and critic, and
    passed through actor and critic forward and backward in each epoch. The actor's own scoring could be spared."""
    lengths, answered = batch.attention_mask.sum(1), batch.response_mask.sum(1)
    causal, scalar = forward_flop(roles.ref, lengths, answered), forward_flop(roles.reward, lengths, 0 * answered)
    critic = scalar if roles.critic is not None else 0.0
    return 2 * causal + scalar + critic + ppo_epochs * (2 if adapters else 3) * (causal + critic)


def summary(before: dict, after: dict, state: dict, steps: int) -> dict:
    """The numbers of result.json."""
    spent = sum(state["seconds"].values())
    result = {"score_before": before["score"], "score_after": after["score"], "kl": after["kl"],
              "response_length_before": before["tokens"], "response_length_after": after["tokens"],
              "eos_rate_before": before["finished"], "eos_rate_after": after["finished"],
              "eval_prompts": after["prompts"], "lm_loss_before": before["lm_loss"], "lm_loss_after": after["lm_loss"],
              "steps": steps, "tokens_per_second": state["tokens"] / max(spent, 1e-9), "seconds": state["seconds"]}
    if "gold" in after:
        gain = after["gold"] - before["gold"]
        result |= {"gold_before": before["gold"], "gold_std_before": before["gold_std"], "gold_after": after["gold"],
                   "gold_std_after": after["gold_std"],
                   "gold_gain_in_std": gain / before["gold_std"] if before["gold_std"] > 0 else None,
                   "gold_parts_before": before["gold_parts"],
                   "gold_parts_after": after["gold_parts"]}
    return result
