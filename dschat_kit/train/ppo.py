"""Stage 3, PPO: the SFT model learns to score high with the reward model without leaving the SFT policy far behind.

    deepspeed --num_gpus 2 --module dschat_kit.train.ppo --run RUN/ppo

Four roles: actor (trained, from SFT), critic (trained, from the reward model), ref (frozen SFT), reward (frozen).
One iteration: 1. the actor answers a batch of prompts  2. all roles look at the answers  3. rewards less the KL
penalty, GAE, whitening over all ranks  4. ppo_epochs passes of clipped updates in minibatches. Schulman et al. 2017
(1707.06347), Ouyang et al. 2022 (2203.02155).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from dschat_kit.config import Ppo
from dschat_kit.data.datasets import SequenceBatch, TokenRows
from dschat_kit.engine.ema import Ema
from dschat_kit.engine.engines import build_engine, grad_norm, learning_rate, set_learning_rate
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling
from dschat_kit.engine.shared import Role, SharedModel
from dschat_kit.models.loading import check_length
from dschat_kit.models.lora import add_adapters
from dschat_kit.models.scalar_model import response_values
from dschat_kit.rlhf.experience import Experience
from dschat_kit.rlhf.logprobs import response_logprobs, sequence_logprobs
from dschat_kit.rlhf.losses import policy_loss, sft_loss, value_loss
from dschat_kit.rlhf.rewards import next_kl_coef
from dschat_kit.rlhf.rollout import Roles, Scored, make_experience, score_responses
from dschat_kit.runs import open_run
from dschat_kit.train.ppo_metrics import Clock, add_metrics, over_ranks, rollout_metrics, summary, work_of
from dschat_kit.train.prompts import (
    PromptFeed,
    TextFeed,
    evaluate,
    reference_gap,
    reused,
    sample_lines,
    sampling_of,
    text_rows,
)
from dschat_kit.train.rank import main
from dschat_kit.train.roles import load_policy, load_reward, reference, rollout_engine, scorer
from dschat_kit.train.session import Session


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    data, tokenizer, pad_id = session.prepare_data()
    sampling = sampling_of(pipeline, tokenizer, pad_id)
    roles = build_roles(session, tokenizer)
    seed = pipeline.seed + settings.seed
    hybrid = rollout_engine(session, roles.actor)
    held_out = PromptFeed(TokenRows(data, "eval"), settings.eval_prompts, seed, pad_id, session, unique=True)
    feed = PromptFeed(TokenRows(data, "ppo"), settings.rollout_batch_size, seed, pad_id, session,
                      samples=settings.samples_per_prompt)
    texts = TextFeed(text_rows(data), settings, seed, pad_id, session) if settings.ptx_coef else None
    ema = Ema(roles.actor, settings.ema_decay) if settings.ema_decay else None
    kept = {"actor": roles.actor, "critic": roles.critic, "ema": ema}
    if pipeline.lora.share_base:
        del kept["critic"]  # the actor's engine holds it
    state = session.begin(settings.max_steps, {role: engine for role, engine in kept.items() if engine is not None})
    if state is None:
        before = evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "before")
        state = {"before": before, "probe": reference_gap(session, roles.reward, TokenRows(data, "sft"), pad_id),
                 "kl_coef": settings.kl_coef, "tokens": 0,
                 "seconds": dict.fromkeys(("generation", "scoring", "training", "other"), 0.0)}

    for step in range(session.first_step, settings.max_steps):
        clock, prompts = Clock(), feed.at(step)
        settings = dataclasses.replace(settings, kl_coef=state["kl_coef"])
        batch, scored, experience, updates = iterate(session, roles, hybrid, prompts.request, sampling, step, settings,
                                                     clock, texts, ema)
        row = rollout_metrics(session, experience, scored, batch, updates)
        session.samples(sample_lines(prompts, batch, scored, tokenizer, "rollout", step + 1,
                                     limit=pipeline.telemetry.rollout_samples))
        clock.lap("other")
        row |= {"kl_coef": settings.kl_coef, **learning_rates(settings, step), **state["probe"]}
        row |= clock.row(session, row["tokens"]) | {"matmul_share": session.matmul_share(
            work_of(roles, batch, settings.ppo_epochs, pipeline.lora.rank > 0), clock.total)}
        session.log(step + 1, row, show=("score_mean", "kl", "response_length", "clip_fraction"))
        state["tokens"] += row["tokens"]
        state["seconds"] = {name: value + row[f"seconds_{name}"] for name, value in state["seconds"].items()}
        session.keep_memory(clock.memory)
        if settings.kl_target:
            state["kl_coef"] = next_kl_coef(settings.kl_coef, row["kl"], settings.kl_target, settings.kl_horizon,
                                            settings.rollout_batch_size)
        session.checkpoint(step + 1, state)

    after = evaluate(session, hybrid, roles, held_out, sampling, tokenizer, "after")
    session.export(roles.actor.module, tokenizer)
    if ema:
        session.export(roles.actor.module, tokenizer, ema, "ema")
    rollout = {"path": hybrid.path, "reason": hybrid.reason}
    return summary(state["before"], after, state, settings.max_steps) | {"rollout": rollout}


def iterate(session: Session, roles: Roles, hybrid: HybridEngine, request: KitRequest, sampling: KitSampling,
            step: int, settings: Ppo, clock: Clock, texts: TextFeed | None = None, ema: Ema | None = None,
            objective: Callable | None = None) -> tuple[KitBatch, Scored, Experience, list[dict]]:
    """One PPO iteration on a batch of prompts; the last of what it returns are the metrics of each optimiser step.
    `objective` takes the place of actor_objective."""
    # 1. The actor answers.
    batch = hybrid.generate(request, sampling)
    clock.lap("generation")

    # 2. All four roles look at the answers.
    scored = score_responses(roles, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1],
                             sampling.temperature, session.pipeline.rollout.micro_batch_size,
                             reused(session.pipeline, batch))

    # 3. Scores less the KL penalty become rewards; rewards and values become advantages and returns.
    experience = make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished, scored,
                                 settings, session.sum_tensor)
    clock.lap("scoring")

    # 4. Clipped updates in minibatches, reshuffled in each epoch.
    parts = [part for epoch in range(settings.ppo_epochs) for part in minibatches(session, experience, step, epoch)]
    lrs = learning_rates(settings, step)
    updates = [update(session, roles, part, settings, sampling.temperature, lrs,
                      texts.at(step * len(parts) + i) if texts else (), ema, objective) for i, part in enumerate(parts)]
    updates = over_ranks(session, updates)
    clock.lap("training")
    return batch, scored, experience, updates


def build_roles(session: Session, tokenizer) -> Roles:
    """actor and critic as DeepSpeed engines with their optimisers, reward frozen, ref too (train/roles.py); or all four
    on one base. Only gae needs a critic."""
    pipeline, settings = session.pipeline, session.pipeline.ppo
    actor = load_policy(session, tokenizer)
    check_length(actor.config, pipeline.data.max_prompt_tokens + pipeline.sampling.max_new_tokens)
    if pipeline.lora.share_base:
        shared = SharedModel(actor, open_run(session.root, "reward").model_dir, pipeline)
        engine = trained(session, shared, settings.lr_actor, groups=[shared.trained("actor"), shared.trained("critic")])
        return Roles(**{role: Role(engine, role) for role in ("actor", "critic", "ref", "reward")})
    critic = add_adapters(load_reward(session), pipeline.lora, pipeline.seed) if settings.advantage == "gae" else None
    engine = trained(session, add_adapters(actor, pipeline.lora, pipeline.seed), settings.lr_actor)
    return Roles(actor=engine, critic=trained(session, critic, settings.lr_critic) if critic is not None else None,
                 ref=reference(session, engine, tokenizer), reward=scorer(session, load_reward(session)))


def trained(session: Session, model: nn.Module, lr: float, **more):
    """A PPO role's engine with its optimiser (Adam eps 1e-5)."""
    settings = session.pipeline.ppo
    return build_engine(model, session.pipeline, lr=lr, eps=1e-5, batch_size=settings.mini_batch_size,
                        micro_batch_size=settings.micro_batch_size, world_size=session.world_size,
                        grad_clip=settings.grad_clip, **more)


