"""One rank of `dschat bench ppo`: a whole PPO iteration, ours (`kit`) and the same loop on plain transformers (`hf`).

The peer is a fair one: transformers' fastest way to generate, logits on the response columns alone; but batches are
padded to their longest row, generation ends when all rows have, and nothing that the sampler has seen is used again.
"""

import time

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

from dschat_kit.config import Pipeline
from dschat_kit.engine.engines import build_engine, freeze
from dschat_kit.models.loading import response_logits
from dschat_kit.models.scalar_model import ScalarModel, last_token
from dschat_kit.rlhf.losses import entropy_of, policy_loss, token_logprobs, value_loss
from dschat_kit.rlhf.rollout import Roles, Scored, make_experience, score_responses
from dschat_kit.train import bench
from dschat_kit.train.ppo import update
from dschat_kit.train.prompts import reused
from dschat_kit.train.rank import start_distributed
from dschat_kit.train.session import Session

__all__ = ["ppo"]

PHASES = ("generation", "scoring", "training")


class _Job(Session):
    """What the loop asks of a session, without a run folder."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        self.pipeline, self.device = pipeline, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


def roles_of(spec: dict, pipeline: Pipeline, job: _Job) -> Roles:
    """Four models of the same shape; actor and critic with their optimisers."""
    def scalar() -> ScalarModel:
        return ScalarModel(bench.load_model(spec["model"], spec["dtype"], AutoModelForSequenceClassification,
                                            num_labels=1))

    def trained(model):
        settings = pipeline.ppo
        return build_engine(model, pipeline, lr=1e-6, eps=1e-5, batch_size=settings.mini_batch_size, grad_clip=1.0,
                            micro_batch_size=settings.micro_batch_size, world_size=job.world_size)
    causal = [bench.load_model(spec["model"], spec["dtype"]) for _ in range(2)]
    return Roles(actor=trained(causal[0]), critic=trained(scalar()), ref=freeze(causal[1], pipeline, job.device),
                 reward=freeze(scalar(), pipeline, job.device))


def ours(job: _Job, roles: Roles, work: bench.Work, hybrid) -> list[float]:
    """Times at which generation, scoring and training began, and the end."""
    pipeline, times = job.pipeline, [time.perf_counter()]
    batch = hybrid.generate(*work.kit())
    times.append(time.perf_counter())
    scored = score_responses(roles, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1],
                             work.temperature, pipeline.rollout.micro_batch_size, reused(pipeline, batch))
    experience = make_experience(batch.input_ids, batch.attention_mask, batch.response_mask, batch.finished, scored,
                                 pipeline.ppo, job.sum_tensor)
    times.append(time.perf_counter())
    update(job, roles, experience, work.temperature, {"actor": 1e-6, "critic": 1e-6})
    return [*times, time.perf_counter()]


def plain(job: _Job, roles: Roles, work: bench.Work, generate) -> list[float]:
    """The same with padded batches, as `ours`."""
    settings, times = job.pipeline.ppo, [time.perf_counter()]
    with torch.no_grad():
        sequences = generate()
        roles.actor.module.set_attn_implementation("sdpa")
        A = sequences.shape[1] - work.prompts.shape[1]
        response = torch.arange(A, device=sequences.device) < work.lengths[:, None]
        mask = torch.cat([work.mask, response], 1)
        times.append(time.perf_counter())
        parts = []
        for rows in torch.arange(len(sequences)).split(job.pipeline.rollout.micro_batch_size):
            tokens, some = sequences[rows], mask[rows]
            logits, ref = (response_logits(role, tokens, some, A) for role in (roles.actor, roles.ref))
            parts.append(Scored(logprobs=token_logprobs(logits, tokens[:, -A:], work.temperature),
                                ref_logprobs=token_logprobs(ref, tokens[:, -A:], work.temperature),
                                entropy=entropy_of(logits, work.temperature),
                                values=roles.critic(tokens, some)[:, -A - 1:-1],
                                scores=last_token(roles.reward(tokens, some), some)))
        scored = Scored(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
    experience = make_experience(sequences, mask, response, response.any(1), scored, settings, job.sum_tensor)
    times.append(time.perf_counter())
    tokens, = job.sum(response.sum())
    for micro in experience.split(settings.micro_batch_size):
        logits = response_logits(roles.actor, micro.sequences, micro.attention_mask, A)
        job.backward(roles.actor, policy_loss(token_logprobs(logits, micro.responses, work.temperature), micro.logprobs,
                                              micro.advantages, micro.response_mask, settings.clip_range, tokens)[0])
        values = roles.critic(micro.sequences, micro.attention_mask)[:, -A - 1:-1]
        job.backward(roles.critic, value_loss(values, micro.values, micro.returns, micro.response_mask,
                                              settings.value_clip_range, tokens)[0])
    return [*times, time.perf_counter()]


def ppo(spec: dict) -> dict:
    """The JSON of `dschat bench ppo`; `seconds` holds the median of each phase."""
    start_distributed(0)
    device, ranks = torch.device(bench.current_device()), dist.get_world_size()
    rows, micro = spec["batch"] * ranks, next(size for size in range(min(8, spec["batch"]), 0, -1)
                                              if spec["batch"] % size == 0)
    pipeline = Pipeline().with_overrides([
        f"zero.stage={spec['zero']}", f"model.dtype={spec['dtype']}", f"ppo.rollout_batch_size={rows}",
        f"ppo.mini_batch_size={rows}", f"ppo.micro_batch_size={micro}", f"rollout.micro_batch_size={micro}"])
    job = _Job(pipeline, device)
    roles = roles_of(spec, pipeline, job)
    config, weights = roles.actor.module.config, bench.layer_weights(roles.actor.module)
    work = bench.Work(spec, config, job.rank, device)
    calls, hybrid = bench.engines_of({**spec, "engines": ["kit", "hf"]}, work, roles.actor, spec["zero"] == 3)
    found, all_times, peaks = {}, {}, {}
    iterations = {"kit": lambda: ours(job, roles, work, hybrid)}
    if "hf" in spec["engines"]:
        variant = bench.fastest(calls["hf"])
        iterations["hf"] = lambda: plain(job, roles, work, calls["hf"][variant])
    iterations = {name: call for name, call in iterations.items() if name in spec["engines"]}
    for call in iterations.values():
        call()  # warm-up; Adam's moments are allocated
    for name, call in iterations.items():
        peaks[name] = bench.peak_anon_mb(call)
    for _ in range(spec["repeats"]):
        for name, call in iterations.items():
            roles.actor.module.set_attn_implementation("sdpa")
            dist.barrier()
            all_times.setdefault(name, []).append(np.diff(call()))
    useful, = job.sum(work.lengths.sum())
    for name, times in all_times.items():
        total = float(np.median(np.sum(times, 1)))
        phases = dict(zip(PHASES, np.median(times, 0).tolist(), strict=True))
        found[name] = {"tokens_per_second": useful / total, "seconds": total, "peak_anon_mb": peaks[name],
                       "phases": phases}
    forward, _ = work.cost(config, weights)
    head = 2 * config.hidden_size * config.vocab_size * float(work.lengths.sum())
    flops, = job.sum(5 * forward + 5 * (forward - head))  # generation, ref, 3 for training; reward, values, 3
    peak = bench.roofline(spec["dtype"], device)
    gflops, = job.sum(peak["matrix_gflops"])
    shares = {"share_of_matrix_peak": flops / found["kit"]["seconds"] / gflops / 1e9} if "kit" in found else {}
    return {"engines": found, "useful_tokens": useful, "path": hybrid.path, "reason": hybrid.reason,
            "roofline": {"matrix_gflops": gflops, **shares}}


if __name__ == "__main__":
    bench.main(ppo)
