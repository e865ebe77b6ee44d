"""The beginning of a stage, for the CLI and for notebooks: which configuration, which folder, what has to happen."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.config import STAGES, ConfigError, Pipeline
from dschat_kit.machine import detect, resolve
from dschat_kit.presets import get_preset
from dschat_kit.runs import RunError, StageRun, open_run, prepare_stage

__all__ = ["Begun", "begin", "begin_cell", "cell_configuration", "configuration"]


@dataclass(frozen=True)
class Begun:
    """A stage that is ready: its folder, `reuse` | `train` | `resume`, and how many ranks it will have."""
    run: StageRun
    action: str
    ranks: int

    @property
    def command(self) -> list[str]:
        """The job that trains it, as a notebook cell shows it."""
        if self.run.stage == "data":
            return ["python", "-m", "dschat_kit.data.pipeline", "--run", str(self.run.path)]
        resume = ["--resume"] if self.action == "resume" else []
        return ["deepspeed", "--num_gpus", str(self.ranks), "--module", f"dschat_kit.train.{self.run.stage}",
                "--run", str(self.run.path), *resume]


def configuration(preset: str | None, run_root: str | Path | None, overrides=()) -> tuple[str, Path, Pipeline]:
    """(preset, run root, resolved pipeline). Without a preset and without overrides an existing run keeps its own."""
    root = Path(run_root or Path("runs") / (preset or "tiny")).absolute()
    if preset is None:
        for stage in reversed(STAGES):
            run = open_run(root, stage)
            if (run.path / "config.json").exists():
                return run.config["preset"], root, run.pipeline.with_overrides(overrides)
    preset = preset or "tiny"
    return preset, root, resolve(get_preset(preset).with_overrides(overrides))


def begin(stage: str, preset: str, root: Path, pipeline: Pipeline, *, resume: str = "never", fresh: bool = False,
          num_gpus: int | None = None) -> Begun:
    """Check everything that can be checked without torch and make the stage's folder ready.

    Raises ConfigError or RunError, each with what was got, what is expected and what to change.
    """
    machine = detect()
    ranks = num_gpus or machine.default_ranks
    if ranks < 1 or (machine.accelerator == "cuda" and ranks > machine.devices):
        raise ConfigError(f"--num-gpus: got {ranks}\n  expected: 1 to {machine.devices}, the GPUs of this machine\n"
                          "  change:   --num-gpus")
    pipeline.check_ranks(stage, ranks)
    run, action = prepare_stage(root, stage, pipeline, preset=preset, resume=resume, fresh=fresh)
    return Begun(run, action, ranks)


def cell_configuration(preset: str, run_root: str, set_: str | None) -> tuple[str, Path, Pipeline]:
    """`configuration` for a notebook's parameters: a relative folder is in the checkout, wherever the kernel runs.

    `set_=None` keeps the configuration of a run that exists.
    """
    root = Path(run_root or f"runs/{preset}")
    if not root.is_absolute():
        root = Path(__file__).resolve().parents[2] / root
    known = any((root / stage / "config.json").exists() for stage in STAGES)
    return configuration(None if set_ is None and known else preset, root, shlex.split(set_ or ""))


def begin_cell(stage: str, *, preset: str, run_root: str, set_: str | None, launch: str, num_gpus: int, resume: str,
               fresh: bool) -> StageRun:
    """`begin` for a notebook: puts RUN, NUM_GPUS, RESUME and TRAIN (yes | no) into the environment of the `%%bash` cells.

    launch `auto` trains what is missing and shows what is there; `never` only shows. `set_=None` keeps the configuration
    of a run that exists.
    """
    if launch not in ("auto", "never"):
        raise ConfigError(f"launch: got {launch!r}\n  expected: auto | never\n  change:   the parameters cell")
    preset, root, pipeline = cell_configuration(preset, run_root, set_)
    if launch == "never":
        run = open_run(root, stage)
        if run.state == "missing":
            raise RunError(f"{run.path} holds nothing to show\n  change: launch = \"auto\" trains it")
        begun = Begun(run, "reuse", num_gpus)
    else:
        begun = begin(stage, preset, root, pipeline, resume=resume, fresh=fresh, num_gpus=num_gpus)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ |= {"PATH": path, "RUN": str(begun.run.path), "NUM_GPUS": str(begun.ranks),
                   "TRAIN": "no" if begun.action == "reuse" else "yes",
                   "RESUME": "--resume" if begun.action == "resume" else ""}
    print({"reuse": f"{stage}: finished before, shown as it is", "train": f"{stage}: will be made in",
           "resume": f"{stage}: goes on from its newest checkpoint in"}[begun.action], f"({begun.run.path})")
    return begun.run