def learning_rates(settings: Ppo, step: int) -> dict[str, float]:
    """Both rise over the warm-up and fall linearly."""
    return {f"lr_{role}": learning_rate(base, step, settings.max_steps, settings.warmup, settings.min_lr, "linear")
            for role, base in (("actor", settings.lr_actor), ("critic", settings.lr_critic))}


def minibatches(session: Session, experience: Experience, step: int, epoch: int) -> Iterator[Experience]:
    """This rank's rows of each minibatch, reshuffled as a function of (seed, step, epoch).

    Row g of the global batch is on rank g % world_size. A minibatch of M rows takes one of each class modulo M, the
    classes shuffled on their own: so each rank has its share, and which rows meet depends on no number of ranks.
    """
    rank, world, settings = session.rank, session.world_size, session.pipeline.ppo
    rows = np.arange(len(experience) * world).reshape(-1, settings.mini_batch_size)
    shuffled = np.random.default_rng([session.pipeline.seed + settings.seed, step + 1, epoch]).permuted(rows, axis=0)
    for minibatch in shuffled[:, rank::world]:
        yield experience.select((minibatch - rank) // world)


def update(session: Session, roles: Roles, minibatch: Experience, settings: Ppo, temperature: float,
           lrs: dict[str, float], texts: Sequence[SequenceBatch] = (), ema: Ema | None = None,
           objective: Callable | None = None) -> dict:
    """One optimiser step of actor and critic on one minibatch, the actor's on `texts` too (one batch a micro batch),
    and one of the moving average; returns this rank's part of its metrics, for `over_ranks`."""
    tokens, text_tokens = session.sum(minibatch.response_mask.sum(), sum(text.response_mask.sum() for text in texts))
    totals = {}
    for role in ("actor", "critic"):
        if (engine := getattr(roles, role)) is not None:
            set_learning_rate(engine, lrs[f"lr_{role}"])
    for micro, text in itertools.zip_longest(minibatch.by_length().split(settings.micro_batch_size), texts):
        loss, found = (objective or actor_objective)(roles.actor, micro, settings, temperature, tokens)
        if text is not None:
            ptx_loss, _ = sft_loss(sequence_logprobs(roles.actor, text.sequences, text.attention_mask,
                                                     text.response_mask), text_tokens)
            loss, found["ptx_loss"] = loss + settings.ptx_coef * ptx_loss, ptx_loss.detach()
        session.backward(roles.actor, loss)
        if roles.critic is not None:
            values = response_values(roles.critic, micro.sequences, micro.attention_mask, micro.response_mask.shape[1])
            loss, more = value_loss(values, micro.values, micro.returns, micro.response_mask,
                                    settings.value_clip_range, tokens)
            session.backward(roles.critic, loss)
            found |= more
        totals = add_metrics(totals, found)
    if ema is not None:
        ema.update()
    return totals | {f"grad_norm_{role}": grad_norm(engine) for role, engine in vars(roles).items()
                  if role in ("actor", "critic") and engine is not None}


def actor_objective(actor: nn.Module, micro: Experience, settings: Ppo, temperature: float,
                    tokens: float) -> tuple[Tensor, dict]:
    """(policy loss, metrics) of some rows, as parts of means over `tokens`."""
    new_logprobs, _ = response_logprobs(actor, micro.sequences, micro.attention_mask, micro.response_mask.shape[1],
                                        temperature)
    return policy_loss(new_logprobs, micro.logprobs, micro.advantages, micro.response_mask, settings.clip_range, tokens,
                       settings.clip_range_high, settings.dual_clip)


if __name__ == "__main__":
    main(train)
