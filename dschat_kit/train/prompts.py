"""Prompts in, sampled and scored responses out: the feed of PPO, and a look at held-out prompts before and after."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dschat_kit.config import Pipeline, Ppo
from dschat_kit.data.datasets import (
    PromptBatch,
    SequenceBatch,
    StepSampler,
    TokenRows,
    chunks,
    pad_prompts,
    rank_share,
    sft_batch,
)
from dschat_kit.data.sources import gold_of
from dschat_kit.data.splits import epoch_order
from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling
from dschat_kit.models.scalar_model import response_scores
from dschat_kit.rlhf.rewards import kl_estimates
from dschat_kit.rlhf.rollout import Roles, Scored, score_responses
from dschat_kit.runs import open_run, read_json
from dschat_kit.train import sft


@dataclass(frozen=True)
class Prompts:
    """One rank's prompts of a rollout."""
    batch: PromptBatch
    sources: list[str]
    request: KitRequest


class PromptFeed:
    """Which prompts iteration `step` asks, on this rank; a pure function of (seed, step)."""

    def __init__(self, rows: TokenRows, batch_size: int, seed: int, pad_id: int, session, unique: bool = False,
                 samples: int = 1):
        self.rows, self.keep, self.seed, self.pad_id, self.session = rows, np.arange(len(rows)), seed, pad_id, session
        if unique:  # the first row of each prompt
            self.keep = np.sort(list({text: i for i, text in reversed(list(enumerate(rows.table["prompt"])))}.values()))
        self.count, self.unique, self.samples = batch_size, unique, samples

    def at(self, step: int) -> Prompts:
        """The prompts of one step. Rows are seeded by their place in the global batch: rank count changes nothing.

        With several samples the prompts come so many times one after another, so that all of one are on one rank.
        """
        world, size = self.session.world_size, -(-self.count // self.session.world_size) * self.session.world_size
        mine = rank_share(np.arange(size), self.session.rank, world)
        asked = size // self.samples
        epochs, picks = np.divmod(step * asked + mine % asked, len(self.keep))
        if not self.unique:  # else all in order; more answers than prompts: several of each, with other random numbers
            for epoch in np.unique(epochs):
                there = epochs == epoch
                picks[there] = epoch_order(len(self.keep), self.seed, epoch)[picks[there]]
        indices = self.keep[picks]
        some = self.rows.take(indices)
        batch = pad_prompts(some, self.pad_id)
        seeds = [(self.seed * 1_000_003 + step * size + place) * 2 + self.unique for place in mine.tolist()]
        request = KitRequest(prompt_ids=batch.prompt_ids.to(self.session.device), row_seeds=torch.tensor(seeds),
                             prompt_attention_mask=batch.attention_mask.to(self.session.device))
        return Prompts(batch, [row["source"] for row in some], request)


def text_rows(data: Path, held_out: bool = False) -> TokenRows:
    """What mixture training goes on to learn from, or is measured on: plain text where the sources have any, else the
    rows of SFT or the held-out ones."""
    part, otherwise = ("ptx_eval", "eval") if held_out else ("ptx", "sft")
    return TokenRows(data, part if (data / "rows" / f"{part}.npy").exists() else otherwise)


class TextFeed:
    """Text rows that the actor goes on to learn from at optimiser step k; a pure function of (seed, k)."""

    def __init__(self, rows: TokenRows, settings: Ppo, seed: int, pad_id: int, session):
        self.rows, self.pad_id, self.session, self.size = rows, pad_id, session, settings.micro_batch_size
        self.sampler = StepSampler(rows=len(rows), batch_size=settings.mini_batch_size, seed=seed)

    def at(self, step: int) -> list[SequenceBatch]:
        """This rank's rows, as many as a minibatch has, in micro batches."""
        mine = self.rows.take(self.sampler.share(step, self.session.rank, self.session.world_size))
        return [sft_batch(part, self.pad_id).to(self.session.device) for part in chunks(mine, self.size)]


def sampling_of(pipeline: Pipeline, tokenizer, pad_id: int) -> KitSampling:
    """Sampling for PPO; the configuration allows no filter, which would have another distribution than the policy."""
    return KitSampling(max_new_tokens=pipeline.sampling.max_new_tokens, temperature=pipeline.sampling.temperature,
                       stop_token_ids=(tokenizer.eos_token_id,), pad_token_id=pad_id)


def reused(pipeline: Pipeline, batch: KitBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sampler's (logprobs, entropy) where rollout.reuse_logprobs takes them instead of another forward pass."""
    setting = pipeline.rollout.reuse_logprobs
    use = setting == "always" or setting == "auto" and pipeline.model.dtype == "fp32"
    return (batch.logprobs, batch.entropy) if use else None


def sample_lines(prompts: Prompts, batch: KitBatch, scored: Scored, tokenizer, phase: str, step: int,
                 limit: int | None = None) -> list[dict]:
    """Lines for samples.jsonl: question, answer, score, KL in nats, and the gold reward where it is known."""
    kl = kl_estimates(scored.logprobs, scored.ref_logprobs, batch.response_mask)["k1"].tolist()
    responses = batch.input_ids[:, -batch.response_mask.shape[1]:]
    lines = []
    for i in range(len(prompts.sources) if limit is None else min(limit, len(prompts.sources))):
        text = tokenizer.decode(responses[i][batch.response_mask[i]], skip_special_tokens=True)
        line = {"sample_id": prompts.batch.sample_ids[i], "phase": phase, "step": step,
                "prompt": prompts.batch.prompts[i],
                "response": text, "score": float(scored.scores[i]), "kl": kl[i],
                "tokens": int(batch.response_mask[i].sum()),
                "finished": bool(batch.finished[i])}
        gold = gold_of(prompts.sources[i])
        if gold is not None:
            line["gold"] = gold.gold_reward(line["prompt"], text, line["finished"])
            line["gold_parts"] = gold.gold_parts(line["prompt"], text, line["finished"])
        lines.append(line)
    return lines


@torch.no_grad()
def reference_gap(session, reward, rows: TokenRows, pad_id: int) -> dict[str, float]:
    """Mean distance between the scores that the reward stage kept of its first reference rows and those that PPO reads:
    0 but for rounding. Nothing where it kept none, as where a reward model was put there by hand."""
    found = open_run(session.root, "reward").path / "result.json"
    kept = torch.tensor(read_json(found).get("reference_scores", []) if found.exists() else [])
    if not len(kept):
        return {}
    batch = sft_batch(rows.take(range(len(kept))), pad_id).to(session.device)
    scores = response_scores(reward, batch.sequences, batch.attention_mask).cpu()
    return {"reference_gap": float((scores - kept).abs().mean())}


def evaluate(session, hybrid, roles: Roles, held_out: PromptFeed, sampling: KitSampling, tokenizer, phase: str) -> dict:
    """Answers to the held-out prompts by the actor as it is: means over all ranks; some of the answers as sample lines.

    The same prompts with the same random numbers before and after. `lm_loss` is the actor's on held-out text.
    """
    lines = answer(session, hybrid, roles, held_out, sampling, tokenizer, phase)
    own = held_out.count // session.world_size + (session.rank < held_out.count % session.world_size)
    session.samples(lines[: min(own, session.pipeline.telemetry.samples)])
    texts = text_rows(open_run(session.root, "data").path, held_out=True)
    return averages(session, lines, own) | {"lm_loss": sft.evaluate(session, roles.actor, texts, held_out.pad_id)}


def answer(session, hybrid, roles: Roles, held_out: PromptFeed, sampling: KitSampling, tokenizer,
           phase: str) -> list[dict]:
    """This rank's answers to the held-out prompts, as sample lines; the last may only fill up the ranks."""
    prompts = held_out.at(0)
    batch = hybrid.generate(prompts.request, sampling)
    scored = score_responses(roles, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1],
                             sampling.temperature, session.pipeline.rollout.micro_batch_size,
                             reused(session.pipeline, batch))
    return sample_lines(prompts, batch, scored, tokenizer, phase, 0 if phase == "before" else session.total)


def averages(session, lines: list[dict], own: int | None = None) -> dict:
    """Means over the first `own` answers of each rank; gold and its parts where every source knows them."""
    sources = [name for name, _ in session.pipeline.data.weighted_sources()]  # the same on every rank, unlike `lines`
    parts = sorted(lines[0]["gold_parts"]) if all(gold_of(name) is not None for name in sources) else []
    rows = [{name: float(line[name]) for name in ("score", "kl", "tokens", "finished")} for line in lines]
    if parts:
        rows = [row | {"gold": line["gold"], "gold_square": line["gold"] ** 2, **line["gold_parts"]}
                for row, line in zip(rows, lines, strict=True)]
    rows = rows[:own]
    names = ["score", "kl", "tokens", "finished"] + (["gold", "gold_square", *parts] if parts else [])
    count, *sums = session.sum(len(rows), *(sum(row[name] for row in rows) for name in names))
    means = {name: value / count for name, value in zip(names, sums, strict=True)} | {"prompts": int(count)}
    if parts:
        means["gold_std"] = max(means.pop("gold_square") - means["gold"] ** 2, 0.0) ** 0.5
        means["gold_parts"] = {part: means.pop(part) for part in parts}
    return means
