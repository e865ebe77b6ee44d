"""How far a stage or a whole chain is, read from the run folder, as data and as one line of text."""
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dschat_kit.config import STAGES
from dschat_kit.metrics import MetricsTail
from dschat_kit.runs import RunError, StageRun, open_run

ENDED = ("finished", "failed", "interrupted")
SHOWN = {"sft": ("loss", "eval_loss"), "reward": ("loss", "accuracy"), "dpo": ("loss", "accuracy"),
         "ppo": ("score_mean", "kl", "response_length")}
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
        self.before = {run.stage: run.status.get("updated") for run in self.runs}
        self.tails = {run.stage: MetricsTail(run.metrics_path) for run in self.runs}
        self.numbers: dict[str, dict] = {run.stage: {} for run in self.runs}
        self.run, self.over, self.news = self.runs[0], False, False
        self.first: dict[tuple, tuple[float, int]] = {}  # of a stage's start: when the first step was seen, and which

    def poll(self) -> Snapshot:
        """Look at the files and return what they say now."""
        looks = [(run, *self._look(run)) for run in self.runs]
        self.run, status, state = max(looks, key=lambda look: (look[2] == "running", look[1].get("updated", 0.0)))
        stage = self.run.stage
        for row in self.tails[stage].poll():
            self.numbers[stage] |= {key: row[key] for key in SHOWN.get(stage, ())
                                    if isinstance(row.get(key), (int, float))}
        step, total, eta = status.get("step") or 0, status.get("total") or 0, None
        if state == "running" and 0 < step <= total:
            started, now = status["started"], time.time()
            since, before = self.first.setdefault((stage, started), (now, step))
            if step == before:  # at the first look: the pace of the whole stage, its slow start included
                since, before = started, 0
            eta = (now - since) / (step - before) * (total - step)
        self.news = status.get("updated") != self.before[stage]
        self.over = state in ("failed", "interrupted") and self.news or \
            state == "finished" and (not self.whole or stage in STAGES[-3:])
        return Snapshot(stage, state, step, total, eta, dict(self.numbers[stage]), status.get("error"))

    @staticmethod
    def _look(run: StageRun) -> tuple[dict, str]:
        status = run.status
        state = status.get("state", "missing")
        if state == "running" and time.time() - status.get("updated", 0) > STALE and not run.in_use():
            state = "interrupted"
        return status, state


class Line:
    """One refreshed line on a terminal; where the output is a file, a plain line now and then."""

    def __init__(self, stream: TextIO, every: float = 15.0):
        self.stream, self.every = stream, every
        self.said, self.said_at = "", float("-inf")

    @property
    def width(self) -> int:
        """Characters that fit on the terminal now; 0 where the stream is none."""
        return max(20, shutil.get_terminal_size().columns) - 1 if self.stream.isatty() else 0

    def show(self, text: str, heading: str = "") -> None:
        """Show `text`; in a file only when `heading` is new or the last line is `every` seconds old and different."""
        now = time.monotonic()
        if self.width:
            self.stream.write("\r" + text[:self.width].ljust(self.width))
        elif text != self.said and (not self.said.startswith(heading or "\0") or now - self.said_at >= self.every):
            self.stream.write(text + "\n")
            self.said, self.said_at = text, now
        self.stream.flush()

    def end(self, text: str) -> None:
        """Replace the line by its last state and leave it."""
        if self.width or text != self.said:
            self.stream.write(("\r" + " " * self.width + "\r") * bool(self.width) + text + "\n")
        self.stream.flush()


def watch_text(path: str | Path, stream=None, every: float = 1.0) -> int:
    """`dschat watch RUN`: one refreshed line until the stage or the run ends. 0 finished, 1 failed, 130 on Ctrl-C.

    Raises RunError when `path` is no folder.
    """
    if not Path(path).is_dir():
        raise RunError(f"watch: got {str(path)!r}, which is no folder\n  expected: a run folder such as runs/tiny, "
                       "or a stage folder in it")
    if inside := sorted(place.parent.parent.name for place in Path(path).glob("*/*/config.json")
                        if place.parent.name in STAGES):
        raise RunError(f"watch: got {str(path)!r}, which holds runs: {', '.join(dict.fromkeys(inside))}\n"
                       f"  expected: one of them\n  change:   dschat watch {Path(path) / inside[0]}")
    follow, line = Follow(path), Line(stream or sys.stdout)
    try:
        while True:
            look = follow.poll()
            text = f"{bar(look.fraction)} {look.text()}"
            if follow.over:
                line.end(text)
                return 0 if look.state == "finished" else 1
            idle = look.state in ("finished", "failed", "interrupted")
            line.show(text + "; waiting for what comes next, Ctrl-C ends" * idle,
                      f"{bar(look.fraction)} {look.stage}")
            time.sleep(every)
    except KeyboardInterrupt:
        line.end("no longer watching; the training goes on")
        return 130


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def bar(fraction: float, width: int = 20) -> str:
    """[#######-------------]"""
    full = round(fraction * width)
    return f"[{'#' * full}{'-' * (width - full)}]"
