"""One rank of `dschat bench ppo`: a whole PPO iteration, ours (`kit`) and the same loop on plain transformers (`hf`).

The peer is the loop that one writes with transformers alone: `generate` in its fastest way until all rows have ended,
forward passes of the padded batch with its mask, logits at every position and a log-softmax in fp32 over the response,
the actor's log-probabilities computed again. Weights, engines, losses and micro batches are the same.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dschat_kit.config import Pipeline
from dschat_kit.engine.engines import freeze
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.models.attention import take_products
from dschat_kit.models.loading import DTYPES, model_inputs
from dschat_kit.models.scalar_model import ScalarModel, last_token
from dschat_kit.rlhf.losses import policy_loss, value_loss
from dschat_kit.rlhf.rollout import Roles, Scored, make_experience
from dschat_kit.train import bench
from dschat_kit.train.ppo import iterate, trained
from dschat_kit.train.ppo_metrics import Clock
from dschat_kit.train.rank import start_distributed
from dschat_kit.train.roles import scorer
from dschat_kit.train.session import Session
from dschat_kit.train.telemetry import weights_of
from dschat_kit.train.watch import Watch

PHASES, LR = ("generation", "scoring", "training"), 1e-6


class _Job(Session):
    """What the loop asks of a session, without a run folder."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        self.pipeline, self.device, self.watch = pipeline, device, Watch(lambda hanging: 1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


def roles_of(spec: dict, job: _Job) -> Roles:
    """Four models of the same shape; actor and critic with their optimisers."""
    actor = bench.load_model(spec["model"], spec["dtype"])
    return Roles(actor=trained(job, actor, LR), critic=trained(job, scalar(spec), LR), **frozen(spec, job, scorer))


def frozen(spec: dict, job: _Job, make: Callable) -> dict[str, nn.Module]:
    """Reference and reward model, the same weights in every call."""
    return {"ref": make(job, bench.load_model(spec["model"], spec["dtype"])), "reward": make(job, scalar(spec))}


def scalar(spec: dict) -> ScalarModel:
    """A model of the shape with a head of one scalar."""
    return ScalarModel(bench.load_model(spec["model"], spec["dtype"], AutoModelForSequenceClassification, num_labels=1))


def attend(roles: Roles, products: bool) -> None:
    """Give all models transformers' default attention, or what ours take on this machine."""
    every = (part for role in vars(roles).values() for part in role.modules())
    for model in (part for part in every if isinstance(part, PreTrainedModel)):
        model.set_attn_implementation("sdpa")
        if products:
            take_products(model)


def iteration(job: _Job, roles: Roles, work: bench.Work, hybrid: HybridEngine) -> list[float]:
    """Seconds of each of PHASES, in the loop that trains."""
    attend(roles, products=True)
    clock = Clock()
    iterate(job, roles, hybrid, *work.kit(), 0, job.pipeline.ppo, clock)
    return [clock.seconds[phase] for phase in PHASES]


def plain_logprobs(model: nn.Module, sequences: Tensor, mask: Tensor, A: int, temperature: float) -> Tensor:
    """(B, A) from logits at every position."""
    logits = model(**model_inputs(model, sequences, mask), use_cache=False).logits[:, -A - 1:-1]
    return (logits.float() / temperature).log_softmax(-1).gather(-1, sequences[:, -A:, None]).squeeze(-1)


