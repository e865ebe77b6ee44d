"""The live view: what it says of a run folder, when it ends, and that it works in a real kernel."""
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from fake_run import make_run, write_lines
from nbformat.v4 import new_code_cell, new_notebook

from dschat_kit.notebook import monitor
from dschat_kit.notebook.progress import Follow, Line, watch_text
from dschat_kit.runs import RunError


def set_status(stage: Path, state: str, step: int = 0, **more) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    now = time.time()
    temporary = stage / "status.tmp"
    status = {"state": state, "step": step, "total": 4, "started": now - 10, "updated": now, **more}
    temporary.write_text(json.dumps(status))
    temporary.replace(stage / "status.json")


def test_a_stage_is_followed_from_waiting_to_its_end(tmp_path):
    stage = tmp_path / "ppo"
    set_status(stage, "interrupted", 1)
    follow = Follow(stage)
    assert follow.poll().state == "interrupted" and not follow.over  # it may be about to be resumed
    set_status(stage, "running", 2)
    write_lines(stage / "metrics.jsonl", [{"step": 2, "score_mean": 1.5, "kl": None}])
    look = follow.poll()
    assert (look.step, look.fraction, look.numbers) == (2, 0.5, {"score_mean": 1.5})
    assert look.eta == pytest.approx(10, abs=0.5)
    assert look.text() == "ppo  step 2/4  score_mean 1.5  about 0:10 left" or "0:09" in look.text()
    set_status(stage, "failed", 2, error="no rows")
    assert follow.poll().text().endswith("failed: no rows") and follow.over


def test_time_left_follows_the_pace_not_the_slow_start(tmp_path, monkeypatch):
    stage, begun = tmp_path / "sft", time.time()
    set_status(stage, "running", 10, total=100, started=begun - 60)  # a minute to load, the steps come after it
    follow = Follow(stage)
    assert follow.poll().eta == pytest.approx(540, abs=5)
    monkeypatch.setattr(time, "time", lambda: begun + 10)
    set_status(stage, "running", 20, total=100, started=begun - 60)
    assert follow.poll().eta == pytest.approx(80, abs=1)
    set_status(stage, "running", 0, total=100)
    assert follow.poll().text() == "sft  step 0/100  starting"


def test_running_without_anybody_at_work_is_interrupted(tmp_path):
    stage = tmp_path / "sft"
    set_status(stage, "running", 2, updated=time.time() - 100)
    assert Follow(stage).poll().state == "interrupted"
    import fcntl
    with open(stage / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Follow(stage).poll().state == "running"


def test_a_run_folder_shows_the_stage_at_work(tmp_path):
    make_run(tmp_path)
    assert Follow(tmp_path).poll().stage in ("ppo", "reward", "sft", "data")
    set_status(tmp_path / "reward", "running", 3)
    follow = Follow(tmp_path)
    assert follow.poll().stage == "reward" and not follow.over


def test_watch_text_prints_few_plain_lines_and_ends_with_the_stage(tmp_path):
    stage, stream = tmp_path / "sft", io.StringIO()
    set_status(stage, "running", 0)

    def train():
        for step in range(1, 5):
            time.sleep(0.1)
            set_status(stage, "running", step)
        set_status(stage, "finished", 4)

    threading.Thread(target=train).start()
    assert watch_text(stage, stream, every=0.02) == 0
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("[####################] sft") and lines[-1].endswith("finished")
    assert len(lines) <= 7 and "\r" not in stream.getvalue()


def test_watch_text_says_failed_and_refuses_a_missing_folder(tmp_path):
    set_status(tmp_path / "sft", "running", 1)
    timer = threading.Timer(0.2, lambda: set_status(tmp_path / "sft", "failed", 1, error="a rank died"))
    timer.start()
    stream = io.StringIO()
    assert watch_text(tmp_path / "sft", stream, every=0.05) == 1
    assert "a rank died" in stream.getvalue()
    with pytest.raises(RunError, match="no folder"):
        watch_text(tmp_path / "none")


def test_watching_the_folder_of_several_runs_is_refused_and_waiting_is_said(tmp_path):
    (tmp_path / "one" / "sft").mkdir(parents=True)
    (tmp_path / "one" / "sft" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="holds runs: one\n(.|\n)*dschat watch .*one"):
        watch_text(tmp_path)
    set_status(tmp_path / "one" / "sft", "finished", 4)
    stream, timer = io.StringIO(), threading.Timer(0.3, lambda: set_status(tmp_path / "one" / "chat", "finished", 1))
    timer.start()
    assert watch_text(tmp_path / "one", stream, every=0.05) == 0
    assert "finished; waiting for what comes next, Ctrl-C ends" in stream.getvalue()


def test_a_terminal_line_is_redrawn_and_fits(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    line = Line(stream)
    line.show("x" * 100)
    line.show("short")
    assert stream.getvalue() == "\r" + "x" * 39 + "\r" + "short".ljust(39)


WATCH = """
import time
from dschat_kit.notebook import monitor
live = monitor.watch(STAGE, every=0.2)
seen, poll = [], live.follow.poll
def noted():
    seen.append(time.time())
    return poll()
live.follow.poll = noted
"""
TRAIN = """%%bash
set -euo pipefail
python - "$STAGE" <<'END'
import json, os, sys, time
stage = sys.argv[1]
for step in range(1, 6):
    open(stage + "/metrics.jsonl", "a").write(json.dumps({"step": step, "loss": 5 - step, "eval_loss": None}) + "\\n")
    state = "finished" if step == 5 else "running"
    status = {"state": state, "step": step, "total": 5, "started": 0, "updated": time.time()}
    open(stage + "/status.tmp", "w").write(json.dumps(status))
    os.replace(stage + "/status.tmp", stage + "/status.json")
    time.sleep(0.8)
END"""
CHECK = "end = time.time()\nlive.thread.join(20)\nlive.stop()\nprint('live', sum(moment < end for moment in seen))"


def test_bar_and_figure_move_while_a_bash_cell_blocks_and_stay(tmp_path):
    stage = tmp_path / "sft"
    stage.mkdir()
    first = f"import os\nSTAGE = os.environ['STAGE'] = {str(stage)!r}\n{WATCH}"
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in (first, TRAIN, CHECK)]), tmp_path / "a.ipynb")
    bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_first, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar"]
    done = subprocess.run([*command, tmp_path / "a.ipynb", tmp_path / "b.ipynb"], env=environment, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    cells = nbformat.read(tmp_path / "b.ipynb", 4).cells
    pictures = [output for output in cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and "5 steps" in pictures[0].data["text/plain"]
    assert "step 5/5" in cells[0].outputs[0].data["text/html"]
    assert int(cells[2].outputs[0].text.split()[1]) >= 1
    assert (tmp_path / "b.ipynb").stat().st_size < 200_000


def test_an_error_in_the_thread_is_raised_by_stop(tmp_path):
    (tmp_path / "sft").mkdir()
    live = monitor.watch(tmp_path / "sft", every=0.05)
    (tmp_path / "sft/status.json").write_text("{ damaged")
    live.thread.join(10)
    with pytest.raises(RunError, match="status.json is not readable"):
        live.stop()
