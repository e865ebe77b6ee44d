"""`dschat run`: the notebooks of the chain, one after the other, headless through papermill."""
import ast
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from dschat_kit.notebook.processes import Ending, guard
from dschat_kit.notebook.progress import Follow, Line, bar, clock
from dschat_kit.notebook.report import take_lock
from dschat_kit.runs import RunError, open_run

CHAIN = {"00_start_here": "", "01_data_abstraction": "data", "02_supervised_finetuning": "sft",
         "03_reward_model": "reward", "04_ppo_hybrid_engine": "ppo", "05_inference": "chat"}
"""Notebook -> the stage it runs."""
TAG = "DSCHAT_CHAIN_TAG"


class NotebookFailed(RunError):
    """A cell of a notebook failed; the message names notebook, cell, its last words and the executed copy."""


def run_chain(*, preset: str, run_root: str | Path, overrides: list[str] = (), from_stage: str | None = None,
              num_gpus: int | None = None, resume: str = "never", fresh: bool = False,
              notebooks: list[str | Path] | None = None) -> int:
    """Execute the chain's notebooks into RUN_ROOT/notebooks and print a table of what came out.

    `notebooks` are paths; None means those of the checkout. Returns 0, 1 when a notebook failed, 2 when nothing could
    be started, 128 + the signal after an interrupt. No process of the chain outlives the call.
    """
    root = Path(run_root).absolute()
    given = {"preset": preset, "run_root": str(root), "set_": shlex.join(overrides), "launch": "auto",
             "num_gpus": num_gpus, "resume": resume, "fresh": fresh}
    given = {name: value for name, value in given.items() if value is not None}
    target, line = root / "notebooks", Line(sys.stderr)
    try:
        paths = chosen_notebooks(notebooks, from_stage)
        check_parameters(paths, given)
        lock = _prepare(target)
        done: list[tuple[Path, float]] = []
        try:
            with own_kernel() as (mark, _), guarded(mark, lock):
                for number, path in enumerate(paths):
                    heading = f"{bar(number / len(paths))} {number + 1}/{len(paths)} {path.stem}  "
                    begun = time.monotonic()
                    _execute(path, target / path.name, given, root,
                             lambda text, h=heading: line.show(h + text, h + text[:8]))  # a new stage is said at once
                    done.append((path, time.monotonic() - begun))
                    line.end(f"{bar((number + 1) / len(paths))} {path.stem}  done in {clock(done[-1][1])}")
        finally:
            os.close(lock)
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
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    paths = [Path(path).absolute() for path in notebooks or [folder / f"{name}.ipynb" for name in CHAIN]]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise RunError(f"notebooks: got {', '.join(missing)}, which does not exist\n  expected: the notebooks of the "
                       "checkout\n  change: run dschat from an editable install of the repository (env/setup.sh)")
    stages = [CHAIN.get(path.stem, "") for path in paths]
    if from_stage is None:
        return paths
    if from_stage not in stages:
        raise RunError(f"--from: got {from_stage!r}\n  expected: {' | '.join(filter(None, stages))}")
    return paths[stages.index(from_stage):]


def check_parameters(paths: list[Path], given: dict) -> None:
    """Papermill only prints a line for a name that a notebook does not have; here it is a RunError, before any runs."""
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
        known = {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)
                 for target in getattr(node, "targets", None) or [node.target] if isinstance(target, ast.Name)}
        if unknown := sorted(set(given) - known):
            raise RunError(f"{path.name}: got the parameters {', '.join(unknown)}, which it does not have\n  expected: "
                           f"{', '.join(sorted(known)) or 'a cell tagged `parameters`'}\n  change: name them in the "
                           "notebook's cell tagged `parameters`")


def _prepare(target: Path) -> int:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {target}: {error.strerror}\n  change: permissions or --run-root") from error
    return take_lock(target)


@contextmanager
def own_kernel():
    """A kernel named python3 that is this interpreter, whatever kernels are installed; yields its tag and folder.

    Its bin folder comes first on PATH, so that `dschat`, `deepspeed` and `python` of a cell are ours.
    """
    mark = f"{TAG}={uuid.uuid4().hex}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    specification = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"],
                     "display_name": "Python 3", "language": "python",
                     "env": {"PATH": path, "DSCHAT_HEADLESS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                             **dict([mark.split("=")])}}
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="dschat-kernel-") as folder:
        place = Path(folder, "kernels", "python3")
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps(specification))
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield mark, folder
        finally:
            os.environ.pop("JUPYTER_PATH")
            if before is not None:
                os.environ["JUPYTER_PATH"] = before


