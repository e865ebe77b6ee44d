"""Find and end every process of a job: each carries NAME=TAG ("mark") in its environment.

A mark survives what a process group or a session does not: a child that calls setsid, a parent that dies first.
"""
import os
import signal
import time
from contextlib import contextmanager, suppress

import psutil

ESCALATION = ((signal.SIGINT, 0.6), (signal.SIGTERM, 0.4), (signal.SIGKILL, 0.1))  # and the share of the time after it


def tagged(mark: str) -> list[psutil.Process]:
    """The living processes whose environment at exec held `mark`, this one left out."""
    name, _, value = mark.partition("=")
    return [process for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get(name) == value and process.pid != os.getpid()]


class Ending:
    """Ends everything that carries `mark`: INT, then TERM, then KILL, without blocking. Call `step()` until True.

    It begins after `first` seconds and comes to the KILL within `seconds`; the default is what a training gets to
    write its checkpoint.
    """

    def __init__(self, mark: str, first: float = 0.0, seconds: float | None = None):
        self.mark, self.level, self.next_at = mark, 0, time.monotonic() + first
        self.seconds = seconds or float(os.environ.get("DSCHAT_GRACE", "10"))

    def step(self) -> bool:
        """Send the next signal when it is due; True when no process is left."""
        alive = tagged(self.mark)
        if alive and time.monotonic() >= self.next_at:
            number, share = ESCALATION[self.level]
            for process in alive:
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    process.send_signal(number)
            self.next_at = time.monotonic() + share * self.seconds
            self.level = min(self.level + 1, len(ESCALATION) - 1)
        return not alive

    def run(self) -> None:
        """Block until no process is left."""
        while not self.step():
            time.sleep(0.1)


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
def guard(mark: str, afterwards=lambda: None):
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
        os.read(read_end, 1)  # returns when the launcher has ended, in whatever way
        if tagged(mark):
            Ending(mark, seconds=5.0).run()
            afterwards()
    finally:
        os._exit(0)
