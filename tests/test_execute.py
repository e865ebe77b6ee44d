"""`dschat run` over tiny hand-made notebooks: order, parameters, failures, interrupts, the table at the end."""
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_launch import LAUNCH, STUBBORN, alive, wait_until

from dschat_kit.notebook import execute
from dschat_kit.runs import RunError

PARAMETERS = "\n".join(["preset: str = 'tiny'", "run_root: str = ''", "set_: str = ''", "launch: str = 'auto'",
                        "num_gpus: int = 0", "resume: str = 'never'", "fresh: bool = False"])
RECORD = """
import json, os, pathlib, sys, time
stage = pathlib.Path(run_root, STAGE); stage.mkdir(exist_ok=True)
(stage / "result.json").write_text(json.dumps(RESULT))
(stage / "status.json").write_text(json.dumps({"state": "running", "step": 2, "total": 4, "started": time.time(),
                                               "updated": time.time()}))
(stage / "seen.json").write_text(json.dumps([sys.executable, os.environ["PATH"], set_, num_gpus, os.getcwd()]))
time.sleep(1.2)
"""

SHUTDOWN_NOISE = "get_ipython().kernel.log.error('KeyboardInterrupt caught in kernel.')"  # as when a shutdown is slow


def make(folder: Path, name: str, *cells: str) -> Path:
    folder.mkdir(exist_ok=True)
    first = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    book = new_notebook(cells=[first, *map(new_code_cell, cells)])
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(book, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def record(stage: str, **result) -> str:
    return f"STAGE, RESULT = {stage!r}, {result!r}\n{RECORD}"


@pytest.fixture(autouse=True)
def no_tag(monkeypatch):
    monkeypatch.delenv(execute.TAG, raising=False)
    monkeypatch.setenv("DSCHAT_GRACE", "1.5")


def test_two_notebooks_in_order_with_parameters_progress_and_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    books = [make(tmp_path / "note books", "02_supervised_finetuning",
                  record("sft", eval_loss_before=5.0, eval_loss_after=1.25), SHUTDOWN_NOISE),
             make(tmp_path / "note books", "03_reward_model", "assert open(run_root + '/sft/seen.json')",
                  record("reward", accuracy=0.8, accuracy_interval=[0.75, 0.85]))]
    code = execute.run_chain(preset="tiny", run_root=tmp_path / "my run", overrides=["ppo.kl_coef=0.05", "seed=3"],
                             num_gpus=2, notebooks=books)
    out, err = capfd.readouterr()
    assert code == 0
    executable, path, set_, ranks, cwd = json.loads((tmp_path / "my run/sft/seen.json").read_text())
    assert executable == sys.executable and path.split(":")[0] == str(Path(sys.executable).parent)
    assert (set_, ranks, cwd) == ("ppo.kl_coef=0.05 seed=3", 2, str(tmp_path / "note books"))
    assert "eval loss 5.000 -> 1.250" in out and "accuracy 0.800 (0.750 to 0.850)" in out
    assert f"lab '{tmp_path}/my run/notebooks'" in out
    assert "1/2 02_supervised_finetuning  sft  step 2/4" in err
    assert {path.name for path in (tmp_path / "my run/notebooks").glob("*.ipynb")} == {book.name for book in books}
    assert "KeyboardInterrupt" not in out + err  # a kernel's end is no news


def test_from_stage_skips_and_unknown_stage_is_refused(tmp_path, capfd):
    books = [make(tmp_path, "02_supervised_finetuning", "1/0"), make(tmp_path, "03_reward_model")]
    assert execute.chosen_notebooks(books, "reward") == books[1:]
    assert execute.run_chain(preset="tiny", run_root=tmp_path / "r", from_stage="ppo", notebooks=books) == 2
    assert "expected: sft | reward" in capfd.readouterr().err


def test_failing_cell_is_named_and_stops_the_chain(tmp_path, capfd):
    cell = "%%bash\nset -euo pipefail\ntrue\necho 'error: rows.jsonl, line 2: no JSON' >&2\nexit 2"
    books = [make(tmp_path, "02_supervised_finetuning", "x = 1", cell),
             make(tmp_path, "03_reward_model", "open(run_root + '/reached', 'w')")]
    assert execute.run_chain(preset="tiny", run_root=tmp_path / "r", notebooks=books) == 1
    err = capfd.readouterr().err
    assert "02_supervised_finetuning.ipynb failed in cell In [" in err and "line 2: no JSON" in err
    assert str(tmp_path / "r/notebooks/02_supervised_finetuning.ipynb") in err
    assert "Traceback" not in err and "CalledProcessError" not in err
    assert not (tmp_path / "r/reached").exists()


def test_python_error_of_a_cell_is_quoted(tmp_path, capfd):
    book = make(tmp_path, "03_reward_model", "raise ValueError('no result.json')")
    assert execute.run_chain(preset="tiny", run_root=tmp_path / "r", notebooks=[book]) == 1
    assert "ValueError: no result.json" in capfd.readouterr().err


def test_unknown_parameter_names_are_refused_before_anything_runs(tmp_path, capfd):
    good = make(tmp_path, "02_supervised_finetuning", "open(run_root + '/reached', 'w')")
    books = [good, make(tmp_path, "03_reward_model")]
    books[1].write_text(books[1].read_text().replace("run_root:", "root:").replace("set_:", "overrides:"))
    assert execute.run_chain(preset="tiny", run_root=tmp_path / "r", notebooks=books) == 2
    err = capfd.readouterr().err
    assert "03_reward_model.ipynb: got the parameters" in err and "run_root" in err and "set_" in err
    assert not (tmp_path / "r/reached").exists()


def test_missing_notebook_is_a_clear_message(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        execute.chosen_notebooks([tmp_path / "none.ipynb"], None)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupt_leaves_no_process(tmp_path, signum):
    marker, child = tmp_path / "marker", tmp_path / "stubborn.py"
    child.write_text(STUBBORN)
    book = make(tmp_path, "04_ppo_hybrid_engine",
                f"%%bash\nset -euo pipefail\n{shlex.join([*LAUNCH, sys.executable, str(child), str(marker)])}")
    script = ("import sys; from dschat_kit.notebook.execute import run_chain\n"
              f"sys.exit(run_chain(preset='tiny', run_root={str(tmp_path / 'r')!r}, notebooks=[{str(book)!r}]))")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    wait_until(marker.exists, 120)
    process.send_signal(signum)
    err = process.communicate(timeout=120)[1].decode()  # by itself the child would go on for 300 s
    wait_until(lambda: not alive(str(marker)) and not alive(f"{tmp_path}/r"), 60)
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum and "interrupted" in err and "Traceback" not in err
