"""The run folder: the only contract between notebooks, launched ranks and later stages.

    ROOT/<stage>/config.json  status.json  metrics.jsonl  samples.jsonl  result.json  logs/  checkpoints/  model/

Readers never see half a file. Who uses a stage is told by flock, so a crash leaves nothing to clean up.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import time
from datetime import datetime
from pathlib import Path

from dschat_kit.config import REQUIRES, STAGES, ConfigError, Pipeline
from dschat_kit.sections import flat

DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")


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
        raise cannot(f"write {path}", error) from error


def cannot(what: str, error: OSError) -> RunError:
    """The error for a disk that is full, read-only or otherwise in the way."""
    return RunError(f"cannot {what}: {error.strerror or error}\n  change: free space, permissions or --run-root")


def read_json(path: Path):
    """Parse a JSON file. Raises RunError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except OSError as error:
        raise cannot(f"read {path}", error) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not readable JSON: {error}") from None


class StageRun:
    """One stage's folder. Opening it reads nothing; every property looks at the files anew."""

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.stage = self.path.name
        if self.stage not in STAGES:
            raise RunError(f"{self.path} is no stage folder\n  expected: a folder named {' | '.join(STAGES)}")
        self.root = self.path.parent
        self.metrics_path, self.samples_path = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.logs, self.model_dir = self.path / "logs", self.path / "model"
        self.checkpoints = self.path / "checkpoints"

    @property
    def config(self) -> dict:
        """config.json: stage, preset, config_hash, seed, and the whole pipeline as it was asked for."""
        return read_json(self.path / "config.json")

    @property
    def pipeline(self) -> Pipeline:
        """The configuration as typed settings."""
        return Pipeline.from_dict(self.config["pipeline"])

    @property
    def status(self) -> dict:
        """status.json as it is; {} before the stage was ever started."""
        return read_json(self.path / "status.json") if (self.path / "status.json").exists() else {}

    @property
    def result(self) -> dict:
        """result.json; RunError before the stage has finished once."""
        return read_json(self.path / "result.json")

    @property
    def untouched(self) -> bool:
        """Nothing here that a job which begins would write over: none ran, or one failed before its first step."""
        left = any(path.exists() for path in (self.metrics_path, self.samples_path, self.checkpoints))
        return self.status.get("state", "missing") in (("missing",) if left else ("missing", "failed"))

    @property
    def state(self) -> str:
        """missing | running | finished | failed | interrupted. Running, but held by no process, is interrupted."""
        state = self.status.get("state", "missing")
        if state == "running" and not self.in_use():
            return "interrupted"
        return state

    def in_use(self) -> bool:
        """Whether a rank or a launcher holds this folder now."""
        return any(_held(self.path / name) for name in (".lock", ".launch.lock"))

    def update_status(self, **changes) -> None:
        """Merge into status.json; sets `updated`."""
        now = time.time()
        base = {"state": "running", "step": 0, "total": 0, "started": now, "error": None, "pid": os.getpid(),
                "host": socket.gethostname()}
        write_json(self.path / "status.json", {**base, **self.status, **changes, "updated": now})

    def lock(self):
        """Hold the folder while the returned file is open. Raises RunError when another process has it."""
        return take_lock(self.path / ".lock")


