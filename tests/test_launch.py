"""The prefix command: output, exit code, no process left, whatever ends. Children are plain python and bash: fast."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dschat_kit.notebook.launch import TAG, child_command, child_environment
from dschat_kit.notebook.report import View

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher is Linux only")
LAUNCH = [sys.executable, "-m", "dschat_kit.notebook.launch", "--"]
PY = [sys.executable, "-u", "-c"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (TAG, "PYTHONUNBUFFERED", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSCHAT_GRACE", "1.5")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.fixture
def stage(tmp_path) -> Path:
    """A prepared stage folder as a launched job finds it."""
    folder = tmp_path / "a run" / "ppo"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "status.json").write_text('{"state": "running", "step": 3, "total": 9}')
    return folder


def run(command, **options):
    return subprocess.run([*LAUNCH, *command], capture_output=True, timeout=60, **options)


def alive(marker: str) -> list[str]:
    """Command lines of living processes with `marker` in their environment or arguments, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if marker.encode() in arguments + variables:
                found.append(arguments.replace(b"\0", b" ").decode())
    return found


def wait_until(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)
    return value


def status(stage: Path) -> dict:
    return json.loads((stage / "status.json").read_text())


def begun(command, marker: Path, **options) -> subprocess.Popen:
    """Start a launch whose child makes the file `marker` when it is at work."""
    process = subprocess.Popen([*LAUNCH, *command], **options)
    wait_until(marker.exists)
    return process


def test_exit_code_and_both_outputs_pass_on():
    done = run(["bash", "-c", "echo out; echo err >&2; exit 7"])
    assert done.returncode == 7
    assert done.stdout.decode().splitlines() == ["out", "err"]
    assert b"exit code 7" in done.stderr
    assert run(["bash", "-c", "kill -9 $$"]).returncode == 137


def test_split_characters_arrive_as_whole_lines():
    script = ("import os, time\nfor byte in 'größer → 語\\n'.encode(): os.write(1, bytes([byte])); time.sleep(.005)\n"
              "os.write(1, 'no newline …'.encode()[:-1])")
    process = subprocess.Popen([*LAUNCH, *PY, script], stdout=subprocess.PIPE, bufsize=0)
    chunks = list(iter(lambda: os.read(process.stdout.fileno(), 4096), b""))
    assert process.wait() == 0
    assert all(chunk.endswith(b"\n") for chunk in chunks), chunks
    assert b"".join(chunks).decode() == "größer → 語\nno newline \ufffd\n"


def test_many_lines_are_all_in_the_log_and_few_are_shown(stage):
    done = run([*PY, "for i in range(200_000): print('step', i)\nimport sys; assert sys.argv[2]", "--run", str(stage)])
    shown, log = done.stdout.decode().splitlines(), (stage / "logs/launch.log").read_text().splitlines()
    assert done.returncode == 0
    assert [line for line in log if line.startswith("step")] == [f"step {i}" for i in range(200_000)]
    assert len(shown) < 250 and shown[0] == "step 0" and shown[-1] == "step 199999"
    assert any("lines not shown" in line and str(stage) in line for line in shown)


def test_an_hour_of_output_stays_readable():
    view, shown = View(), []
    for second in range(3600 * 5):
        view.add(b"step %d\n" % second)
        if line := view.due(now=second / 5):
            shown.append(line)
    assert 200 < len(shown) < 600


def test_library_lines_only_in_the_log(stage):
    lines = ["[2026-01-31 12:00:00,123] [INFO] [real_accelerator.py:222] Setting", "W0131 12:00:00.000 12 torch] x",
             "/a/b.py:12: FutureWarning: old", "  call_of_it()", "[Gloo] Rank 0 is connected to 1 peer ranks",
             "ppo  step 1/9  score 0.5"]
    done = run([*PY, f"print({chr(10).join(lines)!r})", "--run", str(stage)])
    assert done.stdout.decode().splitlines() == ["ppo  step 1/9  score 0.5"]
    assert all(line in (stage / "logs/launch.log").read_text() for line in lines)


def test_output_comes_while_the_job_runs():
    process = subprocess.Popen([*LAUNCH, sys.executable, "-c", "import time; print('now'); time.sleep(60)"],
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"  # PYTHONUNBUFFERED is set for the child
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_stdin_is_not_eaten():
    script = f'{shlex.join(LAUNCH)} cat\necho after\n'
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True, timeout=30)
    assert done.stdout == b"after\n"


STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
open(sys.argv[1] + str(os.getpid()), "w").close()
open(sys.argv[1], "w").close()
time.sleep(300)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_ignores_signals_ends_with_its_grandchild(tmp_path, stage, signum):
    marker = tmp_path / f"marker{signum}"
    process = begun([*PY, STUBBORN, str(marker), "--run", str(stage)], marker)
    wait_until(lambda: len(list(tmp_path.glob("marker*"))) == 3)
    process.send_signal(signum)
    assert process.wait(20) == 128 + signum
    assert not alive(str(marker))
    assert status(stage)["state"] == "interrupted"


