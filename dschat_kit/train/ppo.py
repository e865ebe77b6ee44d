"""Stage 3, PPO: the SFT model learns to score high with the reward model without leaving the SFT policy far behind.

    deepspeed --num_gpus 2 --module dschat_kit.train.ppo --run RUN/ppo

Four roles: actor (trained, from SFT), critic (trained, from the reward model), ref (frozen SFT), reward (frozen).
One iteration: 1. sample responses to a batch of prompts  2. all roles score them  3. KL-penalised rewards, GAE,
whitening over all ranks  4. ppo_epochs passes of clipped updates in minibatches. Schulman et al. 2017, Ouyang et al. 2022.
Left out on purpose: reuse of the sampler's log-probabilities (they are recomputed, so the first ratio is 1 exactly).
"""

import time

import torch

from dschat_kit.data.datasets import TokenRows
from dschat_kit.data.splits import epoch_order
from dschat_kit.engine.engines import build_engine, freeze, learning_rate, set_learning_rate
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.models.loading import check_length, load_causal_lm, response_logits
from dschat_kit.models.scalar_model import load_scalar_model
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.losses import policy_loss, token_logprobs, value_loss
from dschat_kit.rlhf.rollout import make_experience, score_responses
from dschat_kit.runs import open_run
from dschat_kit.train.prompts import PromptFeed, evaluate, sampling_of, sample_lines
from dschat_kit.train.ppo_metrics import rollout_metrics, summary
from dschat_kit.train.session import Session, main


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    data, tokenizer, pad_id = session.prepare_data()
    sampling = sampling_of(pipeline, tokenizer, pad_id)
    roles = build_roles(session, tokenizer)
    hybrid = HybridEngine(roles["actor"], micro_batch_size=pipeline.rollout.micro_batch_size)
    feed = PromptFeed(TokenRows(data, "ppo"), settings.rollout_batch_size, pipeline.seed, pad_id, session)
    held_out = PromptFeed(TokenRows(data, "eval"), settings.eval_prompts, pipeline.seed, pad_id, session, unique=True)
    before = evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "before")
    state = session.begin(settings.max_steps, {"actor": roles["actor"], "critic": roles["critic"]},
                          before=before, seconds=dict.fromkeys(("generation", "scoring", "training", "other"), 0.0), tokens=0)
    if not session.resume or session.first_step == 0:
        session.samples(before["samples"])

    for step in range(session.first_step, settings.max_steps):
        clock = Clock()
        lrs = {role: learning_rate(base, step, settings.max_steps, settings.warmup, settings.min_lr, "linear")
               for role, base in (("actor", settings.lr_actor), ("critic", settings.lr_critic))}
        prompts = feed.at(step)
        batch = hybrid.generate(prompts.request, sampling)
        clock.lap("generation")
        scored = score_responses(batch.input_ids, batch.attention_mask, batch.response_mask.shape[1], **roles,
                                 temperature=sampling.temperature, micro_batch_size=pipeline.rollout.micro_batch_size)
        experience = make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished, scored,
                                     settings, settings.kl_coef, session.sum_tensor)
        clock.lap("scoring")
        updates = [update(session, roles, minibatch, sampling.temperature, lrs)
                   for epoch in range(settings.ppo_epochs) for minibatch in minibatches(session, experience, step, epoch)]
        clock.lap("training")
        row = rollout_metrics(session, experience, scored, batch, updates)
        session.samples(sample_lines(prompts, batch, scored, tokenizer, "rollout", step + 1,
                                     limit=pipeline.telemetry.rollout_samples))
        clock.lap("other")
        row |= {"kl_coef": settings.kl_coef, "lr_actor": lrs["actor"], "lr_critic": lrs["critic"], **clock.row(session, row)}
        session.log(step + 1, row, show=("score_mean", "kl", "response_length", "clip_fraction"))
        state["tokens"] += row["tokens"]
        state["seconds"] = {name: value + row[f"seconds_{name}"] for name, value in state["seconds"].items()}
        session.checkpoint(step + 1, **{k: v for k, v in state.items() if k not in ("step", "world_size")})

    after = evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "after")
    session.samples(after["samples"])
    session.export(roles["actor"].module, tokenizer)
    return summary(state["before"], after, state, settings.max_steps)


