"""Checks of the machine before anything is trained, each with its cure. Checks of a run are in `diagnosis.py`.

torch and DeepSpeed are tried in a process of their own: an import that crashes or hangs is a finding too, and
this process stays small. Left out on purpose: anything that needs a network.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from dschat_kit.machine import Machine, detect
from dschat_kit.notebook.checks import Check, as_dict, render, worst
from dschat_kit.notebook.diagnosis import run_checks

__all__ = ["Check", "as_dict", "machine_checks", "render", "run_checks", "worst"]

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "env" / "constraints.txt"
SETUP = "bash env/setup.sh"

# A line of JSON after each step, so that a crash tells how far it came.
PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
layer = torch.nn.Linear(8, 4)
layer(torch.ones(2, 8)).sum().backward()
assert torch.isfinite(layer.weight.grad).all()
print("\\n" + json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}))
sys.stdout.flush()
import deepspeed
import deepspeed.runtime.rollout
print("\\n" + json.dumps({"deepspeed": deepspeed.__version__}))
"""


def machine_checks(run_root: Path = CHECKOUT / "runs", *, timeout: float = 180.0) -> list[Check]:
    """All checks of this machine; about 10 s, nearly all of it the import of torch and DeepSpeed.

    `run_root` is where runs will be written; `timeout` in seconds bounds the imports.
    """
    machine = detect()
    return [_system(), _python(), _packages(CONSTRAINTS), *_training(machine, timeout), _memory(machine),
            _shared_memory(machine), *_disk(Path(run_root)), _loopback(), *_compile_locks(), _compiler()]


def _system() -> Check:
    found = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() != "Linux":
        return Check(name="system", state="fail", found=found,
                     cure="the launcher needs Linux: open the checkout in its devcontainer (.devcontainer)")
    return Check(name="system", state="ok", found=found)


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < (3, 11, 5):
        return Check(name="python", state="fail", found=found,
                     cure=f"install Python >= 3.11.5, remove .venv, run `{SETUP}`")
    return Check(name="python", state="ok", found=found)


def _packages(constraints: Path) -> Check:
    """Installed versions against the pins. A local suffix such as +cpu is a build, not another version."""
    if not constraints.exists():
        return Check(name="packages", state="ok", found=f"no pins to compare with ({constraints} is not there)")
    other = []
    for line in constraints.read_text().splitlines():
        name, pin, pinned = line.strip().partition("==")
        if not pin or name.startswith("#"):
            continue
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue  # a package of an extra, or of another platform
        if installed != pinned:
            other.append(f"{name} {installed} instead of {pinned}")
    if other:
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        return Check(name="packages", state="warn", found=", ".join(other[:4]) + more,
                     cure=f"`{SETUP}` installs the pinned versions (remove .venv/dschat-setup first if it says ready)")
    return Check(name="packages", state="ok", found=f"all at the versions of {constraints.name}")


def _training(machine: Machine, timeout: float) -> list[Check]:
    """torch, DeepSpeed and whether this torch can use the GPUs that are here."""
    said, problem = _probe(timeout)
    if "torch" not in said:
        return [Check(name="torch", state="fail", found=problem, cure=f"remove .venv and run `{SETUP}`")]
    build = f"{said['torch']} ({'CUDA ' + said['cuda'] if said['cuda'] else 'CPU'} build)"
    checks = [Check(name="torch", state="ok", found=f"{build}, computes and differentiates")]
    if "deepspeed" in said:
        checks.append(Check(name="deepspeed", state="ok", found=said["deepspeed"]))
    else:
        checks.append(Check(name="deepspeed", state="fail", found=problem, cure=f"remove .venv and run `{SETUP}`"))
    return [*checks, _accelerator(machine, said, _gpus())]


