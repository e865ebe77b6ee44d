"""The notebooks as files, and executed on two real ranks by the README's first command at smoke scale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import make_run, write_lines

from dschat_kit.notebook.execute import CHAIN
from dschat_kit.runs import open_run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = ["data.rows=3000", "sft.max_steps=12", "sft.eval_every=6", "sft.eval_rows=32", "reward.max_steps=8",
         "reward.eval_every=4", "reward.eval_rows=32", "ppo.max_steps=2", "ppo.eval_prompts=24",
         "ppo.rollout_batch_size=32"]


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_sequence_is_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "07"]
    assert [path.stem for path in NOTEBOOKS[:6]] == list(CHAIN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean(path):
    code = cells(path, "code")
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "strip it with nbstripout"
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    ids = [cell["id"] for cell in json.loads(path.read_text())["cells"]]
    assert len(set(ids)) == len(ids) and all(name.startswith(path.stem[:2]) for name in ids)
    for cell in code:
        source = "".join(cell["source"])
        assert source.count("\n") < 15
        if source.startswith("%%bash"):
            assert source.splitlines()[1] == "set -euo pipefail"


def test_nbstripout_would_change_nothing():
    done = subprocess.run([sys.executable, "-m", "nbstripout", "--keep-id", "--verify", *map(str, NOTEBOOKS)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_understands_every_parameter(path):
    """Papermill drops a parameter whose comment it cannot parse, and the run silently ignores the value."""
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node
    found = _infer_parameters(load_notebook_node(str(path)), name="python3", language="python")
    assert {p.name for p in found} == ({"preset", "run_root", "set_", "launch", "num_gpus", "resume", "fresh"}
                                       if path.stem in CHAIN else {"run_root", "prompts", "answers"})
    assert all(p.help for p in found)


def test_the_panel_of_the_doctor_names_what_is_wrong(tmp_path):
    """Its cell of notebook 04, run upon a run that is sick."""
    root = make_run(tmp_path)
    (root / "ppo" / "config.json").write_text(json.dumps({"pipeline": {"model": {"dtype": "fp32"}}}))
    write_lines(root / "ppo" / "metrics.jsonl", [{"step": 1, "score_std": 0.0}])
    sources = ["".join(cell["source"]) for cell in cells(NOTEBOOKS[4], "code")]
    code, = (source for source in sources if "run_checks(" in source)
    imports, panel = code.split("\n\n")
    names = {"run": open_run(root, "ppo")}
    exec(imports, names)
    said = eval(panel, names)._repr_html_()
    assert "all responses have the same score" in said and "look at reward accuracy" in said and "finished" in said


DSCHAT = str(ROOT / ".venv" / "bin" / "dschat")


def command(*arguments: str, cwd: Path, timeout: int = 900) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
                          stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """`bash env/run.sh` from another folder, into a path with a space."""
    root = tmp_path_factory.mktemp("a run") / "tiny"
    done = command("bash", str(ROOT / "env" / "run.sh"), "--run-root", str(root), "--set", *SMOKE, cwd=root.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root, done


@pytest.mark.ranks
def test_the_first_command_ends_with_a_table(chain):
    root, done = chain
    for stem in CHAIN:
        assert stem in done.stdout
    assert "jupyter" in done.stdout and str(root / "notebooks") in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    for stage, steps in (("data", None), ("sft", 12), ("reward", 8), ("ppo", 2), ("chat", None)):
        status = json.loads((root / stage / "status.json").read_text())
        result = json.loads((root / stage / "result.json").read_text())
        assert status["state"] == "finished" and result["config_hash"]
        assert steps is None or (result["steps"] == steps and result["world_size"] == 2)


@pytest.mark.ranks
def test_executed_notebooks_hold_figures_and_no_errors(chain):
    root, _ = chain
    figures = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"], path
        assert "Traceback" not in path.read_text()
        figures[path.stem[:2]] = sum("image/png" in output.get("data", {}) for output in outputs)
        assert path.stat().st_size < 2_000_000
    least = {"01": 2, "02": 1, "03": 2, "04": 3, "05": 1}
    assert all(figures[number] >= wanted for number, wanted in least.items()), figures


@pytest.mark.ranks
def test_best_of_n_of_a_run_that_is_there(chain, tmp_path):
    """Notebook 07, which is no part of the chain: it samples from this run and draws the committed study."""
    path, = (path for path in NOTEBOOKS if path.stem not in CHAIN)
    done = command(sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-p", "run_root",
                   str(chain[0]), "-p", "prompts", "4", "-p", "answers", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.ipynb").read_text().count('"image/png": "') == 4


@pytest.mark.ranks
def test_a_second_run_reuses_everything_and_a_changed_one_is_refused(chain):
    root, _ = chain
    before = {stage: (root / stage / "result.json").stat().st_mtime_ns for stage in ("data", "sft", "reward", "ppo")}
    again = command(DSCHAT, "run", "--preset", "tiny", "--run-root", str(root), "--set", *SMOKE, cwd=root)
    assert again.returncode == 0, again.stderr[-2000:]
    assert before == {stage: (root / stage / "result.json").stat().st_mtime_ns for stage in before}
    changed = command(DSCHAT, "ppo", "--preset", "tiny", "--run-root", str(root), "--set", *SMOKE, "ppo.kl_coef=0.5",
                      cwd=root)
    assert changed.returncode == 2 and "ppo.kl_coef: 0.1 -> 0.5" in changed.stderr and "--fresh" in changed.stderr


@pytest.mark.ranks
def test_the_result_answers(chain):
    root, _ = chain
    done = command(DSCHAT, "chat", "--run-root", str(root), "--ask", "what does a cow say", cwd=root)
    assert done.returncode == 0 and done.stdout.strip() and "Traceback" not in done.stderr


@pytest.mark.ranks
def test_a_failed_training_fails_the_chain(chain, tmp_path):
    """A rank's error goes all the way up: cell, papermill, exit code, message; the data built before stays."""
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\nno json\n')
    done = command(DSCHAT, "run", "--preset", "tiny", "--run-root", str(tmp_path / "run"), "--set",
                   f"data.sources={rows}", cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "mine.jsonl, line 2" in said and "01_data_abstraction" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "data" / "status.json").read_text())["state"] == "failed"
