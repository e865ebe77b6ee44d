"""`dschat run`: the notebooks of the chain, one after the other, headless through papermill."""
import json
import shlex
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

from dschat_kit.machine import checkout, own_path
from dschat_kit.notebook.processes import Ending, guard, handling
from dschat_kit.notebook.progress import Follow, Line, bar, clock
from dschat_kit.runs import RunError, open_run, take_lock

CHAIN = {"00_start_here": "", "01_data_abstraction": "data", "02_supervised_finetuning": "sft",
         "03_reward_model": "reward", "04_ppo_hybrid_engine": "ppo", "05_inference": "chat"}
"""Notebook -> the stage it runs."""
HEADLINES = {"data": "{training_rows} training rows",
             "sft": "eval loss {eval_loss_before:.3f} -> {eval_loss_after:.3f}",
             "reward": "accuracy {accuracy:.3f} ({accuracy_interval[0]:.3f} to {accuracy_interval[1]:.3f})",
             "ppo": "score {score_before:.2f} -> {score_after:.2f}, KL {kl:.3f}",
             "gold": ", gold {gold_before:.2f} -> {gold_after:.2f}"}
HEADLINES["dpo"] = HEADLINES["ppo"]
"""The figure a reader looks for first in a stage's result.json; that of the toy world follows PPO's and DPO's."""
TAG = "DSCHAT_CHAIN_TAG"


class NotebookFailed(RunError):
    """A cell of a notebook failed; the message names notebook, cell, its last words and the executed copy."""


def run_chain(*, preset: str, run_root: str | Path, overrides: list[str] = (), from_stage: str | None = None,
              num_gpus: int = 0, resume: str = "never", fresh: bool = False,
              notebooks: list[str | Path] | None = None) -> int:
    """Execute the chain's notebooks into RUN_ROOT/notebooks and print a table of what came out.

    `notebooks` are paths; None means those of the checkout. Returns 0, 1 when a notebook failed, 2 when nothing could
    be started, 128 + the signal after an interrupt. No process of the chain outlives the call.
    """
    root = Path(run_root).absolute()
    given = {"preset": preset, "run_root": str(root), "set_": shlex.join(overrides), "launch": "auto",
             "num_gpus": num_gpus, "resume": resume, "fresh": fresh}
    target, line, mark = root / "notebooks", Line(sys.stderr), {TAG: uuid.uuid4().hex}
    done: dict[str, float] = {}

    def stop(number, _frame):
        raise KeyboardInterrupt(number)

    try:
        paths = chosen_notebooks(notebooks, from_stage)
        check_parameters(paths, given)
        ends = signal.SIGTERM, signal.SIGHUP
        with take_lock(target / ".launch.lock"), guard(mark), handling(stop, *ends):
            try:
                for number, path in enumerate(paths):
                    heading = f"{bar(number / len(paths))} {number + 1}/{len(paths)} {path.stem}"
                    begun = time.monotonic()
                    _execute(path, target / path.name, given, mark, line, heading)
                    done[path.stem] = time.monotonic() - begun
                    line.end(f"{bar((number + 1) / len(paths))} {path.stem}  done in {clock(done[path.stem])}")
            finally:  # however it comes, no process of the chain is left
                with handling(signal.SIG_IGN, *ends):
                    Ending(mark).run()
    except RunError as error:
        line.end(f"error: {error}")
        return 1 if isinstance(error, NotebookFailed) else 2
    except KeyboardInterrupt as interrupt:
        line.end(f"interrupted; `dschat run --resume auto` goes on where it was. Executed notebooks: {target}")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    print(summary(root, done))
    return 0


def chosen_notebooks(notebooks: list[str | Path] | None, from_stage: str | None) -> list[Path]:
    """Paths of the notebooks to run, in order, those before `from_stage` left out. Raises RunError."""
    folder = checkout() / "notebooks"
    paths = [Path(path).absolute() for path in notebooks or [folder / f"{name}.ipynb" for name in CHAIN]]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise RunError(f"notebooks: got {', '.join(missing)}, which does not exist\n  expected: the notebooks of the "
                       "checkout\n  change: run dschat from an editable install of the repository (env/setup.sh)")
    stages = [CHAIN.get(path.stem, "") for path in paths]
    if from_stage is not None and from_stage not in stages:
        raise RunError(f"--from: got {from_stage!r}\n  expected: {' | '.join(filter(None, stages))}")
    return paths[stages.index(from_stage) if from_stage else 0:]


