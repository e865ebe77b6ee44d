"""Stage 3 without sampling: direct preference optimisation turns the SFT model into its own reward model.

    deepspeed --num_gpus 2 --module dschat_kit.train.dpo --run RUN/dpo

PPO's objective has the optimum pi ~ pi_ref exp(r / beta), so a policy implies the reward r = beta log pi / pi_ref, up
to what depends on the prompt alone; here that reward is fitted to the preferences. Rafailov et al. 2023 (2305.18290),
eq. 7. The pairs are those of PPO's prompts, on which neither SFT nor the reward model was trained; the reward model
only judges the answers before and after, so that the numbers are those of PPO.
"""

import time

import numpy as np
import torch
from torch import Tensor, nn

from dschat_kit.config import ConfigError
from dschat_kit.data.datasets import (
    SequenceBatch,
    StepSampler,
    TokenRows,
    by_length,
    chunks,
    preference_batch,
    rank_share,
)
from dschat_kit.engine.engines import learning_rate, set_learning_rate
from dschat_kit.models.loading import check_length
from dschat_kit.rlhf.logprobs import sequence_logprobs
from dschat_kit.rlhf.losses import dpo_loss
from dschat_kit.rlhf.rollout import Roles
from dschat_kit.train.ppo_metrics import summary
from dschat_kit.train.prompts import PromptFeed, evaluate, sampling_of
from dschat_kit.train.rank import main
from dschat_kit.train.reward_report import right
from dschat_kit.train.roles import load_policy, load_reward, reference, rollout_engine, scorer
from dschat_kit.train.session import Session
from dschat_kit.train.telemetry import peak_memory_mb


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.dpo
    data, tokenizer, pad_id = session.prepare_data()
    rows, held_out, seed = TokenRows(data, "ppo"), TokenRows(data, "eval"), pipeline.seed + settings.seed
    if not all(rows.table["rejected"]):
        raise ConfigError("data.sources: got prompts of PPO without a rejected response\n  expected: pairs, for DPO\n"
                          "  change:   --set data.sources=... of preferences only")
    roles = build_roles(session, tokenizer)
    engine, sampling = roles.actor, sampling_of(pipeline, tokenizer, pad_id)
    hybrid = rollout_engine(session, engine)
    prompts = PromptFeed(held_out, settings.eval_prompts, seed, pad_id, session, unique=True)
    sampler = StepSampler(rows=len(rows), batch_size=settings.batch_size, seed=seed)
    steps = sampler.steps(settings.epochs, settings.max_steps)
    state = session.begin(steps, {"model": engine})
    if state is None:
        state = {"before": evaluate(session, hybrid, roles, prompts, sampling, tokenizer, "before"), "tokens": 0,
                 "seconds": {"training": 0.0}}

    for step in range(session.first_step, steps):
        clock = time.perf_counter()
        lr = learning_rate(settings.lr, step, steps, settings.warmup, settings.min_lr, "cosine")
        set_learning_rate(engine, lr)
        mine = by_length(rows.take(sampler.share(step, session.rank, session.world_size)))
        sums = {}
        for micro in chunks(mine, settings.micro_batch_size):
            loss, metrics = objective(roles, preference_batch(micro, pad_id).to(session.device), settings.beta,
                                      pairs=settings.batch_size)
            session.backward(engine, loss)
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        row = dict(zip(sums, session.sum(*sums.values()), strict=True))
        lengths = [(len(r["prompt_ids"]) + len(r[side]), len(r[side]))
                   for r in mine for side in ("chosen_ids", "rejected_ids")]
        row |= {"lr": lr, **session.step_metrics(engine, lengths, clock)}
        state["tokens"] += row["tokens_read"]
        state["seconds"]["training"] += row["seconds"]
        if (step + 1) % settings.eval_every == 0 or step + 1 == steps:
            row["eval_accuracy"] = state["accuracy"] = held_out_accuracy(session, roles, held_out, pad_id)
            session.keep_memory({"evaluation": peak_memory_mb()})
        session.log(step + 1, row, show=("loss", "accuracy", "eval_accuracy") if "eval_accuracy" in row else ())
        session.checkpoint(step + 1, state)

    after = evaluate(session, hybrid, roles, prompts, sampling, tokenizer, "after")
    session.export(engine.module, tokenizer)
    return summary(state["before"], after, state, steps) | {
        "accuracy": state["accuracy"], "rollout": {"path": hybrid.path, "reason": hybrid.reason}}


def build_roles(session: Session, tokenizer) -> Roles:
    """The actor as a DeepSpeed engine with its optimiser; ref and reward model frozen; no critic."""
    pipeline, settings = session.pipeline, session.pipeline.dpo
    actor = load_policy(session, tokenizer)
    check_length(actor.config, pipeline.data.max_prompt_tokens + max(pipeline.data.max_response_tokens,
                                                                     pipeline.sampling.max_new_tokens))
    engine = session.trained(actor, settings)
    return Roles(actor=engine, critic=None, ref=reference(session, engine, tokenizer),
                 reward=scorer(session, load_reward(session)))


def objective(roles: Roles, batch: SequenceBatch, beta: float, pairs: float) -> tuple[Tensor, dict]:
    """(loss, metrics) of a batch of pairs, as parts of means over `pairs`."""
    return dpo_loss(*pair_logprobs(roles, batch), beta, pairs)


def pair_logprobs(roles: Roles, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """(2B,) log-probabilities of whole responses under actor and reference, the chosen ones first."""
    def logprobs(model: nn.Module) -> Tensor:
        return sequence_logprobs(model, batch.sequences, batch.attention_mask, batch.response_mask)

    with torch.no_grad():
        reference = logprobs(roles.ref)
    return logprobs(roles.actor), reference


@torch.no_grad()
def held_out_accuracy(session: Session, roles: Roles, rows: TokenRows, pad_id: int) -> float:
    """Share of the first dpo.eval_rows held-out pairs whose chosen side has the higher implicit reward."""
    settings, correct = session.pipeline.dpo, 0.0
    count = min(len(rows), settings.eval_rows)
    filled = np.arange(-(-count // session.world_size) * session.world_size)  # every rank makes as many forward passes
    for places in chunks(rank_share(filled, session.rank, session.world_size), settings.micro_batch_size):
        batch = preference_batch(rows.take(places % count), pad_id).to(session.device)
        chosen, rejected = torch.sub(*pair_logprobs(roles, batch)).chunk(2)
        correct += right((chosen - rejected).cpu().numpy())[places < count].sum()
    return session.sum(correct)[0] / count


if __name__ == "__main__":
    main(train)
