"""The run folder: the only contract between notebooks, launched ranks and later stages.

    ROOT/<stage>/config.json  status.json  metrics.jsonl  samples.jsonl  result.json  logs/  checkpoints/  model/

Readers never see half a file (temporary name, then rename). Who uses a stage is told by flock, not by
a file's existence, so a crash leaves nothing to clean up.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from dschat_kit.config import STAGES, ConfigError, Pipeline

__all__ = ["RunError", "StageRun", "open_run", "prepare_stage", "read_json", "write_json"]

REQUIRES = {"data": (), "sft": ("data",), "reward": ("data", "sft"), "ppo": ("data", "sft", "reward"),
            "chat": ("sft", "ppo")}
"""Stages whose results a stage reads; data is built on the way where it is missing."""


class RunError(RuntimeError):
    """Something about a run folder that the user can mend. Shown without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this: a cell shows the message alone
        return [f"error: {self}"]


def write_json(path: Path, obj) -> None:
    """Write atomically: a reader sees the old file or the new one, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(obj, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}\n  change: free space, permissions or --run-root") from error


def read_json(path: Path):
    """Parse a JSON file. Raises RunError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not readable JSON: {error}") from None


class StageRun:
    """One stage's folder. Opening it reads nothing; every property looks at the files anew."""

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.stage = self.path.name
        if self.stage not in STAGES:
            raise RunError(f"{self.path} is no stage folder\n  expected: a folder named {' | '.join(STAGES)} in a run folder")
        self.root = self.path.parent
        self.metrics_path, self.samples_path = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.logs, self.model_dir = self.path / "logs", self.path / "model"
        self.checkpoints = self.path / "checkpoints"

    @property
    def config(self) -> dict:
        return read_json(self.path / "config.json")

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline.from_dict(self.config["pipeline"])

    @property
    def status(self) -> dict:
        """status.json as it is; {} before the stage was ever started."""
        return read_json(self.path / "status.json") if (self.path / "status.json").exists() else {}

    @property
    def result(self) -> dict:
        return read_json(self.path / "result.json")

    @property
    def state(self) -> str:
        """missing | running | finished | failed | interrupted. Running without a process that holds it is interrupted."""
        state = self.status.get("state", "missing")
        if state == "running" and not self.in_use():
            return "interrupted"
        return state

    def in_use(self) -> bool:
        """Whether a rank or a launcher holds this folder now."""
        return any(_locked(self.path / name) for name in (".lock", ".launch.lock"))

    def update_status(self, **changes) -> None:
        """Merge into status.json; sets `updated`."""
        now = time.time()
        base = {"state": "running", "step": 0, "total": 0, "started": now, "error": None, "pid": os.getpid(),
                "host": socket.gethostname()}
        write_json(self.path / "status.json", {**base, **self.status, **changes, "updated": now})

    @contextmanager
    def lock(self, name: str = ".lock"):
        """Hold the folder. Raises RunError when another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / name, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path} is in use by another process\n"
                               f"  change: wait for it, end it, or choose another --run-root") from None
            yield


def _locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def open_run(root: Path, stage: str) -> StageRun:
    """The folder of a stage for reading; `state` says whether there is anything in it."""
    return StageRun(Path(root) / stage)


def prepare_stage(root: Path, stage: str, pipeline: Pipeline, *, preset: str = "", resume: str = "never",
                  fresh: bool = False) -> tuple[StageRun, str]:
    """Make a stage's folder ready and say what has to happen: `reuse`, `train` or `resume`.

    Finished with the same configuration is reused; an interrupted or failed one needs resume="auto"; a changed
    one needs fresh=True, which moves the old folder aside and never deletes it. Raises RunError or ConfigError.
    """
    run = open_run(root, stage)
    _require_earlier(run, pipeline)
    wanted = {"stage": stage, "preset": preset, "config_hash": stage_hash(pipeline, stage), "seed": pipeline.seed,
              "pipeline": pipeline.to_dict()}
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {run.path}: {error.strerror}\n  change: permissions or --run-root") from error
    if run.in_use():
        raise RunError(f"{run.path} is in use by another process\n  change: wait for it, end it, or choose another --run-root")
    with run.lock():
        action = _decide(run, wanted, resume, fresh)
    if action == "aside":
        run.path.rename(_aside(run.path))
        action = "train"
    if action != "reuse":
        run.logs.mkdir(parents=True, exist_ok=True)
        write_json(run.path / "config.json", wanted)
    return run, action


def stage_hash(pipeline: Pipeline, stage: str) -> str:
    """`Pipeline.config_hash` with the content of local source files, so that changed rows are a changed stage."""
    digest = hashlib.sha256(pipeline.config_hash(stage).encode())
    for path, _ in parse_sources(pipeline.data.sources):
        for file in source_files(path):
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def parse_sources(text: str) -> list[tuple[str, float | None]]:
    """`PATH[:weight],PATH...` as (path or name, weight or None). A colon that no number follows belongs to the path."""
    pairs = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, colon, weight = part.rpartition(":")
        try:
            pairs.append((name, float(weight)) if colon else (part, None))
        except ValueError:
            pairs.append((part, None))
    if not pairs or any(weight is not None and not 0 < weight < float("inf") for _, weight in pairs):
        raise ConfigError(f"data.sources: got {text!r}\n  expected: PATH[:weight][,PATH[:weight]...], weights above 0\n"
                          "  change:   --set data.sources=my.jsonl:2,other.jsonl:1")
    return pairs


def source_files(path: str) -> list[Path]:
    """The files of a local source: the file itself, or train.jsonl and eval.jsonl of a folder; none for names."""
    place = Path(path)
    if place.is_dir():
        return [file for file in (place / "train.jsonl", place / "eval.jsonl") if file.exists()]
    if place.suffix in (".jsonl", ".json") or place.is_absolute() or path.startswith("."):
        if not place.exists():
            raise ConfigError(f"data.sources: got {path!r}, which does not exist\n  expected: a JSON-lines file, a folder with "
                              "train.jsonl, or a Hub name\n  change:   --set data.sources=PATH")
        return [place]
    return []


def _require_earlier(run: StageRun, pipeline: Pipeline) -> None:
    for earlier in REQUIRES[run.stage]:
        before = open_run(run.root, earlier)
        if earlier == "data" and before.state == "missing":
            continue
        if before.state != "finished":
            raise RunError(f"{run.stage} needs a finished {earlier} stage in {run.root}, which is {before.state}\n"
                           f"  change: run `dschat {earlier}` first, or choose another --run-root")
        if before.config["config_hash"] != stage_hash(pipeline, earlier):
            raise RunError(f"the {earlier} stage in {run.root} was made with another configuration\n  changed: "
                           f"{_difference(before.config['pipeline'], pipeline.to_dict())}\n"
                           f"  change: make it anew with `dschat {earlier} --fresh`, or choose another --run-root")


def _decide(run: StageRun, wanted: dict, resume: str, fresh: bool) -> str:
    if not (run.path / "config.json").exists():
        return "train"
    old, state = run.config, run.status.get("state", "missing")
    if fresh:
        return "aside"
    if old["config_hash"] != wanted["config_hash"]:
        raise RunError(f"{run.path} was made with another configuration\n  changed: "
                       f"{_difference(old['pipeline'], wanted['pipeline'])}\n"
                       f"  change: --fresh (the old folder is moved aside), or another --run-root")
    if state == "finished":
        return "reuse"
    if state == "missing":
        return "train"
    if resume != "auto":
        raise RunError(f"{run.path} was {'interrupted' if state == 'running' else state} at step "
                       f"{run.status.get('step', 0)}\n  change: --resume auto to go on, or --fresh to begin again")
    return "resume"


def _difference(old: dict, new: dict) -> str:
    rows = []
    for section in sorted(set(old) | set(new)):
        before, after = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(after, dict):
            rows += [f"{section}.{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in after if before.get(k) != after[k]]
        elif before != after:
            rows.append(f"{section}: {before!r} -> {after!r}")
    return "; ".join(rows) or "the content of data.sources"


def _aside(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [path.with_name(f"{path.name}.old-{stamp}{suffix}") for suffix in ("", *(f"-{i}" for i in range(1, 100)))]
    return next(name for name in names if not name.exists())