def check_parameters(paths: list[Path], given: dict) -> None:
    """Papermill only prints a line for a name that a notebook does not have; here it is a RunError, before any runs."""
    from papermill import inspect_notebook
    for path in paths:
        known = inspect_notebook(path)
        if unknown := sorted(set(given) - set(known)):
            raise RunError(f"{path.name}: got the parameters {', '.join(unknown)}, which it does not have\n  expected: "
                           f"{', '.join(sorted(known)) or 'a cell tagged `parameters`'}\n  change: name them in the "
                           "notebook's cell tagged `parameters`")


def own_kernel(mark: dict[str, str]) -> type:
    """A kernel manager whose kernel is this interpreter, whatever kernels are installed, and carries `mark`."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    # Every shutdown begins with an interrupt, which a kernel and its event loop would report as an error.
    quiet, start = "--log-level=50", ("import logging, runpy; logging.getLogger('tornado').setLevel('CRITICAL'); "
                                      "runpy.run_module('ipykernel_launcher', run_name='__main__')")

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-c", start, "-f", "{connection_file}", quiet], language="python",
            env={"PATH": own_path(), "DSCHAT_HEADLESS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **mark})

    return OwnKernel


def _execute(path: Path, target: Path, given: dict, mark: dict, line: Line, heading: str) -> None:
    """Run one notebook in a thread of its own; `line` says how far it is. Raises NotebookFailed."""
    from papermill import execute_notebook
    outcome: list[Exception] = []

    def work():
        try:
            execute_notebook(path, target, given, kernel_name="python3", kernel_manager_class=own_kernel(mark),
                             cwd=path.parent, progress_bar=False, start_timeout=300, coalesce_streams=True,
                             store_widget_state=False)
        except Exception as error:  # noqa: BLE001  raised again in the main thread
            outcome.append(error)

    thread, follow = threading.Thread(target=work, daemon=True), Follow(given["run_root"])
    thread.start()
    while thread.is_alive():
        look = follow.poll()
        text = look.text() if follow.news else ""
        line.show(f"{heading}  {text}", f"{heading}  {text[:8]}")  # a new stage is said at once
        thread.join(0.5)
    if outcome:
        raise NotebookFailed(failure_text(target, outcome[0])) from outcome[0]


def failure_text(executed: Path, error: Exception) -> str:
    """Notebook, cell, last lines of its standard error and where to read the rest."""
    from papermill import PapermillExecutionError
    where, said = "failed", [f"{type(error).__name__}: {error}"]
    if isinstance(error, PapermillExecutionError):
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
        cell = next(cell for cell in cells if cell.get("execution_count") == error.exec_count)
        stderr = ["".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stderr"]
        said = "".join(stderr).splitlines()[-12:]
        if not said or error.ename != "CalledProcessError":  # that one would only repeat the whole cell
            said.append(f"{error.ename}: {error.evalue}")
        code = [line.strip() for line in error.source.splitlines() if line[:1] not in ("%", "#", "")]
        where = f"failed in cell In [{error.exec_count}]: {code[0] if code else ''}"
    return "\n  ".join([f"{executed.name} {where}", *said, f"executed copy: {executed}"])


def headline(root: Path, stage: str) -> str:
    """The figure a reader looks for first in a stage's result.json, "" where there is none."""
    if stage not in HEADLINES or not (root / stage / "result.json").exists():
        return ""
    result = open_run(root, stage).result
    rows = sum(count for by in result.get("rows", {}).values() for part, count in by.items() if part[-4:] != "eval")
    gold = stage in ("dpo", "ppo") and result.get("gold_before") is not None
    return (HEADLINES[stage] + HEADLINES["gold"] * gold).format(**result, training_rows=rows)


def summary(root: Path, done: dict[str, float]) -> str:
    """The table after a run: notebook, stage, seconds, headline; where to look next."""
    lines = [f"{'notebook':<24}  stage   seconds  result"]
    for name, seconds in done.items():
        stage = CHAIN.get(name, "")
        lines.append(f"{name:<24}  {stage or '-':<6}  {seconds:>7.0f}  {headline(root, stage)}".rstrip())
    jupyter = shlex.join([str(Path(sys.executable).parent / "jupyter"), "lab", str(root / "notebooks")])
    return "\n".join([*lines, f"{'together':<24}  {'':<6}  {sum(done.values()):>7.0f}", "",
                      f"executed notebooks, with figures: {root / 'notebooks'}", f"look: {jupyter}"])