@contextmanager
def guarded(mark: str, lock: int):
    """SIGTERM and SIGHUP become KeyboardInterrupt(number); at the end, however it comes, no tagged process is left."""
    def stop(number, _frame):
        raise KeyboardInterrupt(number)
    main = threading.current_thread() is threading.main_thread()
    watched = guard(mark, lock, lambda: None)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)} if main else {}
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        grace = float(os.environ.get("DSCHAT_GRACE", "10"))
        Ending(mark, waits=(0.6 * grace, 0.4 * grace)).run()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(watched)


def _execute(path: Path, target: Path, given: dict, root: Path, say) -> None:
    """Run one notebook in a thread of its own, telling `say` how far it is. Raises NotebookFailed."""
    outcome: list[BaseException] = []

    def work():
        from papermill import execute_notebook
        try:
            execute_notebook(path, target, given, kernel_name="python3", cwd=path.parent, progress_bar=False,
                             start_timeout=300, coalesce_streams=True, store_widget_state=False)
        except Exception as error:  # noqa: BLE001  raised again in the main thread
            outcome.append(error)

    thread, follow = threading.Thread(target=work, daemon=True), Follow(root)
    thread.start()
    while thread.is_alive():
        look = follow.poll()
        say(look.text() if follow.news else "")
        thread.join(0.5)
    if outcome:
        raise NotebookFailed(failure_text(target, outcome[0])) from outcome[0]


def failure_text(executed: Path, error: BaseException) -> str:
    """Notebook, cell, last lines of its standard error and where to read the rest."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"] if executed.exists() else []
    for cell in cells:
        outputs = cell.get("outputs", [])
        if not any(output["output_type"] == "error" and output.get("evalue") != "0" for output in outputs):
            continue
        wrong = [output for output in outputs if output["output_type"] == "error"][-1]
        errors = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
        said = "".join(errors).splitlines()[-12:]
        if not said or wrong["ename"] != "CalledProcessError":  # that one would only repeat the whole cell
            said.append(f"{wrong['ename']}: {wrong['evalue']}")
        first = next((text for text in "".join(cell["source"]).splitlines() if text[:1] not in ("%", "#", "")), "")
        where = f"{executed.name} failed in cell In [{cell.get('execution_count')}]: {first.strip()}"
        return "\n  ".join([where, *said, f"executed copy: {executed}"])
    return f"{executed.name} failed: {type(error).__name__}: {error}\n  executed copy: {executed}"


def headline(root: Path, stage: str) -> str:
    """The figure a reader looks for first in a stage's result.json, "" where there is none."""
    if not stage or not (root / stage / "result.json").exists():
        return ""
    get = open_run(root, stage).result.get
    if stage == "data":
        counts = [count for by in get("rows").values() for part, count in by.items() if part != "eval"]
        return f"{sum(counts)} training rows"
    if stage == "sft":
        return f"eval loss {get('eval_loss_before'):.3f} -> {get('eval_loss_after'):.3f}"
    if stage == "reward":
        low, high = get("accuracy_interval")
        return f"accuracy {get('accuracy'):.3f} ({low:.3f} to {high:.3f})"
    if stage == "ppo":
        gold = f", gold {get('gold_before'):.2f} -> {get('gold_after'):.2f}" if get("gold_before") is not None else ""
        return f"score {get('score_before'):.2f} -> {get('score_after'):.2f}{gold}, KL {get('kl'):.3f}"
    return ""


def summary(root: Path, done: list[tuple[Path, float]]) -> str:
    """The table after a run: notebook, stage, seconds, headline; where to look next."""
    rows = [("notebook", "stage", "seconds", "result")]
    rows += [(path.stem, CHAIN.get(path.stem, "") or "-", f"{seconds:.0f}", headline(root, CHAIN.get(path.stem, "")))
             for path, seconds in done]
    rows.append(("together", "", f"{sum(seconds for _, seconds in done):.0f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = ["  ".join([name.ljust(widths[0]), stage.ljust(widths[1]), seconds.rjust(widths[2]), result]).rstrip()
             for name, stage, seconds, result in rows]
    jupyter = shlex.join([str(Path(sys.executable).parent / "jupyter"), "lab", str(root / "notebooks")])
    return "\n".join([*table, "", f"executed notebooks, with figures: {root / 'notebooks'}", f"look: {jupyter}"])
