"""What this machine has, found without importing torch: the one place where device, dtype and ranks are decided."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from dschat_kit.config import Pipeline
from dschat_kit.sections import error


@dataclass(frozen=True, kw_only=True)
class Machine:
    accelerator: str
    """cuda | cpu: what the ranks compute on."""
    devices: int
    """Accelerators (on a CPU: cores that this process may use)."""
    cores: int
    bf16: bool
    """Whether the hardware multiplies bf16; emulated bf16 is several times slower than fp32."""
    torch_build: str
    """Version of the installed torch with its build, e.g. 2.13.0+cpu; empty when there is none."""

    @property
    def default_ranks(self) -> int:
        """One rank a GPU; two ranks on a CPU with at least two cores, so that a laptop sees the real thing."""
        return self.devices if self.accelerator == "cuda" else min(2, self.cores)

    @property
    def dtype(self) -> str:
        """The dtype that `model.dtype=auto` stands for."""
        return "bf16" if self.bf16 else "fp32"

    def check_ranks(self, ranks: int, flag: str = "--num-gpus") -> None:
        """Raises ConfigError, naming the flag that asked for them, for more ranks than there are GPUs, or on a CPU
        cores: each computes on one of its own."""
        if not 1 <= ranks <= self.devices:
            kind = "GPUs" if self.accelerator == "cuda" else "cores"
            raise error(flag, str(ranks), f"1 to {self.devices}, the {kind} of this machine", f"{flag} "
                        f"{self.default_ranks}" + ", or more machines with --launcher" * (flag == "--num-gpus"))


def detect() -> Machine:
    """Look at the machine. `DS_ACCELERATOR=cpu` (DeepSpeed's own switch) keeps GPUs out of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" or _torch_build().endswith("+cpu") else _gpu_count()
    return Machine(accelerator="cuda" if gpus else "cpu", devices=gpus or cores, cores=cores,
                   bf16=_gpu_bf16() if gpus else _cpu_bf16(), torch_build=_torch_build())


CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees (at the end of its heap up to 2 GB) for what it allocates next, unless
    MALLOC_ variables say otherwise: pages asked for anew took a third of an update in bf16. Other libraries of C are
    left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        _ = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25)  # before 2.35 at most that
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Let the system have what glibc keeps."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def available_memory() -> int:
    """Bytes of memory that can be had: of the host, and within the limit of a container, whose file cache is free."""
    free, maximum = psutil.virtual_memory().available, CGROUP / "memory.max"
    if not maximum.exists() or (limit := maximum.read_text().strip()) == "max":
        return free
    cache = sum(int(line.split()[1]) for line in (CGROUP / "memory.stat").read_text().splitlines()
                if line.startswith(("active_file ", "inactive_file ")))
    return min(free, int(limit) - int((CGROUP / "memory.current").read_text()) + cache)


class PeakMemory:
    """The largest anonymous memory (MB) of this process while inside, looked at every 10 ms; mapped files do not count.
    `before_mb` is what it held at the beginning."""

    def __enter__(self) -> "PeakMemory":
        self.before_mb = self.peak_mb = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak_mb = max(self.peak_mb, self._now())

    @staticmethod
    def _now() -> float:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def checkout() -> Path:
    """The repository that this package runs from; of a package installed without one, the current folder."""
    place = Path(__file__).resolve().parents[1]
    return place if (place / "notebooks").is_dir() else Path.cwd()


def own_path() -> str:
    """PATH with the programs of this Python's environment first, so that `dschat` and `deepspeed` are ours."""
    own = Path(sys.executable).parent  # not resolved: a venv's python is a link out of the venv
    return f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def dschat(*words: str, output=2) -> int:
    """Exit code of `dschat WORDS` in a process of its own, which writes to `output` (standard error) and computes with
    matrices that are too small for a second thread."""
    return subprocess.run([sys.executable, "-m", "dschat_kit.cli", *words], stdin=subprocess.DEVNULL, stdout=output,
                          stderr=output, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


def resolve(pipeline: Pipeline) -> Pipeline:
    """What names stand for here, written out: a run folder says what was done, not what was asked for.

    `model.dtype=auto` becomes a dtype; the data alias `hh-helpful` the folder in `$DSCHAT_DATA` or a Hub name; a Hub
    model that lies in `models/` (of this folder or of the checkout) that folder; relative paths absolute ones; the
    path of a DeepSpeed JSON its text.
    """
    model, data, zero, reward = pipeline.model, pipeline.data, pipeline.zero, pipeline.reward
    dtype = detect().dtype if model.dtype == "auto" else model.dtype
    sources = ",".join(_source(source).replace(",", "\\,") + ("" if weight is None else f":{weight:.12g}")
                       for source, weight in data.weighted_sources())
    module = _source(data.module) if data.module.endswith(".py") else data.module  # else a name, not a folder of it
    return dataclasses.replace(pipeline, model=dataclasses.replace(model, dtype=dtype, name=_model(model.name)),
                               data=dataclasses.replace(data, sources=sources, module=module),
                               zero=dataclasses.replace(zero, deepspeed=_json_text(zero.deepspeed)),
                               reward=dataclasses.replace(reward, model=reward.model and _model(reward.model)))


def _model(name: str) -> str:
    places = [Path(name), *(folder / "models" / Path(name).name for folder in (Path(), checkout()))]
    return next((str(place.absolute()) for place in places if (place / "config.json").exists()), name)


def _json_text(path: str) -> str:
    if not path or path.lstrip().startswith("{"):
        return path
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise error("zero.deepspeed", f"{path!r}, which is no JSON file: {problem}", "DeepSpeed's settings",
                    "--set zero.deepspeed=PATH") from None
    if not isinstance(tree, dict):  # its text would be taken for a path, and say nothing
        raise error("zero.deepspeed", f"{path!r}, which holds {json.dumps(tree)[:40]}", "a JSON object",
                    "--set zero.deepspeed=PATH")
    return json.dumps(tree)


def _source(name: str) -> str:
    if name == "hh-helpful":
        folder = os.environ.get("DSCHAT_DATA")
        return str(Path(folder).absolute() / "hh_helpful_256") if folder else "Dahoas/rm-static"
    return str(Path(name).absolute()) if name not in ("", "toy") and (Path(name).exists() or "*" in name) else name


def _torch_build() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def nvidia_smi(field: str) -> list[str]:
    """A field of every NVIDIA GPU that the driver shows, whatever torch can do with them; [] without a driver."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _gpu_count() -> int:
    present, visible = len(nvidia_smi("index")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, sum(part.strip() not in ("", "-1") for part in visible.split(",")))


def _gpu_bf16() -> bool:
    capabilities = nvidia_smi("compute_cap")
    return bool(capabilities) and min(map(float, capabilities)) >= 8.0


def _cpu_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text(errors="replace") for flag in ("avx512_bf16", "amx_bf16"))
