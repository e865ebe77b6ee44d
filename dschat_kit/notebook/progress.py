"""How far a stage or a whole chain is, read from the run folder, as data and as one line of text."""
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dschat_kit.config import STAGES
from dschat_kit.metrics import MetricsTail
from dschat_kit.runs import RunError, StageRun, open_run

ENDED = ("finished", "failed", "interrupted")
SHOWN = {"sft": ("loss", "eval_loss"), "reward": ("loss", "accuracy"), "ppo": ("score_mean", "kl", "response_length")}
STALE = 15.0  # seconds without news after which the locks are asked whether anybody is still at work


@dataclass(frozen=True)
class Snapshot:
    """One look at a stage. `eta` in seconds, None while unknown; `numbers` the newest of the stage's metrics."""

    stage: str
    state: str
    step: int
    total: int
    eta: float | None
    numbers: dict
    error: str | None

    def text(self) -> str:
        """ppo  step 3/12  score_mean 1.20  kl 0.031  about 1:20 left"""
        if self.state == "missing":
            return f"{self.stage}: waiting for it to start"
        parts = [self.stage, f"step {self.step}/{self.total}" if self.total else ""]
        parts += [f"{name} {value:.4g}" for name, value in self.numbers.items()]
        running = f"about {clock(self.eta)} left" if self.eta else "" if self.step else "starting"
        parts += [running if self.state == "running" else self.state]
        error = f": {self.error}" if self.error and self.error != self.state else ""
        return "  ".join(part for part in parts if part) + error

    @property
    def fraction(self) -> float:
        """Done share of the stage, 0 to 1."""
        return min(1.0, self.step / self.total) if self.total else float(self.state == "finished")


class Follow:
    """Follows one stage folder, or in a run folder the stage that is at work. `over` once it has ended, `news` once
    something has happened since the beginning.

    A stage that failed or was interrupted before is waited for: it may be about to be resumed.
    """

    def __init__(self, place: Path | str | StageRun):
        place = Path(getattr(place, "path", place)).absolute()
        self.whole = place.name not in STAGES
        self.runs = [open_run(place, stage) for stage in STAGES] if self.whole else [StageRun(place)]
        self.before = {run.stage: _status(run).get("updated") for run in self.runs}
        self.tails = {run.stage: MetricsTail(run.metrics_path) for run in self.runs}
        self.numbers: dict[str, dict] = {run.stage: {} for run in self.runs}
        self.run, self.over, self.news, self.idle_since = self.runs[0], False, False, None
        self.first: dict[tuple, tuple[float, int]] = {}  # of a stage's start: when the first step was seen, and which

    def poll(self) -> Snapshot:
        """Look at the files and return what they say now."""
        looks = [(run, _status(run)) for run in self.runs]
        self.run, status = max(looks, key=lambda look: (self._state(*look) == "running", look[1].get("updated", 0.0)))
        state, stage = self._state(self.run, status), self.run.stage
        for row in self.tails[stage].poll():
            self.numbers[stage] |= {key: row[key] for key in SHOWN.get(stage, ())
                                    if isinstance(row.get(key), (int, float))}
        step, total = status.get("step") or 0, status.get("total") or 0
        eta = self._eta(status, step, total) if state == "running" and 0 < step <= total else None
        self.news = status.get("updated") != self.before[stage]
        self.over = self._over(state)
        return Snapshot(stage, state, step, total, eta, dict(self.numbers[stage]), status.get("error"))

    def _eta(self, status: dict, step: int, total: int) -> float:
        """Seconds left at the pace seen so far; at the first look that of the whole stage, its slow start included."""
        started, now = status.get("started", time.time()), time.time()
        since, before = self.first.setdefault((self.run.stage, started), (now, step))
        seen = step > before and now > since
        return ((now - since) / (step - before) if seen else (now - started) / step) * (total - step)

    @staticmethod
    def _state(run: StageRun, status: dict) -> str:
        state = status.get("state", "missing")
        if state == "running" and time.time() - status.get("updated", 0) > STALE and not run.in_use():
            return "interrupted"
        return state

    def _over(self, state: str) -> bool:
        if state in ("failed", "interrupted"):
            return self.news
        if state != "finished" or not self.whole:
            return state == "finished"
        if self.run.stage not in ("ppo", "chat"):
            return False
        self.idle_since = self.idle_since or time.monotonic()
        return not self.news or self.run.stage == "chat" or time.monotonic() - self.idle_since > 10


def _status(run: StageRun) -> dict:
    try:
        return run.status
    except RunError:
        if (run.path / "status.json").exists():
            raise
        return {}  # the folder has been moved aside this very moment


class Line:
    """One refreshed line on a terminal; where the output is a file, a plain line now and then."""

    def __init__(self, stream: TextIO, every: float = 15.0):
        self.stream, self.every = stream, every
        self.tty, self.said, self.said_at = stream.isatty(), "", float("-inf")

    def show(self, text: str, heading: str = "") -> None:
        """Show `text`; in a file only when `heading` is new or the last line is `every` seconds old and different."""
        now = time.monotonic()
        if self.tty:
            width = _width() - 1
            self.stream.write("\r" + text[:width].ljust(width))
        elif text != self.said and (not self.said.startswith(heading or "\0") or now - self.said_at >= self.every):
            self.stream.write(text + "\n")
            self.said, self.said_at = text, now
        self.stream.flush()

    def end(self, text: str) -> None:
        """Replace the line by its last state and leave it."""
        if self.tty:
            self.stream.write("\r" + " " * (_width() - 1) + "\r")
        if self.tty or text != self.said:
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float | None) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds or 0), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def bar(fraction: float, width: int = 20) -> str:
    """[#######-------------]"""
    full = round(fraction * width)
    return f"[{'#' * full}{'-' * (width - full)}]"


def _width() -> int:
    return max(20, shutil.get_terminal_size().columns)
