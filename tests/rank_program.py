"""One rank of several stages after one another, in one process: a launch costs ten seconds, a stage of two steps one.

    python rank_program.py JOBS.json      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dschat_kit.engine.ema import Ema
from dschat_kit.engine.zero import full_state_dict
from dschat_kit.rlhf.experience import Experience
from dschat_kit.runs import StageRun, write_json
from dschat_kit.train import dpo, judge, ppo, rank, reward, sft
from dschat_kit.train.session import Session
from dschat_kit.train.watch import Watch

B, P, A, STEPS, DECAY = 16, 6, 8, 20, 0.9


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


def replay(session: Session) -> dict:
    """20 updates on one experience; the moving average against its closed form. Writes replay.json."""
    _, tokenizer, _ = session.prepare_data()
    roles, session.total = ppo.build_roles(session, tokenizer), STEPS
    mine = experience(len(tokenizer)).select(range(session.rank, B, session.world_size))
    model, rows = roles.actor.module, []
    ema = Ema(roles.actor, DECAY)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    closed = {name: value.double().clone() for name, value in full_state_dict(model, session.is_main).items()}
    for _ in range(STEPS):
        rows.append(ppo.update(session, roles, mine, session.pipeline.ppo, 1.0,
                               {"lr_actor": 1e-3, "lr_critic": 1e-3}))
        ema.update()
        state = full_state_dict(model, session.is_main)
        closed = {name: DECAY * closed[name] + (1 - DECAY) * state[name].double() for name in state}
    found = ema.state_dict()
    place = str(session.run.path / "ema")
    ema.save_checkpoint(place, "state")
    dist.barrier()
    again = Ema(roles.actor, DECAY)
    again.load_checkpoint(place, "state")
    assert all(torch.equal(part, ema.parts[name][0]) for name, (part, _) in again.parts.items())
    elements, = session.sum(sum(part.numel() for part, _ in ema.parts.values()))
    if session.is_main:
        assert sorted(found) == sorted(trained), set(trained) ^ set(found)
        worst = max(float((found[name] - closed[name]).abs().max() / closed[name].abs().max()) for name in found)
        drift = max(float((state[name] - closed[name]).abs().max()) for name in found)
        write_json(session.run.path / "replay.json", {
            "rows": rows, "ema_error": worst, "ema_distance": drift, "ema_elements": elements,
            "elements": sum(value.numel() for value in found.values()),
            "dtypes": sorted({str(value.dtype) for value in found.values()})})
    return {}


def main(jobs: list[dict]) -> None:
    first = True
    for job in jobs:
        run = StageRun(job["path"])
        if first:
            rank._start(run)
            first = False
        session = Session(run, resume=job.get("resume", False), console=sys.stdout,
                          watch=Watch(lambda error: 1))
        torch.manual_seed(0)
        if job.get("replay"):
            replay(session)
        else:
            stages = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}
            session.finish((judge.judge if job.get("judge") else stages[run.stage])(session))
        dist.barrier()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
