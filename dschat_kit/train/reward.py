"""Stage 2, the reward model: a scalar head on the SFT backbone learns which of two responses people prefer.

    deepspeed --num_gpus 2 --module dschat_kit.train.reward --run RUN/reward

Steps: 1. rows and model  2. optimiser steps on -log sigmoid(s_chosen - s_rejected), read at the last real token
3. accuracy on held-out pairs beside "the longer answer wins"  4. shift to mean 0 on reference responses  5. export.
"""

import time
from functools import partial

import numpy as np
import torch

from dschat_kit.data.datasets import (
    StepSampler,
    TokenRows,
    by_length,
    chunks,
    preference_batch,
    rank_share,
    ranked_batch,
    sft_batch,
)
from dschat_kit.data.tokenizer import require_same_tokenizer
from dschat_kit.engine.engines import learning_rate, set_learning_rate
from dschat_kit.engine.zero import gathered, sharded_loading
from dschat_kit.models.scalar_model import load_scalar_model, response_scores
from dschat_kit.rlhf.losses import preference_loss
from dschat_kit.runs import open_run
from dschat_kit.train.rank import main
from dschat_kit.train.reward_report import accuracy_of, report
from dschat_kit.train.session import Session
from dschat_kit.train.telemetry import peak_memory_mb

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
REFERENCES, PROBES = 512, 16
"""Rows of SFT whose mean score becomes 0, and those whose scores result.json keeps: PPO compares its own with them."""


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.reward
    data, tokenizer, pad_id = session.prepare_data()
    rows, held_out = TokenRows(data, "reward"), TokenRows(data, "eval")
    source = settings.model or open_run(session.root, "sft").model_dir
    require_same_tokenizer(tokenizer, source)
    with sharded_loading(pipeline, source):
        model = load_scalar_model(source, pipeline.model, pipeline.seed, new_head=True,
                                  gathered=partial(gathered, writer=0))
    engine = session.trained(model, settings)
    sampler = StepSampler(rows=len(rows), batch_size=settings.batch_size, seed=pipeline.seed, rankings=rows.rankings())
    steps = sampler.steps(settings.epochs, settings.max_steps)
    session.begin(steps, {"model": engine})
    pairs = partial(preference_batch, pad_id=pad_id)

    for step in range(session.first_step, steps):
        clock = time.perf_counter()
        lr = learning_rate(settings.lr, step, steps, settings.warmup, settings.min_lr, "cosine")
        set_learning_rate(engine, lr)
        mine = by_length(rows.take(sampler.share(step, session.rank, session.world_size)))
        sums, lengths = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}, []
        for micro in chunks(mine, settings.micro_batch_size):
            batch, places = ranked_batch(micro, pad_id)
            lengths += [(length, 0) for length in batch.attention_mask.sum(1).tolist()]
            batch = batch.to(session.device)
            scores = response_scores(engine, batch.sequences, batch.attention_mask)
            chosen, rejected = scores[places.to(session.device)].chunk(2)
            part, metrics = preference_loss(chosen, rejected, pairs=settings.batch_size)
            session.backward(engine, part)
            sums = {name: value + metrics[name] for name, value in sums.items()}
        row = dict(zip(sums, session.sum(*sums.values()), strict=True))
        row |= {"lr": lr, **session.step_metrics(engine, lengths, clock)}
        if (step + 1) % settings.eval_every == 0 or step + 1 == steps:
            scores = scores_of(session, engine, held_out, settings.eval_rows, pairs)
            row["eval_accuracy"] = accuracy_of(scores[:, 0] - scores[:, 1])
            session.keep_memory({"evaluation": peak_memory_mb()})
        session.log(step + 1, row, show=("loss", "accuracy", "eval_accuracy") if "eval_accuracy" in row else ())
        session.checkpoint(step + 1)

    # What the SFT policy was taught to say.
    reference = scores_of(session, engine, TokenRows(data, "sft"), REFERENCES, partial(sft_batch, pad_id=pad_id))[:, 0]
    model.normalise(float(reference.mean()), float(1 / max(reference.std(), 1e-6)) if settings.scale else 1.0)
    scores = scores_of(session, engine, held_out, len(held_out), pairs)
    session.export(model.classifier, tokenizer)
    return {**report(scores, held_out, model.scale),
            "reference_mean": float(reference.mean()), "reference_std": float(reference.std()),
            "reference_quantiles": {f"{q:.0%}": float(np.quantile(reference, q)) for q in QUANTILES},
            "reference_scores": ((reference[:PROBES] - reference.mean()) * model.scale).tolist(),
            "steps": steps, "seconds": time.time() - session.started}


@torch.no_grad()
def scores_of(session: Session, engine, rows: TokenRows, limit: int, build) -> np.ndarray:
    """(N, k) scores in the order of the first N = min(rows, limit) rows; `build` makes a batch of k sequences a row."""
    count, found = min(len(rows), limit), []
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows.take(range(count))]
    # Similar lengths together; repeated at the end so that every rank makes as many forward passes.
    places = np.resize(np.argsort(lengths, kind="stable"), -(-count // session.world_size) * session.world_size)
    engine.eval()
    for some in chunks(rank_share(places, session.rank, session.world_size), session.pipeline.rollout.micro_batch_size):
        batch = build(rows.take(some)).to(session.device)
        scores = response_scores(engine, batch.sequences, batch.attention_mask)
        found.append(scores.view(-1, len(some)).T)
    engine.train()
    mine, ordered = torch.cat(found), np.empty((count, found[0].shape[1]))
    everything = torch.zeros(len(places), mine.shape[1], device=session.device, dtype=mine.dtype)
    everything[session.rank::session.world_size] = mine
    ordered[places] = session.sum_tensor(everything).double().cpu().numpy()
    return ordered


if __name__ == "__main__":
    main(train)