def test_an_interrupt_is_no_traceback(tmp_path, stage):
    script = ("import sys, time\nopen(sys.argv[1], 'w')\ntry: time.sleep(60)\n"
              "finally: print('ppo  checkpoint at step 3', flush=True)")
    process = begun([*PY, script, str(tmp_path / "marker"), "--run", str(stage)], tmp_path / "marker",
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out == b"ppo  checkpoint at step 3\n" and b"Traceback" not in err and b"interrupted" in err
    assert "KeyboardInterrupt" in (stage / "logs/launch.log").read_text()


def test_background_processes_end_with_the_job(tmp_path):
    marker = str(tmp_path / "left")
    assert run(["bash", "-c", f"setsid sleep 300 {marker} & MARK={marker} setsid sleep 300 &"]).returncode == 0
    assert not alive(marker)


def test_killed_reader_ends_the_job(tmp_path, stage):
    marker = tmp_path / "marker"
    process = begun([*PY, STUBBORN, str(marker), "--run", str(stage)], marker, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(20) == 129
    assert not alive(str(marker))
    assert status(stage)["state"] == "interrupted"


@pytest.mark.parametrize("victim", ["shell", "launcher"])
def test_kill_9_of_the_shell_or_the_launcher_leaves_nothing(tmp_path, stage, victim):
    marker = tmp_path / "marker"
    script = '"$@" & echo $! ; wait'
    with open(tmp_path / "out", "wb") as out:
        shell = subprocess.Popen(["bash", "-c", script, "x", *LAUNCH, *PY, STUBBORN, str(marker), "--run", str(stage)],
                                 stdout=out)
        wait_until(marker.exists)
        launcher = int((tmp_path / "out").read_text().split()[0])
        os.kill(shell.pid if victim == "shell" else launcher, signal.SIGKILL)
        wait_until(lambda: not alive(str(marker)))
    shell.wait()
    wait_until(lambda: status(stage)["state"] == "interrupted")


def test_second_launch_on_a_folder_is_refused_and_a_later_one_is_not(tmp_path, stage):
    marker = tmp_path / "marker"
    first = begun([*PY, STUBBORN, str(marker), "--run", str(stage)], marker)
    second = run(["echo", "--run", str(stage)])
    assert second.returncode == 2 and b"in use" in second.stderr and b"Traceback" not in second.stderr
    assert status(stage)["state"] == "running"
    first.send_signal(signal.SIGINT)
    time.sleep(0.3)
    third = run(["echo", "third", "--run", str(stage)])  # waits for the one that is ending
    assert third.returncode == 0 and b"third" in third.stdout
    assert first.wait() == 130


def test_a_second_machine_has_its_own_log_and_leaves_lock_and_status_to_the_first(tmp_path, stage):
    first = begun([*PY, STUBBORN, str(tmp_path / "marker"), "--run", str(stage)], tmp_path / "marker")
    second = run(["bash", "-c", "echo here; exit 3", "--node_rank", "1", "--run", str(stage)])
    assert second.returncode == 3 and "here" in (stage / "logs/launch1.log").read_text()
    assert status(stage)["state"] == "running"
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130 and status(stage)["state"] == "interrupted"


def test_ranks_are_asked_to_end_before_their_launchers(tmp_path, stage):
    rank = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('saved'), sys.exit(130)))"
    script = f"""trap 'echo launcher hit first' INT TERM
                 RANK=0 '{sys.executable}' -c "{rank}; open('$0', 'w'); time.sleep(60)"; echo ended $?; exit 130"""
    process = begun(["bash", "-c", script, str(tmp_path / "marker"), "--run", str(stage)], tmp_path / "marker",
                    stdout=subprocess.PIPE)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == b"saved\nended 130\n" and process.returncode == 128 + signal.SIGTERM
    assert status(stage)["state"] == "interrupted"


def test_ranks_that_were_asked_to_end_by_others_are_interrupted_not_failed(stage):
    script = 'echo "Traceback (most" > "$1/logs/rank0.log"; exit 130'
    done = run(["bash", "-c", script, "--run", str(stage)])
    assert done.returncode == 130 and b"asked to end" in done.stderr and b"last lines" not in done.stderr
    assert (stage / "logs/rank0.log").exists() and status(stage)["state"] == "interrupted"