def build_roles(session: Session, tokenizer) -> dict:
    """actor and critic as DeepSpeed engines, ref and reward frozen."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    sft, reward_dir = open_run(session.root, "sft").model_dir, open_run(session.root, "reward").model_dir
    common = dict(batch_size=settings.mini_batch_size, micro_batch_size=settings.micro_batch_size,
                  world_size=session.world_size, grad_clip=settings.grad_clip, eps=1e-5)
    actor = load_causal_lm(sft, pipeline.model, tokenizer, pipeline.seed)
    check_length(actor.config, pipeline.data.max_prompt_tokens + pipeline.sampling.max_new_tokens)
    critic = load_scalar_model(reward_dir, pipeline.model, pipeline.seed, new_head=False)
    return {"actor": build_engine(actor, pipeline.zero, pipeline.model, lr=settings.lr_actor, **common),
            "critic": build_engine(critic, pipeline.zero, pipeline.model, lr=settings.lr_critic, **common),
            "ref": freeze(load_causal_lm(sft, pipeline.model, tokenizer, pipeline.seed), pipeline.zero, pipeline.model, session.device),
            "reward": freeze(load_scalar_model(reward_dir, pipeline.model, pipeline.seed, new_head=False),
                             pipeline.zero, pipeline.model, session.device)}


def minibatches(session: Session, experience: Experience, step: int, epoch: int):
    """This rank's part of each minibatch, in an order that is new each epoch and a function of (seed, step, epoch)."""
    order = epoch_order(len(experience), session.pipeline.seed + 1_000_003 * (step + 1), epoch)
    size = session.pipeline.ppo.mini_batch_size // session.world_size
    for start in range(0, len(order), size):
        yield experience.select(order[start:start + size])


def update(session: Session, roles: dict, experience: Experience, temperature: float, lrs: dict) -> dict:
    """One optimiser step of actor and critic on one minibatch; returns its metrics over all ranks."""
    settings, A = session.pipeline.ppo, experience.response_mask.shape[1]
    tokens, = session.sum(experience.response_mask.sum())
    for role, lr in lrs.items():
        set_learning_rate(roles[role], lr)
    totals: dict[str, float] = {}
    for start in range(0, len(experience), settings.micro_batch_size):
        micro = experience.select(range(start, min(start + settings.micro_batch_size, len(experience))))
        logits = response_logits(roles["actor"], micro.sequences, micro.attention_mask, A)
        new_logprobs = token_logprobs(logits, micro.sequences[:, -A:], temperature)
        loss, policy = policy_loss(new_logprobs, micro.logprobs, micro.advantages, micro.response_mask, settings.clip_range, tokens)
        session.backward(roles["actor"], loss)
        new_values = roles["critic"](micro.sequences, micro.attention_mask)[:, -A - 1:-1]
        loss, value = value_loss(new_values, micro.values, micro.returns, micro.response_mask, settings.value_clip_range, tokens)
        session.backward(roles["critic"], loss)
        for name, number in {**policy, **value}.items():
            join = max if name == "ratio_max" else float.__add__
            totals[name] = join(totals.get(name, 0.0), float(number))
    ratio_max, = session.largest(totals.pop("ratio_max"))
    row = dict(zip(totals, session.sum(*totals.values())))
    return row | {"ratio_max": ratio_max, "grad_norm_actor": float(roles["actor"].get_global_grad_norm() or 0.0),
                  "grad_norm_critic": float(roles["critic"].get_global_grad_norm() or 0.0)}


class Clock:
    """Seconds of the parts of an iteration."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap belongs to `name`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now

    def row(self, session: Session, row: dict) -> dict:
        """The metrics of time, as the slowest rank saw them; tokens_per_second counts response tokens of all ranks."""
        seconds = dict(zip(self.seconds, session.largest(*self.seconds.values())))
        return {f"seconds_{name}": value for name, value in seconds.items()} | {
            "tokens_per_second": row["tokens"] / sum(seconds.values())}


if __name__ == "__main__":
    main(train)
