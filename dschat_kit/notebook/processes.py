"""Find and end every process of a job: each carries its mark, {NAME: TAG}, in its environment.

A mark survives what a process group or a session does not: a child that calls setsid, a parent that dies first.
"""
import math
import os
import select
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ESCALATION = ((signal.SIGINT, 0.6), (signal.SIGTERM, 0.4), (signal.SIGKILL, 0.1))  # and the share of the time after it


def tagged(mark: dict[str, str]) -> list[psutil.Process]:
    """The living processes whose environment at exec held `mark`, this one left out."""
    return [process for process in psutil.process_iter(["environ"])
            if mark.items() <= (process.info["environ"] or {}).items() and process.pid != os.getpid()]


class Ending:
    """Ends everything that carries `mark`: INT, then TERM, then KILL, without blocking. Call `step()` until True.

    It begins after `first` seconds and comes to the KILL within `seconds`, which is what a training gets to save a
    checkpoint. With `ranks_first` the INT goes to the ranks alone where there are any: an srun would kill them.
    """

    def __init__(self, mark: dict[str, str], first: float = 0.0, seconds: float | None = None,
                 ranks_first: bool = False):
        self.mark, self.level, self.next_at, self.ranks_first = mark, 0, time.monotonic() + first, ranks_first
        self.seconds = seconds or float(os.environ.get("DSCHAT_GRACE", "10"))

    def step(self) -> bool:
        """Send the next signal when it is due; True when no process is left."""
        alive = tagged(self.mark)
        if alive and time.monotonic() >= self.next_at:
            number, share = ESCALATION[self.level]
            ranks = [process for process in alive if "RANK" in process.info["environ"]]
            for process in ranks if ranks and self.ranks_first and not self.level else alive:
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    process.send_signal(number)
            self.next_at = time.monotonic() + share * self.seconds
            self.level = min(self.level + 1, len(ESCALATION) - 1)
        return not alive

    def run(self) -> None:
        """Block until no process is left."""
        while not self.step():
            time.sleep(0.1)


def remove_stale_compile_locks(since: float = math.inf, quiet: float = 60.0) -> list[Path]:
    """Remove, and return, the locks of torch's extension compiler behind which every later run would wait for ever.

    No process of this machine works in their folder, and for `quiet` seconds none of another machine has written there,
    or they were made after `since`, the start of a job that has ended.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or
                Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions")
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    busy = {process.info["cwd"] for process in psutil.process_iter(["cwd"])} if locks else set()
    stale = [lock for lock in locks if str(lock.parent.resolve()) not in busy and (
        lock.stat().st_mtime >= since or time.time() - quiet > max(p.stat().st_mtime for p in lock.parent.iterdir()))]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


@contextmanager
def handling(handler, *numbers: int):
    """Signals go to `handler` within; a SIGHUP that nohup ignores stays ignored."""
    before = {number: signal.signal(number, handler) for number in numbers
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def guard(mark: dict[str, str], afterwards=lambda: None):
    """Within, a small process stands by to end the job, should this one be killed outright.

    It is no child of ours and in its own session, so that a signal to our group or to our children passes it by. As a
    copy of us it holds our locks: the run stays in use until the last process has ended. It calls `afterwards()` only
    when it had something to end.
    """
    read_end, write_end = os.pipe()
    if child := os.fork():
        os.close(read_end)
        os.waitpid(child, 0)
        try:
            yield
            os.write(write_end, b".")  # the job has ended, and the guard has to be gone before we are
            gone = select.poll()
            gone.register(write_end, 0)
            gone.poll(2000)
        finally:
            os.close(write_end)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number, _ in ESCALATION[:2] + ((signal.SIGHUP, 0),):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # a notebook waits until nobody holds its pipes
            os.dup2(null, standard)
        os.close(write_end)
        if not os.read(read_end, 1) and tagged(mark):  # it returns without a byte when the launcher was killed
            Ending(mark, seconds=5.0).run()
            afterwards()
    finally:
        os._exit(0)
