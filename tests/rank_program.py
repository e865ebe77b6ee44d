"""One rank of several stages after one another, in one process: a launch costs ten seconds, a stage of two steps one.

    python rank_program.py JOBS.json      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import json
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from sickness import SICKNESSES

from dschat_kit.engine.ema import Ema
from dschat_kit.engine.zero import full_state_dict, whole_layers
from dschat_kit.models import packed, saving
from dschat_kit.rlhf.experience import Experience
from dschat_kit.runs import StageRun, write_json
from dschat_kit.train import dpo, judge, ppo, rank, reward, sft
from dschat_kit.train.ppo_metrics import over_ranks
from dschat_kit.train.session import Session
from dschat_kit.train.watch import Watch

B, P, A, STEPS, DECAY = 16, 6, 8, 20, 0.9


class Counted(deepspeed.zero.GatheredParameters):
    """DeepSpeed's context, counting the bytes that are whole at the same time."""
    now = peak = 0

    def __enter__(self):
        super().__enter__()
        params = self.params if self.enabled else ()
        self.bytes = sum(parameter.ds_numel * parameter.element_size() for parameter in params)
        Counted.now += self.bytes
        Counted.peak = max(Counted.peak, Counted.now)

    def __exit__(self, *exc):
        Counted.now -= self.bytes
        return super().__exit__(*exc)


class Counting(Session):
    """A session that writes gathered.json: the bytes of the model, and the most that was whole at once while it was
    loaded and exported."""

    def begin(self, *args):
        self.loading, Counted.peak = Counted.peak, 0
        return super().begin(*args)

    def export(self, model, *args):
        Counted.peak = 0
        super().export(model, *args)
        whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
        if self.is_main:
            write_json(self.run.path / "gathered.json", {"loading": self.loading, "export": Counted.peak,
                                                         "whole": whole})


def experience(vocabulary: int) -> Experience:
    """One fixed rollout of B rows with answers of different lengths."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, A + 1, (B, 1), generator=g)
    mask = torch.arange(A) < lengths
    sequences = torch.randint(2, vocabulary, (B, P + A), generator=g)
    attention = torch.cat([torch.ones(B, P, dtype=torch.bool), mask], dim=1)
    floats = {name: torch.randn(B, A, generator=g) * mask for name in
              ("values", "rewards", "advantages", "returns")}
    logprobs = -5 - torch.rand(B, A, generator=g)
    return Experience(sequences=sequences, attention_mask=attention, response_mask=mask, logprobs=logprobs,
                      ref_logprobs=logprobs, scores=torch.randn(B, generator=g), **floats)


def replay(session: Session, saved_average: str) -> dict:
    """20 updates on one experience; the moving average against its closed form, and against the one that another job
    of other ranks and another ZeRO stage saved (a folder, or ""). Writes replay.json."""
    _, tokenizer, _ = session.prepare_data()
    roles, session.total = ppo.build_roles(session, tokenizer), STEPS
    mine = experience(len(tokenizer)).select(range(session.rank, B, session.world_size))
    model, rows = roles.actor.module, []
    ema = Ema(roles.actor, DECAY)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    closed = {name: value.double().clone() for name, value in full_state_dict(model, session.is_main).items()}
    for _ in range(STEPS):
        rows += over_ranks(session, [ppo.update(session, roles, mine, session.pipeline.ppo, 1.0,
                                                {"lr_actor": 1e-3, "lr_critic": 1e-3})])
        ema.update()
        state = full_state_dict(model, session.is_main)
        closed = {name: DECAY * closed[name] + (1 - DECAY) * state[name].double() for name in state}
    found = {name: value.clone() for layer in whole_layers(model, session.is_main)
             for name, value in ema.instead(layer).items() if name in trained}
    place = str(session.run.path / "ema")
    ema.save_checkpoint(place, "state")
    dist.barrier()
    again = Ema(roles.actor, DECAY)
    again.load_checkpoint(place, "state")
    assert all(torch.equal(part, ema.parts[name][0]) for name, (part, _) in again.parts.items())
    moved = 0.0
    if saved_average:
        again.load_checkpoint(saved_average, "state")
        moved, = session.largest(max(float((part - ema.parts[name][0]).abs().max()) for name, (part, _) in
                                     again.parts.items()))
    elements, = session.sum(sum(part.numel() for part, _ in ema.parts.values()))
    if session.is_main:
        assert sorted(found) == sorted(trained), set(trained) ^ set(found)
        worst = max(float((found[name] - closed[name]).abs().max() / closed[name].abs().max()) for name in found)
        drift = max(float((state[name] - closed[name]).abs().max()) for name in found)
        write_json(session.run.path / "replay.json", {
            "rows": rows, "ema_error": worst, "ema_distance": drift, "ema_elements": elements, "ema_moved": moved,
            "elements": sum(value.numel() for value in found.values()),
            "dtypes": sorted({str(value.dtype) for value in found.values()})})
    return {}


def main(jobs: list[dict]) -> None:
    first, deepspeed.zero.GatheredParameters = True, Counted
    packed.LEAST = 0  # weights are packed as those of a model of real size are
    for job in jobs:
        run = StageRun(job["path"])
        if first:
            rank.start_distributed(run.pipeline.seed)
            first = False
        saving.SHARD_BYTES, Counted.peak = job.get("shard_bytes", 2**31), 0
        session = Counting(run, resume=job.get("resume", False), console=sys.stdout,
                           watch=Watch(lambda error: 1))
        torch.manual_seed(0)
        stages = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}
        with pytest.MonkeyPatch.context() as patch:
            for name in job.get("sick", ()):
                SICKNESSES[name](patch)
            if job.get("replay"):
                replay(session, job.get("saved_average", ""))
            else:
                session.finish((judge.judge if job.get("judge") else stages[run.stage])(session))
        dist.barrier()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
