"""The scripts in env/: sound shell, quick when nothing changed, from any folder; set-up itself with a fake pip.

A real set-up takes minutes, so here .venv is made by a stand-in for Python that only writes down what pip was
asked to do. The real one has run whenever these tests run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["env/setup.sh", "env/run.sh", "env/test.sh", ".ci/run"]

# `-m venv DIR` makes a .venv whose python is this script again; `-m pip` logs its arguments; the rest is Python.
STAND_IN = """#!/bin/bash
here=$(dirname "$0")
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages/torch"
    cp "$0" "$3/bin/python"; echo "#!$3/bin/python" > "$3/bin/pip"; printf '%s' "$3" > "$3/place"
    ;;
"-m pip")
    printf '%s\\n' "$*" >> "$FAKE_LOG"
    [[ $3 != install ]] || { sleep "${FAKE_SECONDS:-0}" & trap "kill $!; exit 143" TERM; wait $!; trap - TERM; }
    if [[ -n ${FAKE_FAIL-} && "$*" == *"$FAKE_FAIL"* ]]; then echo "ERROR: no matching distribution"; exit 1; fi
    if [[ $* == *torch==* ]]; then
        printf "__version__ = '2.13.0+cpu'\\ncuda = None\\n" > "$here/../lib/python3.11/site-packages/torch/version.py"
    fi
    if [[ $* == *--editable* ]]; then printf '#!%s\\nprint("ds")\\n' "$here/python" > "$here/deepspeed"; fi
    ;;
