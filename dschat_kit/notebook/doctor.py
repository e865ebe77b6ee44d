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
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil

from dschat_kit.machine import Machine, available_memory, checkout, detect, nvidia_smi
from dschat_kit.notebook.diagnosis import Check

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


def machine_checks(run_root: Path | None = None) -> list[Check]:
    """All checks of this machine; about 10 s, nearly all of it the import of torch and DeepSpeed. `run_root` is where
    runs will be written (default: runs/ of the checkout)."""
    machine, python = detect(), platform.python_version()
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [
        Check("system", f"{platform.system()} {platform.release()} {platform.machine()}",
              "fail" if platform.system() != "Linux" else "ok",
              "the launcher needs Linux: open the checkout in its devcontainer (.devcontainer)"),
        Check("python", f"{python} ({sys.executable})", "fail" if sys.version_info < (3, 11, 5) else "ok",
              f"install Python >= 3.11.5, remove .venv, run `{SETUP}`"),
        _packages(checkout() / "env" / "constraints.txt"), *_training(machine), _memory(),
        _shared_memory(machine), _disk(Path(run_root or checkout() / "runs").absolute()), _loopback(),
        # told, never required: the kit turns off what DeepSpeed would compile at first use
        Check("compiler", compiler or "none, and none is needed (plain gloo on CPUs)")]


def _packages(constraints: Path) -> Check:
    """Installed versions against the pins. A local suffix such as +cpu is a build, not another version."""
    if not constraints.exists():
        return Check("packages", f"no pins to compare with ({constraints} is not there)")
    other = []
    for line in constraints.read_text().splitlines():
        name, pin, pinned = line.strip().partition("==")
        with suppress(metadata.PackageNotFoundError):  # a package of an extra, or of another platform
            if pin and name[0] != "#" and (installed := metadata.version(name).split("+")[0]) != pinned:
                other.append(f"{name} {installed} instead of {pinned}")
    more = f" and {len(other) - 4} more" if len(other) > 4 else ""
    return Check("packages", ", ".join(other[:4]) + more if other else f"all at the versions of {constraints.name}",
                 "warn" if other else "ok",
                 f"`{SETUP}` installs the pinned versions (remove .venv/dschat-setup first if it says ready)")


def _training(machine: Machine, timeout: float = 180.0) -> list[Check]:
    """torch, DeepSpeed and whether this torch can use the GPUs that are here; `timeout` seconds bound the imports."""
    said, problem = _probe(timeout)
    cure = f"remove .venv and run `{SETUP}`"
    if "torch" not in said:
        return [Check("torch", problem, "fail", cure)]
    build = f"{said['torch']} ({'CUDA ' + said['cuda'] if said['cuda'] else 'CPU'} build)"
    return [Check("torch", f"{build}, computes and differentiates"),
            Check("deepspeed", said.get("deepspeed", problem), "ok" if "deepspeed" in said else "fail", cure),
            _accelerator(machine, said, nvidia_smi("name"))]


def _probe(timeout: float) -> tuple[dict, str]:
    """What PROBE printed, and the last words of a failure."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, timeout=timeout,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        said, problem = error.stdout or b"", f"importing did not end within {timeout:.0f} s"
    else:
        said, last = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        problem = f"importing failed with exit code {done.returncode}: {(last or ['it said nothing'])[0][:200]}"
    found = {}
    for line in said.decode(errors="replace").splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, problem


def _accelerator(machine: Machine, said: dict, gpus: list[str]) -> Check:
    plan = f"{machine.default_ranks} ranks on {machine.accelerator}, {machine.dtype}"
    here = f"{len(gpus)} x {gpus[0] if gpus else 'GPU'}"
    if gpus and not said["cuda"]:
        return Check("accelerator", f"{here}, but torch is a CPU build; {plan}", "warn",
                     f"run `{SETUP}` with DSCHAT_PIP_ARGS naming an index with CUDA builds of torch")
    if gpus and not said["gpus"] and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return Check("accelerator", f"{here}, but torch sees none", "fail",
                     f"the driver is too old for CUDA {said['cuda']}: update it, or choose an older CUDA build of "
                     "torch with DSCHAT_PIP_ARGS")
    return Check("accelerator", f"{here if machine.accelerator == 'cuda' else f'none in use, {machine.cores} cores'}; "
                                 f"{plan}")


def _memory() -> Check:
    """Free memory, with the limit of a container counted."""
    free = available_memory()
    return Check("memory", f"{free / 2**30:.1f} of {psutil.virtual_memory().total / 2**30:.1f} GiB free",
                 "warn" if free < 3 * 2**30 else "ok",
                 "the tiny preset takes about 3 GiB with two ranks: close something, or use --num-gpus 1")


def _shared_memory(machine: Machine) -> Check:
    if not os.path.exists("/dev/shm"):
        return Check("/dev/shm", "not there", "warn", "mount it; NCCL between GPUs needs it")
    free = shutil.disk_usage("/dev/shm").free / 2**20
    small = free < 512 and machine.devices > 1 and machine.accelerator == "cuda"
    return Check("/dev/shm", f"{free:.0f} MiB free", "warn" if small else "ok",
                 "NCCL between GPUs may hang: start the container with --shm-size=1g")


def _disk(run_root: Path) -> Check:
    """Whether runs can be written, and how much room there is."""
    place = next(folder for folder in (run_root, *run_root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return Check("run folder", f"cannot write in {place}: {error.strerror}", "fail",
                     "choose another --run-root, or mend its permissions")
    free = shutil.disk_usage(place).free / 2**30
    return Check("run folder", f"{run_root} is writable, {free:.1f} GiB free",
                 "fail" if free < 0.3 else "warn" if free < 2 else "ok",
                 "free some space (a tiny run takes 0.3 GiB, smollm2-hh 5), or choose another --run-root")


def _loopback() -> Check:
    """The ranks meet on a free port of this machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return Check("loopback", str(error), "fail", "ranks meet on 127.0.0.1: let the firewall or sandbox allow "
                                                     "connections to the machine itself")
    return Check("loopback", "a free port and a connection to it")
