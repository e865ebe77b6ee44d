"""Find and end every process of a job on Linux: each carries NAME=TAG in its environment, read through /proc.

A tag survives what a process group or a session does not: a child that calls setsid, a parent that dies first.
"""
import os
import signal
import time
from pathlib import Path

ESCALATION = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def tagged(mark: str) -> list[int]:
    """Ids of the living processes whose environment at exec held `mark` ("NAME=TAG"), this one left out."""
    needle, found = mark.encode(), []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            continue
        if needle in environment.split(b"\0"):  # a zombie's environment is empty
            found.append(int(entry.name))
    return found


def send(pids: list[int], signum: int) -> None:
    """Send `signum` to each of `pids`; one that has just ended is no error."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass


class Ending:
    """Ends everything that carries `mark`: INT, then TERM, then KILL, without blocking. Call `step()` until True.

    `waits` are the seconds that processes get after INT and after TERM; `first` those before the INT.
    """

    def __init__(self, mark: str, waits: tuple[float, float] = (6.0, 4.0), first: float = 0.0):
        self.mark, self.waits = mark, (*waits, 1.0)
        self.next_at, self.level = time.monotonic() + first, 0

    def hurry(self) -> None:
        """Go to the next, harder signal at once."""
        self.next_at = time.monotonic()

    def step(self) -> bool:
        """Send the next signal when it is due; True when no process is left."""
        alive = tagged(self.mark)
        if alive and time.monotonic() >= self.next_at:
            send(alive, ESCALATION[self.level])
            self.next_at = time.monotonic() + self.waits[self.level]
            self.level = min(self.level + 1, len(ESCALATION) - 1)
        return not alive

    def run(self) -> None:
        """Block until no process is left."""
        while not self.step():
            time.sleep(0.1)


def guard(mark: str, keep: int | None, afterwards) -> int:
    """Start a small process that ends the job, should this one be killed outright; returns the descriptor it watches.

    It is no child of ours and in its own session, so that a signal to our group or to our children passes it by.
    It holds `keep` (the locked file) open: the run stays in use until the last process has ended. It calls
    `afterwards()` only when it had something to end.
    """
    read_end, write_end = os.pipe()
    if child := os.fork():
        os.close(read_end)
        os.waitpid(child, 0)
        return write_end
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # a notebook waits until nobody holds its pipes
            os.dup2(null, standard)
        kept = sorted({read_end} | ({keep} if keep is not None else set()))
        for low, high in zip([2, *kept], [*kept, 4096], strict=True):
            os.closerange(low + 1, high)
        os.read(read_end, 1)  # returns when the launcher has ended, in whatever way
        if tagged(mark):
            Ending(mark, waits=(3.0, 2.0)).run()
            afterwards()
    finally:
        os._exit(0)