def take_lock(path: Path):
    """The file `path`, made where it is missing, open and locked until it is closed.

    Raises RunError when another process keeps it. One that only looks whether it is held has it for an instant; one
    that has written into it that it is ending (a launcher, when its cell is run again) is waited for, up to 30 s.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise cannot(f"write in {path.parent}", error) from error
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            return file
        except BlockingIOError:
            if time.monotonic() - begun > (30 if os.fstat(file.fileno()).st_size else 0.5):
                file.close()
                raise _in_use(path.parent) from None
            time.sleep(0.05)


def _held(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _in_use(folder: Path) -> RunError:
    return RunError(f"{folder} is in use by another process\n"
                    "  change: wait for it, end it, or choose another --run-root")


def open_run(root: Path, stage: str) -> StageRun:
    """The folder of a stage in a run folder."""
    return StageRun(Path(root) / stage)


def prepare_stage(root: Path, stage: str, pipeline: Pipeline, *, preset: str = "", resume: str = "never",
                  fresh: bool = False) -> tuple[StageRun, str]:
    """Make a stage's folder ready and say what has to happen: `reuse`, `train` or `resume`.

    Finished with the same configuration is reused; an interrupted or failed one needs resume="auto"; a changed
    one needs fresh=True, which moves the old folder aside and never deletes it. What failed before its first step
    has nothing to keep and begins again. Raises RunError or ConfigError.
    """
    run = open_run(root, stage)
    _require_earlier(run, pipeline)
    wanted = {"stage": stage, "preset": preset, "config_hash": stage_hash(pipeline, stage), "seed": pipeline.seed,
              "pipeline": pipeline.to_dict()}
    if run.in_use():
        raise _in_use(run.path)
    with run.lock():
        action = _decide(run, wanted, resume, fresh)
    if action == "aside":
        _move_aside(run.path)
        action = "train"
    if action != "reuse":
        write_json(run.path / "config.json", wanted)
    return run, action


def link_stages(root: Path, other: Path, *stages: str) -> Path:
    """A run folder that shares stages with another one, by links; what is there already stays. Returns `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for stage in () if root == other else stages:
        if not (root / stage).exists():
            (root / stage).symlink_to((other / stage).absolute())
    return root


def stage_hash(pipeline: Pipeline, stage: str) -> str:
    """`Pipeline.config_hash` with the content of local source files, so that changed rows are a changed stage."""
    digest = hashlib.sha256(pipeline.config_hash(stage).encode())
    module = Path(pipeline.data.module)
    files = [file for path, _ in pipeline.data.weighted_sources() for file in source_files(path)]
    for file in files + [module] * (module.suffix == ".py"):
        try:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise RunError(f"data.{'module' if file == module else 'sources'}: {file} cannot be read: "
                           f"{error.strerror}\n  change: the file's permissions, or that setting") from error
    return digest.hexdigest()[:16]


def source_files(path: str) -> list[Path]:
    """The files of a local source in order; none for names. Raises ConfigError where there are none."""
    place, several = Path(path), "*" in path
    if not (_plain(path).endswith(DATA_FILES) or place.is_absolute() or path.startswith(".") or several):
        return []
    if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        files = sorted(place.glob("**/*.arrow"))
    elif several or place.is_dir():
        fixed = next((i for i, part in enumerate(place.parts) if "*" in part), len(place.parts))
        pattern = "/".join(place.parts[fixed:]) or "*"  # pathlib follows no links below it: none leads in circles
        found = Path(*place.parts[:fixed]).glob(pattern)
        kinds = DATA_FILES if several else DATA_FILES[:-1]  # a folder's .txt explains it
        files = sorted(file for file in found if _plain(file.name).endswith(kinds) and file.exists())
    else:
        files = [place] if place.exists() else []
    if not files or files != [place] and all(map(held_out, files)):
        what = f"but {place / 'train.jsonl' if place.is_dir() else place} does not exist"
        raise ConfigError(f"data.sources: got {path!r}, {what}\n  expected: a file ({' '.join(DATA_FILES)}, also .gz "
                          ".bz2 .xz), a folder or glob of such, a folder of save_to_disk, or a Hub name\n"
                          "  change:   --set data.sources=PATH")
    return files


def held_out(file: Path) -> bool:
    """Whether a file among others is an evaluation set, by its name."""
    return re.match(r"(eval|test|valid|dev)", file.name) is not None


def _plain(name: str) -> str:
    return re.sub(r"\.(gz|bz2|xz)$", "", name)


def _require_earlier(run: StageRun, pipeline: Pipeline) -> None:
    for earlier in REQUIRES[run.stage]:
        before = open_run(run.root, earlier)
        state = before.state
        if earlier == "data" and state in ("missing", "failed", "interrupted"):  # built on the way
            continue
        if state != "finished":
            raise RunError(f"{run.stage} needs a finished {earlier} stage in {run.root}, which is {state}\n"
                           f"  change: `dschat {earlier} --run-root '{run.root}'` first, or choose another --run-root")
        if before.config["config_hash"] != stage_hash(pipeline, earlier):
            raise RunError(f"the {earlier} stage in {run.root} was made with another configuration\n  changed: "
                           f"{_difference(before.config['pipeline'], pipeline.to_dict())}\n"
                           f"  change: make it anew with `dschat {earlier} --run-root '{run.root}' --fresh`, or choose "
                           "another --run-root")


def _decide(run: StageRun, wanted: dict, resume: str, fresh: bool) -> str:
    if not (run.path / "config.json").exists():
        return "train"
    if fresh:
        return "aside"
    old, state = run.config, run.status.get("state", "missing")
    if run.untouched:
        return "train"
    if old["config_hash"] != wanted["config_hash"]:
        raise RunError(f"{run.path} was made with another configuration\n  changed: "
                       f"{_difference(old['pipeline'], wanted['pipeline'])}\n"
                       f"  change: --fresh (the old folder is moved aside), or another --run-root")
    if state == "finished":
        return "reuse"
    if resume != "auto":
        raise RunError(f"{run.path} was {'interrupted' if state == 'running' else state} at step "
                       f"{run.status.get('step', 0)}\n  change: --resume auto to go on, or --fresh to begin again")
    return "resume"


def _difference(old: dict, new: dict) -> str:
    before = flat(old)
    rows = [f"{path}: {before.get(path)!r} -> {value!r}" for path, value in flat(new).items()
            if before.get(path) != value]
    return "; ".join(rows) or "the content of data.sources"


def _move_aside(path: Path) -> None:
    try:
        path.rename(path.with_name(f"{path.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}"))
        path.mkdir()
    except OSError as error:
        raise cannot(f"move {path} aside", error) from error