def _probe(timeout: float) -> tuple[dict, str]:
    """What PROBE printed, and the last words of a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, env=environment)
    except subprocess.TimeoutExpired as error:
        said, problem = error.stdout or b"", f"importing did not end within {timeout:.0f} s"
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
    else:
        said = done.stdout
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        problem = f"importing failed with exit code {done.returncode}: {last[:200]}"
    found = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, problem


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows, whatever torch can do with them."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _accelerator(machine: Machine, said: dict, gpus: list[str]) -> Check:
    plan = f"{machine.default_ranks} ranks on {machine.accelerator}, {machine.dtype}"
    if gpus and not said["cuda"]:
        return Check(name="accelerator", state="warn",
                     found=f"{len(gpus)} x {gpus[0]}, but torch is a CPU build; {plan}",
                     cure=f"run `{SETUP}` with DSCHAT_PIP_ARGS naming an index with CUDA builds of torch")
    if gpus and not said["gpus"] and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return Check(name="accelerator", state="fail", found=f"{len(gpus)} x {gpus[0]}, but torch sees none",
                     cure=f"the driver is too old for CUDA {said['cuda']}: update it, or choose an older CUDA build "
                          "of torch with DSCHAT_PIP_ARGS")
    if machine.accelerator == "cuda":
        return Check(name="accelerator", state="ok", found=f"{len(gpus)} x {gpus[0] if gpus else 'GPU'}; {plan}")
    return Check(name="accelerator", state="ok", found=f"none in use, {machine.cores} cores; {plan}")


def _memory(machine: Machine) -> Check:
    """Free memory, with the limit of a container counted."""
    import psutil
    free = psutil.virtual_memory().available / 2**30
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            room = int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        free = min(free, room / 2**30)
    found = f"{free:.1f} of {machine.memory_gb:.1f} GiB free"
    if free < 3:
        return Check(name="memory", state="warn", found=found,
                     cure="the tiny preset takes about 3 GiB with two ranks: close something, or use --num-gpus 1")
    return Check(name="memory", state="ok", found=found)


def _shared_memory(machine: Machine) -> Check:
    try:
        free = shutil.disk_usage("/dev/shm").free / 2**20
    except OSError:
        return Check(name="/dev/shm", state="warn", found="not there", cure="mount it; NCCL between GPUs needs it")
    if free < 512 and machine.devices > 1 and machine.accelerator == "cuda":
        return Check(name="/dev/shm", state="warn", found=f"{free:.0f} MiB free",
                     cure="NCCL between GPUs may hang: start the container with --shm-size=1g")
    return Check(name="/dev/shm", state="ok", found=f"{free:.0f} MiB free")


def _disk(run_root: Path) -> list[Check]:
    """Whether runs can be written, and how much room there is."""
    place = run_root.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return [Check(name="run folder", state="fail", found=f"cannot write in {place}: {error.strerror}",
                      cure="choose another --run-root, or mend its permissions")]
    free = shutil.disk_usage(place).free / 2**30
    found = f"{run_root.absolute()} is writable, {free:.1f} GiB free"
    if free < 2:
        return [Check(name="run folder", state="fail" if free < 0.3 else "warn", found=found,
                      cure="free some space (a tiny run takes 0.3 GiB, smollm2-hh 5), or choose another --run-root")]
    return [Check(name="run folder", state="ok", found=found)]


def _loopback() -> Check:
    """The ranks meet on a free port of this machine."""
    cure = "ranks meet on 127.0.0.1: let the firewall or sandbox allow connections to the machine itself"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(b"x")
                server.settimeout(5)
                with server.accept()[0] as peer:
                    assert peer.recv(1) == b"x"
    except OSError as error:
        return Check(name="loopback", state="fail", found=str(error), cure=cure)
    return Check(name="loopback", state="ok", found=f"a free port and a connection to it ({port})")


def _compile_locks() -> list[Check]:
    """Locks of DeepSpeed compiles that were killed: a later compile waits on them for ever. Only told when found."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    now, checks = time.time(), []
    for lock in sorted([*Path(home).glob("*/lock"), *Path(home).glob("*/*/lock")]):
        minutes = (now - lock.stat().st_mtime) / 60
        checks.append(Check(name="compile lock", state="warn", found=f"{lock}, {minutes:.0f} minutes old",
                            cure=f"if nothing is compiling now: rm '{lock}'"))
    return checks


def _compiler() -> Check:
    """Told, never required: the kit turns off what DeepSpeed would compile at first use."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return Check(name="compiler", state="ok", found=found or "none, and none is needed (plain gloo on CPUs)")
