"""Stage 1, supervised fine-tuning: the model learns to answer as the chosen responses do.

    deepspeed --num_gpus 2 --module dschat_kit.train.sft --run RUN/sft

Steps: 1. rows and model  2. loss on held-out rows before  3. optimiser steps on response tokens
4. loss after  5. export.
"""

import math
import time

import numpy as np
import torch

from dschat_kit.data.datasets import StepSampler, TokenRows, by_length, chunks, packed_sft_batch, rank_share, sft_batch
from dschat_kit.engine.engines import learning_rate, set_learning_rate
from dschat_kit.engine.zero import sharded_loading
from dschat_kit.models.loading import can_pack, check_length, load_causal_lm
from dschat_kit.rlhf.logprobs import sequence_logprobs
from dschat_kit.rlhf.losses import sft_loss
from dschat_kit.train.rank import main
from dschat_kit.train.session import Session
from dschat_kit.train.telemetry import peak_memory_mb


def train(session: Session) -> dict:
    """Returns the numbers of result.json."""
    pipeline, settings = session.pipeline, session.pipeline.sft
    data, tokenizer, pad_id = session.prepare_data()
    rows, held_out = TokenRows(data, "sft"), TokenRows(data, "eval")
    with sharded_loading(pipeline, pipeline.model.name):
        model = load_causal_lm(pipeline.model.name, pipeline.model, tokenizer, pipeline.seed)
    check_length(model.config, pipeline.data.max_prompt_tokens + pipeline.data.max_response_tokens)
    engine = session.trained(model, settings)
    packed = settings.packing and can_pack(engine)
    if settings.packing and not packed:
        session.say("this model does not keep packed rows apart: they are padded")
    make_batch = packed_sft_batch if packed else sft_batch
    sampler = StepSampler(rows=len(rows), batch_size=settings.batch_size, seed=pipeline.seed)
    steps = sampler.steps(settings.epochs, settings.max_steps)
    state = session.begin(steps, {"model": engine})
    if state is None:
        state = {"loss_before": evaluate(session, engine, held_out, pad_id), "tokens": 0, "seconds": 0.0}

    for step in range(session.first_step, steps):
        clock = time.perf_counter()
        lr = learning_rate(settings.lr, step, steps, settings.warmup, settings.min_lr, "cosine")
        set_learning_rate(engine, lr)
        mine = by_length(rows.take(sampler.share(step, session.rank, session.world_size)))
        lengths = [(len(row["prompt_ids"]) + len(row["chosen_ids"]), len(row["chosen_ids"])) for row in mine]
        tokens, = session.sum(sum(answered for _, answered in lengths))
        loss = 0.0
        for micro in chunks(mine, settings.micro_batch_size):
            batch = make_batch(micro, pad_id).to(session.device)
            logprobs = sequence_logprobs(engine, batch.sequences, batch.attention_mask, batch.response_mask,
                                         batch.position_ids)
            part, metrics = sft_loss(logprobs, tokens)
            session.backward(engine, part)
            loss += metrics["loss"]
        loss, = session.sum(loss)
        row = {"loss": loss, "lr": lr, **session.step_metrics(engine, lengths, clock)}
        state["tokens"] += row["tokens_read"]
        state["seconds"] += row["seconds"]
        if (step + 1) % settings.eval_every == 0 or step + 1 == steps:
            row["eval_loss"] = state["loss_after"] = evaluate(session, engine, held_out, pad_id)
            session.keep_memory({"evaluation": peak_memory_mb()})
        session.log(step + 1, row, show=("loss", "eval_loss") if "eval_loss" in row else ())
        session.checkpoint(step + 1, state)

    session.export(model, tokenizer)
    return {"eval_loss_before": state["loss_before"], "eval_loss_after": state["loss_after"],
            "eval_perplexity": math.exp(min(state["loss_after"], 700)), "steps": steps,
            "packed": packed, "tokens_per_second": state["tokens"] / max(state["seconds"], 1e-9),
            "seconds": time.time() - session.started}


@torch.no_grad()
def evaluate(session: Session, engine, rows: TokenRows, pad_id: int) -> float:
    """Mean loss a response token on the first sft.eval_rows held-out rows, in nats."""
    settings, total, tokens = session.pipeline.sft, 0.0, 0.0
    count = min(len(rows), settings.eval_rows)
    filled = np.arange(-(-count // session.world_size) * session.world_size)  # every rank makes as many forward passes
    engine.eval()
    for places in chunks(rank_share(filled, session.rank, session.world_size), settings.micro_batch_size):
        batch = sft_batch(rows.take(places % count), pad_id).to(session.device)
        counted = batch.response_mask & torch.from_numpy(places < count).to(session.device)[:, None]
        total += sft_loss(sequence_logprobs(engine, batch.sequences, batch.attention_mask, counted), 1.0)[0]
        tokens += counted[:, 1:].sum()
    engine.train()
    total, tokens = session.sum(total, tokens)
    return total / tokens


if __name__ == "__main__":
    main(train)
