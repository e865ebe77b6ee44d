"""What a launched job leaves behind: launch.log, a readable part on the own output, an honest status.json."""
import fcntl
import os
import select
import shlex
import time
from pathlib import Path

from dschat_kit.notebook.lines import View
from dschat_kit.runs import RunError, StageRun, cannot

MOST_ERRORS = 20


class Report:
    """Context of one job in the folder of `run` (None: no log, no lock, no status). Holds the folder's launch lock.

    Machines after the first (`node` > 0) have a log and a lock of their own and leave the status to the first.
    """

    def __init__(self, run: StageRun | None, argv: list[str], node: int = 0):
        self.run, self.argv, self.name = run, argv, f"launch{node or ''}"
        self.lock_fd, self.log_file, self.where = None, None, ""
        self.errors: list[str] = []
        self.reader_gone = False
        self.poller = select.poll()
        self.poller.register(1, select.POLLOUT)

    def __enter__(self) -> "Report":
        if self.run:
            self.lock_fd = take_lock(self.run.path / f".{self.name}.lock")
            log = self.run.logs / f"{self.name}.log"
            try:
                log.parent.mkdir(exist_ok=True)
                self.sizes = {path: path.stat().st_size for path in log.parent.glob("rank*.log")}
                self.log_file, self.where = open(log, "ab", buffering=0), f"; full log: {log}"
            except OSError as error:
                raise cannot(f"write {log}", error) from error
            self.note(shlex.join(self.argv))
        return self

    def __exit__(self, *_exc) -> None:
        if self.log_file:
            self.log_file.close()
        if self.lock_fd is not None:
            fcntl.flock(self.lock_fd, fcntl.LOCK_UN)  # also for the guard, which shares the lock
            os.close(self.lock_fd)

    def log(self, raw: bytes) -> None:
        """Append a line to launch.log; on a full disk say so once and let the job go on."""
        if self.log_file:
            try:
                self.log_file.write(raw)
            except OSError as error:
                self.log_file = None
                self.error(f"error: {cannot(f'write {self.run.logs}/{self.name}.log', error)}")

    def note(self, text: str) -> None:
        """A line of the launcher's own in launch.log."""
        self.log(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())

    def show(self, view: View) -> None:
        """Show what is due, as long as the reader takes it: a job never waits for its reader."""
        while self._room() and (line := view.due()):
            self.reader_gone = not _write(1, line)

    def error(self, text: str) -> None:
        """Show an error of the job on standard error at once; what several ranks say alike is shown once."""
        if text not in self.errors and len(self.errors) < MOST_ERRORS:
            self.errors.append(text)
            _write(2, text)

    def ending(self) -> None:
        """Note in the lock that this launcher is ending its job, so that the next one waits for it."""
        if self.lock_fd is not None:
            os.write(self.lock_fd, b"ending\n")

    def finish(self, code: int, reason: str, view: View) -> int:
        """Show the last lines and, where the job did not succeed, why; settle status.json. Returns `code`."""
        for line in view.rest(self.where):
            if not self._room(wait=2000):
                break
            _write(1, line)
        if code == 0 and not reason:
            return 0
        reason = reason or "asked to end" * (code == 130)  # by a signal that the ranks got and we did not
        if not reason and not self.errors:
            _write(2, *self._failing_tail())
        killed = code - 128 if 128 < code < 160 else 256 - code if code > 224 else 0  # DeepSpeed passes -9 on as 247
        what = reason or (f"killed by signal {killed}" if killed else f"ended with exit code {code}")
        what += ", perhaps for want of memory" if killed == 9 and not reason else ""
        _write(2, f"dschat launch: {self.argv[0]}: {what}{self.where}")
        self.note(what)
        cause = self.errors[0].removeprefix("error: ") if self.errors and not reason else what
        self.settle("interrupted" if reason else "failed", cause)
        return code

    def settle(self, state: str, error: str) -> None:
        """Turn a `running` (or missing) status.json into `state`. Raises RunError while a rank is still at work."""
        if self.run and self.name == "launch":
            with self.run.lock():
                if self.run.status.get("state", "running") == "running":
                    self.run.update_status(state=state, error=error)

    def _room(self, wait: int = 0) -> bool:
        """Whether the reader takes a line now, or within `wait` milliseconds."""
        events = dict(self.poller.poll(wait)).get(1, 0)
        self.reader_gone = self.reader_gone or bool(events & (select.POLLERR | select.POLLHUP))
        return bool(events & select.POLLOUT) and not self.reader_gone

    def _failing_tail(self, count: int = 15) -> list[str]:
        """Last lines of the rank that failed first, by the time of its traceback; [] where no rank left one."""
        found = []
        for path in sorted(self.run.logs.glob("rank*.log")) if self.run else []:
            new = path.read_bytes()[self.sizes.get(path, 0):]
            lines = new[-20_000:].decode("utf-8", errors="replace").splitlines()
            if any(line.startswith("Traceback") for line in lines):
                found.append((path.stat().st_mtime, [f"last lines of {path}:", *lines[-count:]]))
        return min(found)[1] if found else []


def take_lock(path: Path) -> int:
    """Lock the file `path` and return its descriptor. Raises RunError when another launcher has it.

    One that is ending its job (an interrupted cell that is run again) is waited for, up to 30 seconds.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise cannot(f"write in {folder}", error) from error
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            return descriptor
        except BlockingIOError:
            patience = 30 if os.fstat(descriptor).st_size else 0.5  # who only looks at it holds it for an instant
            if time.monotonic() - begun > patience:
                os.close(descriptor)
                raise RunError(f"{folder} is in use by another dschat launch\n  change: wait for it, interrupt it, or "
                               "choose another --run-root") from None
            time.sleep(0.05)


def _write(descriptor: int, *lines: str) -> bool:
    """Write to an own output; False when nobody takes it any more."""
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")
    try:
        while data:
            data = data[os.write(descriptor, data):]
    except OSError:
        return False
    return True
