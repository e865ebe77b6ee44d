"""What a launched job leaves behind: launch.log, a readable part on the own output, an honest status.json."""
import errno
import fcntl
import os
import select
import shlex
import socket
import time
from collections import deque
from pathlib import Path

from dschat_kit.notebook.lines import View
from dschat_kit.runs import RunError, read_json, write_json

CHUNK = 4096  # PIPE_BUF: a pipe that poll calls writable takes as much without blocking
MOST_ERRORS = 20


class Report:
    """Context of one job in `folder` (None: no log, no lock, no status). Holds the folder's launch lock."""

    def __init__(self, folder: Path | None, argv: list[str]):
        self.folder, self.argv = folder, argv
        self.lock_fd: int | None = None
        self.log_file, self.log_path = None, folder and folder / "logs" / "launch.log"
        self.errors: list[str] = []
        self.in_error = self.reader_gone = False
        self.queue: deque[bytes] = deque()

    def __enter__(self) -> "Report":
        if self.folder:
            self.lock_fd = take_lock(self.folder)
            try:
                self.log_path.parent.mkdir(exist_ok=True)
                self.sizes = {path: path.stat().st_size for path in self.log_path.parent.glob("rank*.log")}
                self.log_file = open(self.log_path, "ab", buffering=0)
            except OSError as error:
                raise RunError(f"cannot write {self.log_path}: {error.strerror}\n  change: free space, permissions or "
                               "--run-root") from error
            self.log(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(self.argv)}\n".encode())
        self.poller = select.poll()
        self.poller.register(1, select.POLLOUT)
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
                self.log_file.close()
                self.log_file = None
                self.error(f"error: cannot write {self.log_path}: {error.strerror}")

    def show(self, lines: list[str]) -> None:
        """Queue lines for the own output and write what it takes now, never waiting for the reader."""
        for line in lines:
            self.queue.append(line.encode("utf-8", errors="replace") + b"\n")
        while not self.reader_gone:
            events = dict(self.poller.poll(0)).get(1, 0)
            self.reader_gone = bool(events & (select.POLLERR | select.POLLHUP))
            if not self.queue or not events & select.POLLOUT or self.reader_gone:
                return
            batch = [self.queue.popleft()]
            while self.queue and len(self.queue[0]) + sum(map(len, batch)) <= CHUNK:
                batch.append(self.queue.popleft())
            self.reader_gone = not _write(1, b"".join(batch))

    def error(self, text: str) -> None:
        """Show an error of the job on standard error at once; what several ranks say alike is shown once."""
        self.in_error = True
        if text not in self.errors and len(self.errors) < MOST_ERRORS:
            self.errors.append(text)
            _write(2, text.encode("utf-8", errors="replace") + b"\n")

    def ending(self) -> None:
        """Note in the lock that this launcher is ending its job, so that the next one waits for it."""
        if self.lock_fd is not None and os.fstat(self.lock_fd).st_size == 0:
            os.write(self.lock_fd, b"ending\n")

    def finish(self, code: int, reason: str, view: View) -> int:
        """Show the last lines and, where the job did not succeed, why; settle status.json. Returns `code`."""
        where = f"; all are in {self.log_path}" if self.log_path else ""
        self.show(view.finish(where, last=8 if code == 0 else 30))
        for _ in range(20):
            if self.queue and not self.reader_gone:  # a reader that is slow but there
                time.sleep(0.1)
                self.show([])
        if code == 0 and not reason:
            return 0
        if not reason and not self.errors:
            _write(2, "".join(f"{line}\n" for line in self._failing_tail()).encode())
        killed = code - 128 if 128 < code < 160 else 256 - code if code > 224 else 0  # DeepSpeed passes -9 on as 247
        what = reason or (f"killed by signal {killed}" if killed else f"ended with exit code {code}")
        what += ", perhaps for want of memory" if killed == 9 and not reason else ""
        log = f"; full log: {self.log_path}" if self.log_path else ""
        _write(2, f"dschat launch: {self.argv[0]}: {what}{log}\n".encode())
        cause = self.errors[0].removeprefix("error: ") if self.errors and not reason else what
        settle_status(self.folder, "interrupted" if reason else "failed", cause)
        self.log(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n".encode())
        return code

    def _failing_tail(self, count: int = 15) -> list[str]:
        """Last lines of the rank that failed: the first one with an "error: " line, else a traceback; [] if none."""
        found = []
        for path in sorted(self.log_path.parent.glob("rank*.log")) if self.log_path else []:
            begin = self.sizes.get(path, 0)
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(begin if begin <= size else 0, size - 20_000))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            if errors:
                return [f"{path.name}:", *errors[:3]]
            if any(line.startswith("Traceback") for line in lines):
                found.append((path.stat().st_mtime, [f"last lines of {path}:", *lines[-count:]]))
        return min(found)[1] if found else []


def take_lock(folder: Path) -> int:
    """Lock FOLDER/.launch.lock and return its descriptor. Raises RunError when another launcher has it.

    One that is ending its job (an interrupted cell that is run again) is waited for, up to 20 seconds.
    """
    try:
        descriptor = os.open(folder / ".launch.lock", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(f"cannot write in {folder}: {error.strerror}\n  change: permissions or --run-root") from error
    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            return descriptor
        except BlockingIOError:
            patience = 20 if os.fstat(descriptor).st_size else 0.5  # who only looks at it holds it for an instant
            if time.monotonic() - begun > patience:
                os.close(descriptor)
                raise RunError(f"{folder} is in use by another dschat launch\n  change: wait for it, interrupt it, or "
                               "choose another --run-root") from None
            time.sleep(0.05)


def settle_status(folder: Path | None, state: str, error: str) -> None:
    """Turn a `running` (or, in a prepared folder, missing) status.json into `state`, when its process is gone."""
    if folder is None or not (folder / "config.json").exists() and not (folder / "status.json").exists():
        return
    now = time.time()
    status = {"state": "running", "step": 0, "total": 0, "started": now, "pid": os.getpid(),
              "host": socket.gethostname()}
    if (folder / "status.json").exists():
        status = read_json(folder / "status.json")
    if status.get("state") == "running" and not _held(folder / ".lock"):  # held: somebody else's ranks are at work
        write_json(folder / "status.json", {**status, "state": state, "error": error, "updated": now})


def _held(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _write(descriptor: int, data: bytes) -> bool:
    """Write to an own output; False when nobody reads it any more."""
    try:
        while data:
            data = data[os.write(descriptor, data):]
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
            raise
        return False
    return True
