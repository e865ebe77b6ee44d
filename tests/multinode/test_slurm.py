"""env/slurm with stand-ins for Slurm's commands: which words reach DeepSpeed's launcher on each machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

STAND_INS = {
    "scontrol": 'printf "node-a\\nnode-b\\n"',  # show hostnames LIST
    "srun": 'while [[ $1 == -* ]]; do shift; done; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "deepspeed": 'echo "deepspeed $*"',
    "dschat": """echo "dschat $* grace $DSCHAT_GRACE"; export MASTER_PORT=29555
                 while [[ $1 != --launcher ]]; do shift; done; $2 --module dschat_kit.train.ppo --run RUNS/ppo""",
}


@pytest.fixture
def submitted(tmp_path) -> list[str]:
    shutil.copytree(Path(__file__).parents[2] / "env" / "slurm", tmp_path / "env" / "slurm")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node-[a-b]",
             "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "STAGE": "ppo", "PRESET": "tiny",
             "RUN_ROOT": str(tmp_path / "runs")}
    done = subprocess.run(["bash", str(tmp_path / "env" / "slurm" / "stage.sbatch")], text=True, capture_output=True,
                          env={**os.environ, **slurm})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "hostfile").read_text() == "node-a slots=8\nnode-b slots=8\n"
    return done.stdout.splitlines()


def test_every_machine_gets_its_number_and_the_whole_job_its_ranks(submitted, tmp_path):
    prepared, *nodes = submitted
    assert f"ppo --preset tiny --run-root {tmp_path}/runs --resume auto --num-gpus 16 --launcher srun" in prepared
    assert prepared.endswith("grace 100")
    assert nodes == [f"deepspeed --hostfile {tmp_path}/runs/hostfile --no_ssh --node_rank {number} "
                     "--master_addr node-a --master_port 29555 --module dschat_kit.train.ppo --run RUNS/ppo"
                     for number in (0, 1)]