def test_locks_of_killed_compilations_are_removed_and_those_at_work_are_not(tmp_path, stage, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / "py311_cpu" / name / "lock" for name in ("left", "elsewhere", "here", "mine")]
    for lock in locks[:3]:
        lock.parent.mkdir(parents=True)
        lock.touch()
    for lock in (locks[0], locks[2]):
        for path in (lock, lock.parent):
            os.utime(path, (time.time() - 90, time.time() - 90))
    with subprocess.Popen(["sleep", "60"], cwd=locks[2].parent) as compiler:
        assert run(["true", "--run", str(stage)]).returncode == 0
        assert [lock.exists() for lock in locks[:3]] == [False, True, True]  # another machine may work on the second
        compiler.kill()
    killed = f"mkdir -p '{locks[3].parent}'; cd '{locks[3].parent}'; touch lock; kill -9 $$"
    assert run(["bash", "-c", killed, "--run", str(stage)]).returncode == 137 and not locks[3].exists()
    assert str(locks[0]) in (stage / "logs/launch.log").read_text()


def test_failing_rank_is_quoted_and_the_status_says_failed(stage):
    write = "open(sys.argv[2] + '/logs/rank1.log', 'w').write"
    script = f"import sys; {write}('noise\\nTraceback (most\\nValueError: bad\\n'); sys.exit(1)"
    done = run([*PY, script, "--run", str(stage)])
    assert done.returncode == 1 and b"rank1.log" in done.stderr and b"ValueError: bad" in done.stderr
    assert status(stage)["state"] == "failed" and status(stage)["step"] == 3


def test_user_errors_are_shown_once_and_kept(stage):
    message = "error: rows.jsonl, line 2: no JSON\\n  change: mend it\\n"
    done = run([*PY, f"import sys; sys.stderr.write('{message}' * 2); sys.exit(2)", "--run", str(stage)])
    assert done.returncode == 2
    assert done.stderr.decode().count("line 2: no JSON") == 1 and "change: mend it" in done.stderr.decode()
    assert {"state": "failed", "step": 3, "total": 9, "error": "rows.jsonl, line 2: no JSON"}.items() <= \
        status(stage).items()


def test_status_of_a_finished_stage_is_left_alone(stage):
    (stage / "status.json").write_text('{"state": "finished"}')
    assert run(["false", "--run", str(stage)]).returncode == 1
    assert status(stage) == {"state": "finished"}


@pytest.mark.parametrize("command, said", [(["no-such-program"], "cannot start"), ([], "got no command"),
                                           (["echo", "--run", "/no/such/run"], "no folder")])
def test_bad_commands_say_what_is_wrong(command, said):
    done = run(command)
    assert done.returncode in (2, 127)
    assert said in done.stderr.decode() and "Traceback" not in done.stderr.decode()


def test_deepspeed_gets_a_port_of_its_own_unless_one_is_named():
    assert child_command(["deepspeed", "a.py"], 20001) == ["deepspeed", "--master_port", "20001", "a.py"]
    for given in (["--master_port=5", "a.py"], ["--hostfile", "h", "a.py"]):
        assert child_command(["deepspeed", *given], 20001) == ["deepspeed", *given]
    assert child_command(["python", "a.py"], 20001) == ["python", "a.py"]


def test_environment_defaults_and_the_users_own_values(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    two = child_environment(["deepspeed", "--num_gpus", "64"], 20001)
    assert two["OMP_NUM_THREADS"] == "1" and two["PYTHONUNBUFFERED"] == "1" and two["MASTER_PORT"] == "20001"
    assert two["TOKENIZERS_PARALLELISM"] == "true"
    assert "OMP_WAIT_POLICY" not in two  # passive threads sleep between the many small parts of a decode step
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in child_environment(["srun", "node.sh"], 20001)  # which knows how many ranks are here
    assert two["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def notebook(path: Path, *cells: str) -> Path:
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def papermill(source: Path, target: Path, **options) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen([sys.executable, "-m", "papermill", "-k", "python3", str(source), str(target)],
                            stderr=subprocess.PIPE, env={**os.environ, "PATH": path}, **options)


def test_failing_training_fails_papermill(tmp_path, stage):
    cell = f"%%bash\nset -euo pipefail\n{shlex.join(LAUNCH)} bash -c 'echo \"error: no rows\"; exit 2' --run '{stage}'"
    process = papermill(notebook(tmp_path / "a.ipynb", cell, "print('not reached')"), tmp_path / "b.ipynb")
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and "CalledProcessError" in stderr
    assert "error: no rows" in (tmp_path / "b.ipynb").read_text()
    assert status(stage)["state"] == "failed"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_papermill_ended_from_outside_leaves_nothing(tmp_path, stage, signum):
    marker, child = tmp_path / "marker", tmp_path / "stubborn.py"
    child.write_text(STUBBORN)
    job = shlex.join([*LAUNCH, sys.executable, str(child), str(marker), "--run", str(stage)])
    cell = f"%%bash\nset -euo pipefail\n{job}"
    process = papermill(notebook(tmp_path / "a.ipynb", cell), tmp_path / "b.ipynb")
    wait_until(marker.exists, 40)
    process.send_signal(signum)
    process.communicate(timeout=60)
    wait_until(lambda: not alive(str(marker)))
    wait_until(lambda: status(stage)["state"] == "interrupted")