*"import dschat_kit"*) echo "import, bytecode ${PYTHONDONTWRITEBYTECODE-is written}"; exit "${FAKE_IMPORT:-0}" ;;
*) exec "REAL" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, in a path with a space, and an environment with the stand-in first on PATH."""
    root = tmp_path / "a checkout"
    for name in ("env", ".ci"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "pyproject.toml", root)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3").write_text(STAND_IN.replace("REAL", sys.executable))
    (bin_folder / "python3").chmod(0o755)
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": "", "FAKE_LOG": str(tmp_path / "pip.log")}
    return root, environment


def setup(checkout, *extras, cwd="/", **more):
    root, environment = checkout
    return subprocess.run(["bash", str(root / "env" / "setup.sh"), *extras], cwd=cwd, env={**environment, **more},
                          capture_output=True, text=True, timeout=60)


def pip_calls(checkout):
    path = Path(checkout[1]["FAKE_LOG"])
    calls = path.read_text().splitlines() if path.exists() else []
    return [call for call in calls if "--version" not in call]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_shell(name):
    text = (ROOT / name).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert not re.search(r"https?://", text), "no index host belongs into a script"


def test_pins_cover_every_dependency_and_name_no_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "env" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    names = {re.match(r"[A-Za-z0-9_.-]+", dependency)[0].replace("_", "-").lower() for dependency in wanted}
    assert names <= set(pins), names - set(pins)
    assert not [name for name, version in pins.items() if "+" in version or name.startswith("nvidia")]
    assert pins["torch"] == "2.13.0" and pins["gguf"] == "0.19.0"


def test_first_torch_then_the_rest_then_nothing(checkout):
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0+cpu (CPU build)" in done.stdout
    calls = pip_calls(checkout)
    assert [call.split()[2] for call in calls] == ["install"] * 3
    assert calls[0].endswith("torch==2.13.0") and "deepspeed>=" in calls[1] and "--editable" in calls[2]
    assert all("constraints.txt" in call for call in calls) and "pytest>=" not in calls[1]
    started = time.monotonic()
    again = setup(checkout, cwd="/tmp")
    assert time.monotonic() - started < 2
    assert again.returncode == 0 and again.stdout.strip() == done.stdout.splitlines()[-2]
    assert len(pip_calls(checkout)) == 3


def test_a_script_that_pip_leaves_with_a_space_in_its_first_line_runs(checkout):
    setup(checkout)
    script = checkout[0] / ".venv" / "bin" / "deepspeed"
    script.chmod(0o755)
    assert script.read_text().startswith("#!/bin/sh\n")
    done = subprocess.run([str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ds\n"), done.stderr


def test_extras_and_pip_arguments_add_up(checkout):
    setup(checkout)
    setup(checkout, "test", "fetch")
    assert "pytest>=" in pip_calls(checkout)[4] and "gguf==0.19.0" in pip_calls(checkout)[4]
    count = len(pip_calls(checkout))
    assert setup(checkout, "test").returncode == setup(checkout).returncode == 0
    assert len(pip_calls(checkout)) == count
    done = setup(checkout, DSCHAT_PIP_ARGS="--find-links /wheels --pre")
    later = pip_calls(checkout)[count:]
    assert "uninstall --yes torch" in later[0] and all("--find-links /wheels --pre" in call for call in later[1:])
    assert "pytest>=" in later[2], "extras asked for before stay"
    assert done.returncode == 0
    assert setup(checkout).returncode == 0 and len(pip_calls(checkout)) == count + len(later)


def test_a_changed_pin_installs_again(checkout):
    setup(checkout)
    pins = checkout[0] / "env" / "constraints.txt"
    pins.write_text(pins.read_text().replace("psutil==", "psutil==0."))
    assert setup(checkout).returncode == 0 and len(pip_calls(checkout)) == 6


def test_a_failing_pip_shows_its_words_and_the_next_call_goes_on(checkout):
    done = setup(checkout, FAKE_FAIL="deepspeed")
    assert done.returncode == 1 and "ERROR: no matching distribution" in done.stderr
    assert "error: 2/3" in done.stderr and "change:" in done.stderr and "Traceback" not in done.stderr
    assert not (checkout[0] / ".venv" / "dschat-setup").exists()
    half = checkout[0] / ".venv" / "lib" / "python3.11" / "site-packages" / "numpy-2.4.6.dist-info"
    half.mkdir()
    done = setup(checkout)
    assert done.returncode == 0 and "numpy-2.4.6 was left half installed" in done.stdout and not half.exists()
    assert "making .venv" not in done.stdout


def test_what_a_rank_imports_is_compiled_whatever_the_shell_says(checkout):
    done = setup(checkout, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0 and "setup: first import: " in done.stdout
    assert (checkout[0] / ".venv" / "setup.log").read_text().endswith("import, bytecode is written\n")


def test_what_cannot_be_imported_is_no_finished_setup(checkout):
    done = setup(checkout, FAKE_IMPORT="1")
    assert done.returncode == 1 and "cannot be imported" in done.stderr and "change:" in done.stderr
    assert not (checkout[0] / ".venv" / "dschat-setup").exists()


def test_an_interrupted_setup_ends_pip_and_leaves_no_stamp(checkout):
    root, environment = checkout
    job = subprocess.Popen(["bash", str(root / "env" / "setup.sh")], env={**environment, "FAKE_SECONDS": "30"},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not pip_calls(checkout):
        assert time.monotonic() < deadline and job.poll() is None, "set-up never came to pip"
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 143
    assert not (root / ".venv" / "dschat-setup").exists()
    assert setup(checkout).returncode == 0


def test_two_at_once_wait_for_each_other(checkout):
    root, environment = checkout
    jobs = [subprocess.Popen(["bash", str(root / "env" / "setup.sh")], env={**environment, "FAKE_SECONDS": "0.5"},
                             stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=60)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(pip_calls(checkout)) == 3 and sum("waiting for it" in text for text in said) == 1


def test_a_moved_checkout_gets_a_new_venv(checkout):
    setup(checkout)
    moved = checkout[0].with_name("moved here")
    checkout[0].rename(moved)
    done = setup((moved, checkout[1]))
    assert done.returncode == 0 and "making .venv anew" in done.stdout and len(pip_calls(checkout)) == 6


def test_an_old_or_unusable_python_is_named(checkout, tmp_path):
    old = tmp_path / "bin" / "python3"
    old.write_text('#!/bin/bash\n[[ $2 == *print* ]] && echo 3.11.2\n[[ $2 != *3,\\ 11,\\ 5* ]]\n')
    done = setup(checkout, DSCHAT_PYTHON="python3")
    assert done.returncode == 1 and "python3 is 3.11.2" in done.stderr and ">= 3.11.5" in done.stderr
    assert "change:" in done.stderr and not (checkout[0] / ".venv").exists()
    done = setup(checkout, DSCHAT_PYTHON="/no/such/python")
    assert done.returncode == 1 and "/no/such/python" in done.stderr


def test_an_unknown_extra_is_refused(checkout):
    done = setup(checkout, "gpu")
    assert done.returncode == 1 and "'gpu'" in done.stderr and "test, fetch, tensorboard" in done.stderr


def test_run_and_test_pass_their_arguments_on(checkout):
    """run.sh: doctor, then the tiny preset; test.sh: core or everything; .ci/run: everything, with the real rows."""
    root, environment = checkout
    setup(checkout, "test", "fetch")
    for name in ("dschat", "python"):
        real = (root / ".venv" / "bin" / "python").read_text()
        guard = 'if [[ "$1 $2" == "-m pytest" ]]; then echo "pytest $* in $PWD data=${DSCHAT_DATA-}"; exit; fi\n'
        text = real.replace("#!/bin/bash\n", "#!/bin/bash\n" + guard)
        (root / ".venv" / "bin" / name).write_text(text if name == "python" else '#!/bin/bash\necho "dschat" "$@"\n')
        (root / ".venv" / "bin" / name).chmod(0o755)
    (root.parent / "shared" / "data").mkdir(parents=True)

    def run(*command):
        done = subprocess.run(["bash", *command], cwd="/", env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    said = run(str(root / "env/run.sh"), "--set", "seed=2")
    assert said[-2:] == ["dschat doctor", "dschat run --preset tiny --set seed=2"]
    assert run(str(root / "env/test.sh"), "-x")[-1] == f"pytest -m pytest -m not slow -x in {root} data="
    assert run(str(root / "env/test.sh"), "--all")[-1] == f"pytest -m pytest in {root} data="
    assert run(str(root / "env/test.sh"), "-k", "a b", "--all")[-1] == f"pytest -m pytest -k a b in {root} data="
    assert run(str(root / ".ci/run"))[-1] == f"pytest -m pytest in {root} data={root.parent / 'shared' / 'data'}"


def test_the_real_environment_is_ready_within_two_seconds(tmp_path):
    if not (ROOT / ".venv" / "dschat-setup").exists():
        pytest.skip("this checkout has no .venv made by env/setup.sh")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    started = time.monotonic()
    done = subprocess.run(["bash", str(ROOT / "env" / "setup.sh")], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=900)
    assert done.returncode == 0 and "torch 2.13.0" in done.stdout, done.stderr
    assert time.monotonic() - started < 2 or "1/3" in done.stdout


def test_files_for_containers_and_ci_point_at_what_exists():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    container = json.loads("".join(line for line in text.splitlines() if not line.lstrip().startswith("//")))
    assert container["postCreateCommand"].split()[1] == "env/setup.sh"
    workflow = (ROOT / ".github" / "workflows" / "headless.yml").read_text()
    assert "bash env/run.sh" in workflow and "bash env/test.sh" in workflow
    assert "bash env/setup.sh" in (ROOT / "env" / "Dockerfile").read_text().replace('" PIP_NO_CACHE_DIR=1', "")
