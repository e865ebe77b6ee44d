"""Plain processes as ranks, for tests that put many stages into one launch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from dschat_kit.machine import resolve
from dschat_kit.presets import get_preset

SETTINGS = """data.rows=600 data.eval_rows=48 data.stage_split=1,1,1 model.hidden_size=32 model.layers=2 model.heads=2
    model.intermediate_size=64 model.vocab_size=300 model.dtype=fp32 sampling.max_new_tokens=8 zero.stage=2
    sft.max_steps=20 sft.epochs=9 sft.batch_size=8 sft.micro_batch_size=2 sft.eval_every=20 sft.eval_rows=16
    reward.max_steps=20 reward.epochs=9 reward.batch_size=8 reward.micro_batch_size=2 reward.eval_every=20
    reward.eval_rows=16 dpo.max_steps=20 dpo.epochs=9 dpo.batch_size=8 dpo.micro_batch_size=2 dpo.eval_every=20
    dpo.eval_rows=15 dpo.eval_prompts=8 ppo.max_steps=2 ppo.rollout_batch_size=16
    ppo.mini_batch_size=16 ppo.micro_batch_size=4 ppo.eval_prompts=8 rollout.micro_batch_size=8
    checkpoint.every_steps=0 telemetry.samples=2""".split()
ROOT = Path(__file__).parents[1]


def job(root: Path, stage: str, *sets: str, **more) -> dict:
    pipeline = resolve(get_preset("tiny").with_overrides([*SETTINGS, *sets]))
    return {"path": str(root / stage), "pipeline": pipeline.to_dict(), **more}


def launch(folder: Path, jobs: list[dict], ranks: int, **environment: str) -> list[str]:
    """Run the jobs on so many ranks; what each rank printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    for job in jobs:
        path = Path(job["path"])
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps({"stage": path.name, "preset": "tiny", "config_hash": "test",
                                                      "seed": 0, "pipeline": job["pipeline"]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
              "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), **environment}
    command = [sys.executable, str(Path(__file__).with_name("rank_program.py")), str(folder / "jobs.json")]
    logs = [open(folder / f"rank{rank}.log", "w+") for rank in range(ranks)]
    group = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log,
                              stderr=subprocess.STDOUT) for rank, log in enumerate(logs)]
    try:
        codes = [process.wait(timeout=600) for process in group]
    finally:
        for process in group:
            process.kill()
    said = []
    for log in logs:
        log.seek(0)
        said.append(log.read())
        log.close()
    assert not any(codes), "\n".join(text[-4000:] for text in said)
    return said
