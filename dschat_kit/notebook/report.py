"""What a launched job leaves behind: launch.log, a readable part on the own output, an honest status.json."""
import fcntl
import os
import re
import select
import shlex
import time
from collections import deque
from contextlib import suppress

from dschat_kit.runs import StageRun, cannot, take_lock

LIBRARY = re.compile(
    r"""^\[\d{4}-\d\d-\d\d[ T][\d:.,]+\]\ \[[A-Z]+\]   # DeepSpeed: [2026-01-31 12:00:00,123] [INFO] ...
      | ^(\[rank\d+\]:\s?)?\[?[IWE]\d{4}\ [\d:.]+      # torch, glog: [W131 ...], W0131 12:00:00.000000 ...
      | ^\[?(INFO|DEBUG|WARNING)\b
      | ^(?P<warning>[^\s:]+\.pyi?:\d+:\ \w*Warning:)  # warnings.warn
      | ^\[Gloo\]\ Rank
      | ^(Setting\ ds_accelerator|Using\ .*torch_extensions|Loading\ extension\ module|ninja:\ no\ work)
      | ^(Detected\ VISIBLE_DEVICES|No\ module\ named\ 'triton'|Using\ quantizer)
      | ^\s*$""",
    re.VERBOSE,
)
FIRST, LAST, LONGEST = 150, 20, 400  # lines shown at once, lines shown at the end, characters shown of one line
MOST_ERRORS = 20


class View:
    """Chooses what is shown: the first lines at once, later ones ever more rarely, and always the last ones.

    After FIRST lines the newest is shown whenever 2 % of the time so far have passed, so that an hour of output takes
    about FIRST + 300 lines. Lines of libraries are left to the log.
    """

    def __init__(self):
        self.added, self.shown = 0, 0
        self.held: deque[str] = deque(maxlen=LAST)  # newest lines not shown so far
        self.begun, self.next_at, self.last, self.after_warning = None, 0.0, "", False

    def add(self, raw: bytes) -> None:
        """Take one line; `due` says what to show."""
        text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2]  # last state of a progress bar
        quoted = self.after_warning and text.startswith("  ")  # the source line under a warning
        library = LIBRARY.match(text)
        self.after_warning = bool(library and library["warning"])
        if not quoted and not library:
            self.added += 1
            self.held.append(text if len(text) <= LONGEST else text[:LONGEST] + " ...")

    def due(self, now: float | None = None) -> str:
        """The line to show at this moment, "" for none; ask again until then."""
        now = time.monotonic() if now is None else now
        self.begun = now if self.begun is None else self.begun
        few = self.shown < FIRST
        if not self.held or not few and now < self.next_at:
            return ""
        self.last = self.held.popleft() if few else self.held.pop()
        if not few:
            self.held.clear()
        self.shown += 1
        self.next_at = now + max(0.5, 0.02 * (now - self.begun))
        return self.last

    def rest(self, where: str) -> list[str]:
        """The last lines, after one that says how many were left out and `where` they are."""
        skipped = self.added - self.shown - len(self.held)
        if not skipped:
            return list(self.held)
        return [f"... ({skipped} lines not shown here{where})", *(self.held or [self.last])]


class Report:
    """Context of one job in the folder of `run` (None: no log, no lock, no status). Holds the folder's launch lock.

    Machines after the first (`node` > 0) have a log and a lock of their own and leave the status to the first.
    """

    def __init__(self, run: StageRun | None, argv: list[str], node: int = 0):
        self.run, self.argv, self.name = run, argv, f"launch{node or ''}"
        self.lock, self.log_file, self.where = None, None, ""
        self.view, self.errors, self.reader_gone = View(), [], False
        self.poller = select.poll()
        self.poller.register(1, select.POLLOUT)

    def __enter__(self) -> "Report":
        if self.run:
            self.lock = take_lock(self.run.path / f".{self.name}.lock")
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
        if self.lock:
            fcntl.flock(self.lock, fcntl.LOCK_UN)  # also for the guard, which shares the lock
            self.lock.close()

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

    def show(self) -> None:
        """Show what is due, as long as the reader takes it: a job never waits for its reader."""
        while self._room() and (line := self.view.due()):
            self.reader_gone = not _write(1, line)

    def error(self, text: str) -> None:
        """Show an error of the job on standard error at once; what several ranks say alike is shown once."""
        if text not in self.errors and len(self.errors) < MOST_ERRORS:
            self.errors.append(text)
            _write(2, text)

    def ending(self) -> None:
        """Note in the lock that this launcher is ending its job, so that the next one waits for it."""
        if self.lock:
            with suppress(OSError):  # on a full disk the next one does not wait, and this job still has to end
                os.write(self.lock.fileno(), b"ending\n")

    def finish(self, code: int, reason: str) -> int:
        """Show the last lines and, where the job did not succeed, why; settle status.json. Returns `code`."""
        for line in self.view.rest(self.where):
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


def _write(descriptor: int, *lines: str) -> bool:
    """Write to an own output; False when nobody takes it any more."""
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")
    try:
        while data:
            data = data[os.write(descriptor, data):]
    except OSError:
        return False
    return True
