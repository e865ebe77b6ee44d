"""The beginning of a stage, for the CLI and for notebooks: which configuration, which folder, what has to happen."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.config import STAGES, Pipeline
from dschat_kit.feasible import refuse
from dschat_kit.machine import checkout, detect, own_path, resolve
from dschat_kit.presets import get_preset
from dschat_kit.runs import RunError, StageRun, open_run, prepare_stage, stage_hash
from dschat_kit.sections import error


@dataclass(frozen=True)
class Begun:
    """A stage that is ready: its folder, `reuse` | `train` | `resume`, how many ranks it will have, and the words that
    launch them where that is not one machine's `deepspeed`."""
    run: StageRun
    action: str
    ranks: int
    launcher: str = ""

    @property
    def command(self) -> list[str]:
        """The job that trains it, as a notebook cell shows it."""
        if self.run.stage == "data":
            return ["python", "-m", "dschat_kit.data.pipeline", "--run", str(self.run.path)]
        resume = ["--resume"] if self.action == "resume" else []
        launcher = shlex.split(self.launcher) or ["deepspeed", "--num_gpus", str(self.ranks)]
        module = ["--module", *["--"] * (Path(launcher[0]).name == "torchrun")]  # which has a --run-path
        return [*launcher, *module, f"dschat_kit.train.{self.run.stage}", "--run", str(self.run.path), *resume]


def configuration(preset: str | None, run_root: str | Path | None, overrides=()) -> tuple[str, Path, Pipeline]:
    """(preset, run root, resolved pipeline). Without a preset an existing run keeps its own configuration."""
    root = Path(run_root or checkout() / "runs" / (preset or "tiny")).absolute()
    runs = [open_run(root, stage) for stage in reversed(STAGES)]
    known = [run for run in runs if (run.path / "config.json").exists()]
    if preset is None and known:
        preset, pipeline = known[0].config["preset"], known[0].pipeline
    else:
        preset = preset or "tiny"
        pipeline = get_preset(preset)
    return preset, root, resolve(pipeline.with_overrides(overrides))


def check(pipeline: Pipeline, stages: tuple[str, ...], num_gpus: int | None) -> int:
    """What can be checked before a folder is touched; returns the number of ranks. Raises ConfigError or RunError."""
    machine = detect()
    ranks = num_gpus or machine.default_ranks
    machine.check_ranks(ranks)
    for stage in stages:
        pipeline.check_ranks(stage, ranks)
    refuse(pipeline, machine)
    stage_hash(pipeline, "data")  # reads the local sources
    return ranks


def begin(stage: str, preset: str, root: Path, pipeline: Pipeline, *, resume: str = "never", fresh: bool = False,
          num_gpus: int | None = None, launcher: str = "") -> Begun:
    """Check everything that can be checked without torch and make the stage's folder ready. With a `launcher` of
    several machines num_gpus counts the ranks of all of them; None leaves the check to the ranks.

    Raises ConfigError or RunError, each with what was got, what is expected and what to change.
    """
    ranks = num_gpus or 1 if launcher else check(pipeline, (stage,), num_gpus)
    pipeline.check_ranks(stage, ranks)
    run, action = prepare_stage(root, stage, pipeline, preset=preset, resume=resume, fresh=fresh)
    return Begun(run, action, ranks, launcher)


def cell_configuration(preset: str, run_root: str, set_: str | None) -> tuple[str, Path, Pipeline]:
    """`configuration` for a notebook's parameters: a relative folder is in the checkout, wherever the kernel runs.

    `set_=None` keeps the configuration of a run that exists.
    """
    root = checkout() / (run_root or f"runs/{preset}")
    known = any((root / stage / "config.json").exists() for stage in STAGES)
    return configuration(None if set_ is None and known else preset, root, shlex.split(set_ or ""))


def begin_cell(stage: str, *, preset: str, run_root: str, set_: str | None, launch: str, num_gpus: int, resume: str,
               fresh: bool) -> StageRun:
    """`begin` for a notebook: RUN, NUM_GPUS, RESUME and TRAIN (yes | no) for the environment of its `%%bash` cells.

    launch `auto` trains what is missing and shows what is there; `never` only shows. `set_=None` keeps the
    configuration of a run that exists.
    """
    if launch not in ("auto", "never"):
        raise error("launch", repr(launch), "auto | never", "the parameters cell")
    preset, root, pipeline = cell_configuration(preset, run_root, set_)
    if launch == "never":
        run = open_run(root, stage)
        if run.state == "missing":
            raise RunError(f"{run.path} holds nothing to show\n  change: launch = \"auto\" trains it")
        begun = Begun(run, "reuse", num_gpus)
    else:
        begun = begin(stage, preset, root, pipeline, resume=resume, fresh=fresh, num_gpus=num_gpus)
    _short_cell_errors()
    os.environ |= {"PATH": own_path(), "RUN": str(begun.run.path), "NUM_GPUS": str(begun.ranks),
                   "TRAIN": "no" if begun.action == "reuse" else "yes",
                   "RESUME": "--resume" if begun.action == "resume" else ""}
    print({"reuse": f"{stage}: finished before, shown as it is:", "train": f"{stage}: will be made in",
           "resume": f"{stage}: goes on from its newest checkpoint in"}[begun.action], begun.run.path)
    return begun.run


def _short_cell_errors() -> None:
    """A failed `%%bash` cell says so in one line: IPython would repeat the cell, and stumble over an interrupt."""
    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return

    def short(shell, kind, error, _trace, tb_offset=None):
        interrupted = error.returncode is None
        if interrupted:
            error.returncode = -signal.SIGINT  # IPython leaves None, which str(error) cannot format
        text = "interrupted: its processes end within seconds; resume = \"auto\" goes on with a training" \
            if interrupted else f"error: the cell ended with exit code {error.returncode}"
        shell._showtraceback(kind, error, [text])

    shell.set_custom_exc((subprocess.CalledProcessError,), short)