def plain_iteration(job: _Job, roles: Roles, work: bench.Work, generate) -> list[float]:
    """The same on plain transformers; `generate()` returns (B, T) padded sequences."""
    times, settings = [time.perf_counter()], job.pipeline.ppo
    sequences, T = generate(), work.temperature
    times.append(time.perf_counter())
    attend(roles, products=False)
    A = sequences.shape[1] - work.prompts.shape[1]
    response = torch.arange(A, device=sequences.device) < work.lengths[:, None]
    mask, parts = torch.cat([work.mask, response], 1), []
    with torch.no_grad():
        for rows in torch.arange(len(mask)).split(job.pipeline.rollout.micro_batch_size):
            tokens, real = sequences[rows], mask[rows]
            logprobs, ref = (plain_logprobs(model, tokens, real, A, T) for model in (roles.actor, roles.ref))
            parts.append(Scored(logprobs=logprobs, ref_logprobs=ref, entropy=torch.zeros_like(ref),
                                values=roles.critic(tokens, real)[:, -A - 1:-1],
                                scores=last_token(roles.reward(tokens, real), real)))
    scored = Scored(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
    experience = make_experience(sequences, mask, response, response.any(1), scored, settings, job.sum_tensor)
    tokens, = job.sum(response.sum())
    times.append(time.perf_counter())
    for some in experience.split(settings.micro_batch_size):
        logprobs = plain_logprobs(roles.actor, some.sequences, some.attention_mask, A, T)
        job.backward(roles.actor, policy_loss(logprobs, some.logprobs, some.advantages, some.response_mask,
                                              settings.clip_range, tokens)[0])
        values = roles.critic(some.sequences, some.attention_mask)[:, -A - 1:-1]
        job.backward(roles.critic, value_loss(values, some.values, some.returns, some.response_mask,
                                              settings.value_clip_range, tokens)[0])
    return np.diff([*times, time.perf_counter()]).tolist()


def ppo(spec: dict) -> dict:
    """The JSON of `dschat bench ppo`; `phases` holds the median of each."""
    device, rows = start_distributed(0), spec["batch"] * dist.get_world_size()
    micro = next(size for size in range(min(8, spec["batch"]), 0, -1) if spec["batch"] % size == 0)
    job = _Job(Pipeline().with_overrides([
        f"zero.stage={spec['zero']}", f"model.dtype={spec['dtype']}", f"ppo.rollout_batch_size={rows}",
        f"ppo.mini_batch_size={rows}", f"ppo.micro_batch_size={micro}", f"rollout.micro_batch_size={micro}",
        f"ppo.lr_actor={LR}", f"ppo.lr_critic={LR}", "rollout.reuse_logprobs=always"]), device)
    roles = roles_of(spec, job)
    actor = roles.actor.module
    work = bench.Work(spec, actor.config, job.rank, device)
    calls, hybrid = bench.engines_of({**spec, "engines": ["hf"]}, work, roles.actor, spec["zero"] == 3)
    generate = calls["hf"][bench.fastest(calls["hf"])] if "hf" in spec["engines"] else None

    loops = {"kit": lambda: iteration(job, roles, work, hybrid)}
    if generate:
        plain = replace(roles, **frozen(spec, job, lambda job, model: freeze(model, job.pipeline, job.device)))
        loops["hf"] = lambda: plain_iteration(job, plain, work, generate)
    loops = {name: loop for name, loop in loops.items() if name in spec["engines"]}
    for loop in loops.values():  # warm-up; Adam's moments are allocated
        loop()
    seconds, peaks = {name: [] for name in loops}, {name: bench.peak_anon_mb(loop) for name, loop in loops.items()}
    peak = bench.roofline(spec["dtype"], device)
    for _ in range(spec["repeats"]):
        for name, loop in loops.items():
            dist.barrier()
            seconds[name].append(job.largest(*loop()))
    useful, forward, elements = job.sum(work.lengths.sum(), *work.cost(actor))
    head = 2 * weights_of(actor)[1] * useful
    gflops, bandwidth = job.sum(*bench.roofline(spec["dtype"], device, peak).values())
    found = {}
    for name, times in seconds.items():
        total, phases = float(np.median(np.sum(times, 1))), np.median(times, 0).tolist()
        found[name] = {"tokens_per_second": useful / total, "seconds": total, "peak_anon_mb": peaks[name],
                       "phases": dict(zip(PHASES, phases, strict=True))}
    # Once each for generation, ref, reward and values, three times for each trained model; the last three without head.
    shares, read = {}, elements * DTYPES[spec["dtype"]].itemsize
    if "kit" in found:
        shares = {"share_of_matrix_peak": (10 * forward - 5 * head) / found["kit"]["seconds"] / gflops / 1e9,
                  "share_of_bandwidth": read / found["kit"]["phases"]["generation"] / bandwidth / 1e9}
    same = bench.same_greedy_tokens(actor, work) if hybrid.path == "slots" else None
    return {"engines": found, "identical_greedy_tokens": same, "useful_tokens": useful, "path": hybrid.path,
            "reason": hybrid.reason, "reuse_logprobs": job.pipeline.rollout.reuse_logprobs,
            "roofline": {"matrix_gflops": gflops, "read_gb_per_s": bandwidth, **shares}}


if __name__ == "__main__":
    bench.main(ppo)
