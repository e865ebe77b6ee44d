"""Two machines: network namespaces joined by a veth pair, one rank each, one file system. All three stages by
DeepSpeed's launcher without ssh; one stage by pdsh and by torchrun; and the link that is lost."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from test_ranks import SETTINGS, environment, metrics, processes  # noqa: E402

from dschat_kit.runs import open_run  # noqa: E402

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
BIN = Path(sys.executable).parent
SETS = ["sft.max_steps=20", "reward.max_steps=8", "ppo.max_steps=2", "telemetry.hang_minutes=0.5"]
NODES = ("a", "b")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """The names of two namespaces; 10.213.77.1 and .2 are their addresses, eth0 their network."""
    if not shutil.which("ip"):
        pytest.skip("two nodes need `ip` (Debian: iproute2)")
    names = [f"dschat{os.getpid()}{node}" for node in NODES]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.213.77.{number}/24 dev eth0")
            for device in ("lo", "eth0"):
                ip(f"-n {name} link set {device} up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory, nodes):
    """The folder both nodes see: runs, a hostfile, and stand-ins for ssh's programs that enter a namespace instead."""
    folder = tmp_path_factory.mktemp("two nodes")
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in nodes))
    (folder / "bin").mkdir()
    (folder / "bin" / "pdsh").write_text(PDSH)
    (folder / "bin" / "pdsh").chmod(0o755)
    return folder


PDSH = """#!/usr/bin/env bash
# pdsh -S -f N -w HOST,HOST COMMAND: %n in it is the number of the host; the largest exit code
while [[ $1 == -* ]]; do [[ $1 == -w ]] && hosts=$2; [[ $1 == -S ]] && shift || shift 2; done
number=0
for host in ${hosts//,/ }; do
    ip netns exec "$host" bash -c "${*//%n/$number}" & number=$((number + 1)); jobs="$jobs $!"
done
code=0
for job in $jobs; do wait "$job" || code=$?; done
exit $code
"""


def start(node: str, place: Path, *words: str) -> subprocess.Popen:
    env = {**environment(), "GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{place}/bin:{BIN}:{os.environ['PATH']}",
           "DS_ENV_FILE": str(place / "none")}
    return subprocess.Popen(["ip", "netns", "exec", node, *words], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def by(launcher: str, place: Path, rank: int) -> str:
    """The words that start one node's rank."""
    where = f"--node_rank {rank} --master_addr 10.213.77.1 --master_port 29511"
    return {"no_ssh": f"deepspeed --hostfile '{place}/hostfile' --no_ssh {where}",
            "pdsh": f"deepspeed --hostfile '{place}/hostfile' --no_ssh_check --master_addr 10.213.77.1 "
                    "--master_port 29511",
            "torchrun": f"torchrun --nnodes 2 --nproc_per_node 1 {where}"}[launcher]


def launch(launcher: str, stage: str, nodes, place: Path, root: Path, sets=()) -> list[subprocess.Popen]:
    """The first node prepares the stage and starts its rank; the others join, unless pdsh starts them."""
    jobs = [start(nodes[0], place, sys.executable, "-m", "dschat_kit.cli", stage, "--preset", "tiny", "--run-root",
                  str(root), "--num-gpus", "2", "--launcher", by(launcher, place, 0), "--set", *SETTINGS, *SETS, *sets)]
    while launcher != "pdsh" and not (root / stage / "config.json").exists():
        assert jobs[0].poll() is None, jobs[0].communicate()
        time.sleep(0.05)
    if launcher != "pdsh":
        dashes = "-- " * (launcher == "torchrun")
        words = f'{by(launcher, place, 1)} --module {dashes}dschat_kit.train.{stage} --run "$0"'
        prefix = shlex.join([sys.executable, "-m", "dschat_kit.notebook.launch", "--"])
        jobs.append(start(nodes[1], place, "bash", "-c", f"{prefix} {words}", str(root / stage)))
    return jobs


def succeed(jobs: list[subprocess.Popen], root: Path) -> None:
    for job in jobs:
        out, err = job.communicate(timeout=300)
        assert job.returncode == 0, out + err
    assert processes(root) == {}


def received(node: str) -> int:
    """Bytes that came to a node over the link."""
    command = ["ip", "netns", "exec", node, "cat", "/sys/class/net/eth0/statistics/rx_bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def chain(nodes, place) -> Path:
    root = place / "run"
    for stage in ("sft", "reward", "ppo"):
        before = received(nodes[1])
        succeed(launch("no_ssh", stage, nodes, place, root), root)
        assert received(nodes[1]) - before > 500_000
    return root


def test_all_three_stages_run_on_both(chain):
    for stage in ("sft", "reward", "ppo"):
        run = open_run(chain, stage)
        assert run.status["state"] == "finished" and run.result["world_size"] == 2
        assert {"launch.log", "launch1.log", "rank0.log", "rank1.log"} <= {path.name for path in run.logs.iterdir()}
    losses = [row["loss"] for row in metrics(chain, "sft")]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("launcher", ["pdsh", "torchrun"])
def test_other_launchers_give_the_same_run(chain, nodes, place, launcher):
    root = place / launcher
    shutil.copytree(chain / "data", root / "data")
    succeed(launch(launcher, "sft", nodes, place, root), root)
    assert [row["loss"] for row in metrics(root, "sft")] == [row["loss"] for row in metrics(chain, "sft")]


def test_a_lost_link_ends_both_with_a_named_error(chain, nodes, place):
    root = place / "lost"
    shutil.copytree(chain / "data", root / "data")
    jobs = launch("no_ssh", "sft", nodes, place, root, ["sft.max_steps=5000", "sft.epochs=2000",
                                                        "telemetry.hang_minutes=0.4"])
    while not (root / "sft" / "metrics.jsonl").exists() or len(metrics(root, "sft")) < 3:
        assert jobs[0].poll() is None and jobs[1].poll() is None, [job.communicate() for job in jobs]
        time.sleep(0.05)
    ip(f"-n {nodes[0]} link set eth0 down")
    begun = time.monotonic()
    try:
        ends = [job.communicate(timeout=120) for job in jobs]
    finally:
        ip(f"-n {nodes[0]} link set eth0 up")
    assert time.monotonic() - begun < 90
    for rank, (job, (out, err)) in enumerate(zip(jobs, ends, strict=True)):
        assert job.returncode == 1 and f"rank {rank}: no progress for 24 s" in err + out, out + err
        assert "link to another machine is lost" in err and "Traceback" not in err
        assert "most recent call first" in (root / "sft" / "logs" / f"rank{rank}.log").read_text()
    assert open_run(root, "sft").status["state"] == "failed" and processes(root) == {}
    assert "link to another machine is lost" in open_run(root, "sft").status["error"]
