"""One rank of `dschat bench ppo`: a whole PPO iteration, ours (`kit`) and the same loop on plain transformers (`hf`).

The peer generates by transformers' fastest way until all rows have ended, computes the actor's log-probabilities again,
and takes every column of the padded batch for a real token. It uses our log-softmax in chunks, so it is, if anything,
faster than a plain loop.
"""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from dschat_kit.config import Pipeline
from dschat_kit.engine.engines import freeze
from dschat_kit.models.scalar_model import ScalarModel
from dschat_kit.rlhf.rollout import Roles, make_experience, score_responses
from dschat_kit.train import bench
from dschat_kit.train.ppo import trained, update
from dschat_kit.train.prompts import reused
from dschat_kit.train.rank import start_distributed
from dschat_kit.train.session import Session
from dschat_kit.train.telemetry import weights_of
from dschat_kit.train.watch import Watch

__all__ = ["ppo"]

PHASES, LR = ("generation", "scoring", "training"), 1e-6


class _Job(Session):
    """What the loop asks of a session, without a run folder."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        self.pipeline, self.device, self.watch = pipeline, device, Watch(lambda hanging: 1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


def roles_of(spec: dict, job: _Job) -> Roles:
    """Four models of the same shape; actor and critic with their optimisers."""
    def scalar() -> ScalarModel:
        return ScalarModel(bench.load_model(spec["model"], spec["dtype"], AutoModelForSequenceClassification,
                                            num_labels=1))

    actor, ref = (bench.load_model(spec["model"], spec["dtype"]) for _ in range(2))
    return Roles(actor=trained(job, actor, LR), critic=trained(job, scalar(), LR),
                 ref=freeze(ref, job.pipeline, job.device), reward=freeze(scalar(), job.pipeline, job.device))


def iteration(job: _Job, roles: Roles, temperature: float, sample) -> list[float]:
    """Seconds of each of PHASES; `sample()` returns sequences (B, T), their mask, the response mask (B, A) and what
    the sampler knows."""
    times = [time.perf_counter()]
    sequences, mask, response, sampled = sample()
    roles.actor.module.set_attn_implementation("sdpa")
    times.append(time.perf_counter())
    scored = score_responses(roles, sequences, mask, response.shape[1], temperature,
                             job.pipeline.rollout.micro_batch_size, sampled)
    experience = make_experience(sequences, mask, response, response.any(1), scored, job.pipeline.ppo, job.sum_tensor)
    times.append(time.perf_counter())
    update(job, roles, experience, job.pipeline.ppo, temperature, {"lr_actor": LR, "lr_critic": LR})
    return np.diff([*times, time.perf_counter()]).tolist()


def ppo(spec: dict) -> dict:
    """The JSON of `dschat bench ppo`; `phases` holds the median of each."""
    device, rows = start_distributed(0), spec["batch"] * dist.get_world_size()
    micro = next(size for size in range(min(8, spec["batch"]), 0, -1) if spec["batch"] % size == 0)
    job = _Job(Pipeline().with_overrides([
        f"zero.stage={spec['zero']}", f"model.dtype={spec['dtype']}", f"ppo.rollout_batch_size={rows}",
        f"ppo.mini_batch_size={rows}", f"ppo.micro_batch_size={micro}", f"rollout.micro_batch_size={micro}"]), device)
    roles = roles_of(spec, job)
    actor = roles.actor.module
    work = bench.Work(spec, actor.config, job.rank, device)
    calls, hybrid = bench.engines_of({**spec, "engines": ["kit", "hf"]}, work, roles.actor, spec["zero"] == 3)
    generate = calls["hf"][bench.fastest(calls["hf"])] if "hf" in spec["engines"] else None

    def ours() -> tuple[Tensor, Tensor, Tensor, tuple | None]:
        batch = calls["kit"]()
        return batch.input_ids, batch.attention_mask, batch.response_mask, reused(job.pipeline, batch)

    def plain() -> tuple[Tensor, Tensor, Tensor, None]:
        every = torch.ones_like(sequences := generate(), dtype=torch.bool)
        return sequences, every, every[:, work.prompts.shape[1]:], None
    samplers = {name: sample for name, sample in (("kit", ours), ("hf", plain)) if name in spec["engines"]}
    seconds, peaks = {name: [] for name in samplers}, {}
    for sample in samplers.values():  # warm-up; Adam's moments are allocated
        iteration(job, roles, work.temperature, sample)
    for name, sample in samplers.items():
        peaks[name] = bench.peak_anon_mb(lambda sample=sample: iteration(job, roles, work.temperature, sample))
    for _ in range(spec["repeats"]):
        for name, sample in samplers.items():
            dist.barrier()
            seconds[name].append(job.largest(*iteration(job, roles, work.temperature, sample)))
    useful, forward = job.sum(work.lengths.sum(), work.cost(actor)[0])
    head = 2 * weights_of(actor)[1] * useful
    gflops, = job.sum(bench.roofline(spec["dtype"], device)["matrix_gflops"])
    found = {}
    for name, times in seconds.items():
        total, phases = float(np.median(np.sum(times, 1))), np.median(times, 0).tolist()
        found[name] = {"tokens_per_second": useful / total, "seconds": total, "peak_anon_mb": peaks[name],
                       "phases": dict(zip(PHASES, phases, strict=True))}
    # Once each for generation, ref, reward and values, three times for each trained model; the last three without head.
    shares = {"share_of_matrix_peak": (10 * forward - 5 * head) / found["kit"]["seconds"] / gflops / 1e9
              } if "kit" in found else {}
    return {"engines": found, "useful_tokens": useful, "path": hybrid.path, "reason": hybrid.reason,
            "roofline": {"matrix_gflops": gflops, **shares}}


if __name__ == "__main__":
    bench.main(ppo)
