"""Signals and the watchdog of one rank, in processes of their own."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HANG = """
import sys, time
from dschat_kit.train.watch import Watch
def hung(error):
    print(f"told: {error}", flush=True)
    return 7
watch = Watch(hung)
watch.start(minutes=1 / 60)
for _ in range(15):
    time.sleep(0.1)  # longer than the limit in all, but it beats
    watch.beat()
print("beaten", flush=True)
"""
GIL = "import ctypes; ctypes.PyDLL(None).sleep(60)  # C code that keeps the interpreter to itself"


def python(code: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-u", "-c", code], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], **how)


def test_a_rank_that_hangs_leaves_its_stack_and_ends():
    job = python(HANG + "def stuck(): time.sleep(60)\nstuck()")
    out, err = job.communicate(timeout=30)
    assert job.returncode == 7 and out.startswith("beaten\ntold: no progress for 1 s")
    assert re.search(r'File "<string>", line \d+ in stuck', err)


def test_code_that_never_lets_python_run_is_ended_all_the_same():
    job = python(HANG + GIL)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 1 and "told" not in out and "Timeout" in err and "<string>" in err


def test_a_rank_that_has_done_its_work_is_left_alone():
    job = python(HANG + "watch.stop()\ntime.sleep(2.5)")
    assert job.communicate(timeout=30)[0] == "beaten\n" and job.returncode == 0


SIGNALS = """
import time
from dschat_kit.train.watch import Interrupted, Watch
watch = Watch(None)
watch.take_signals()
watch.can_save = {can_save}
try:
    print("ready", flush=True)
    for _ in range(200):
        time.sleep(0.05)
        if watch.asked:
            print(watch.asked, flush=True)
            {then}
except Interrupted as error:
    print("at once:", error, flush=True)
"""


@pytest.mark.parametrize("can_save, numbers, said", [
    (False, [signal.SIGTERM], "at once: SIGTERM"),
    (True, [signal.SIGTERM], "SIGTERM\n"),
    (True, [signal.SIGINT, signal.SIGTERM, signal.SIGINT], "SIGINT\n"),  # as launchers pass one Ctrl-C on
])
def test_a_signal_waits_for_the_step_where_it_can(can_save, numbers, said):
    job = python(SIGNALS.format(can_save=can_save, then="time.sleep(0.5); break"))
    assert job.stdout.readline() == "ready\n"
    for number in numbers:
        job.send_signal(number)
    out, err = job.communicate(timeout=30)
    assert out.startswith(said) and job.returncode == 0
    assert ("most recent call first" in err) == (signal.SIGTERM in numbers)  # the stack of a rank that is ended


def test_a_second_ctrl_c_does_not_wait():
    job = python(SIGNALS.format(can_save=True, then="watch._asked_at -= 2"))
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    assert [job.stdout.readline() for _ in range(2)] == 2 * ["SIGINT\n"]  # after the second, the clock was moved
    job.send_signal(signal.SIGINT)
    assert "at once: SIGINT" in job.communicate(timeout=30)[0]
