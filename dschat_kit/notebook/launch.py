"""The prefix command `dschat launch -- deepspeed --num_gpus 2 --module dschat_kit.train.ppo --run RUN`.

It makes a training started from a `%%bash` cell well behaved: every line of output goes to RUN/logs/launch.log and a
readable part of it to the cell; the exit code is passed on; when the job, the cell, the kernel or the shell ends, so
does every process of the job, and RUN/status.json says how. It leaves the command itself to the reader's eyes.
"""
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from dschat_kit.machine import detect
from dschat_kit.notebook.lines import Lines, View
from dschat_kit.notebook.processes import Ending, guard
from dschat_kit.notebook.report import Report, settle_status
from dschat_kit.runs import RunError

TAG = "DSCHAT_LAUNCH_TAG"
SHARED_PORT = ("--master_port", "--hostfile", "-H", "--num_nodes", "--node_rank")  # several nodes need one known port
ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def launch(argv: list[str]) -> int:
    """Run the command `argv` (a leading "--" is dropped) as a job and return its exit code.

    128 + the signal where one ended it, 2 where it cannot be started: nothing to run, folder in use or missing.
    """
    if not sys.platform.startswith("linux"):
        print(f"error: dschat launch needs Linux, got {sys.platform}\n  change: open the checkout in its devcontainer, "
              "or run the command after `--` without it", file=sys.stderr)
        return 2
    argv = argv[1:] if argv[:1] == ["--"] else list(argv)
    if not argv:
        print("error: dschat launch: got no command\n  expected: dschat launch -- deepspeed --module ... --run RUN",
              file=sys.stderr)
        return 2
    sys.stdout.flush()
    try:
        return Job(argv, run_folder(argv)).run()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_folder(argv: list[str]) -> Path | None:
    """The folder after `--run` in the command, None without one. Raises RunError when it does not exist."""
    value = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--run"), None)
    value = next((word[len("--run="):] for word in argv if word.startswith("--run=")), value)
    if value is None:
        return None
    folder = Path(value).absolute()
    if not folder.is_dir():
        raise RunError(f"--run: got {value!r}, which is no folder\n  expected: a prepared stage folder such as "
                       "runs/tiny/ppo\n  change: run the notebook's earlier cells, or `dschat run`")
    return folder


def child_command(argv: list[str], port: int) -> list[str]:
    """The command with a port of its own where DeepSpeed would take the default that collides."""
    named = any(word.split("=")[0] in SHARED_PORT for word in argv)
    if Path(argv[0]).name != "deepspeed" or named:
        return argv
    return [argv[0], "--master_port", str(port), *argv[1:]]


def child_environment(argv: list[str], port: int) -> dict[str, str]:
    """os.environ with what a job needs; what the user has set stays, except that our programs come first on PATH."""
    machine = detect()
    ranks = next((int(value) for word, value in zip(argv, argv[1:], strict=False)
                  if word in ("--num_gpus", "--num_accelerators") and value.isdigit()), 1)
    defaults = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
                "OMP_WAIT_POLICY": "passive", "MASTER_PORT": str(port)}
    if machine.accelerator == "cpu":
        defaults |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, machine.cores // max(1, ranks)))}
    own = str(Path(sys.executable).parent)  # not resolved: a venv's python is a link out of the venv
    return {**defaults, **os.environ, "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def free_port() -> int:
    """MASTER_PORT where it is set, else a port nobody listens on, below the range the kernel gives to connections."""
    if os.environ.get("MASTER_PORT", "").isdigit():
        return int(os.environ["MASTER_PORT"])
    for port in random.Random().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RunError("no free port between 20000 and 32000\n  change: end other jobs, or set MASTER_PORT")


class Job:
    """One running command: its output, the reasons to end it, and its end."""

    def __init__(self, argv: list[str], folder: Path | None):
        self.argv, self.folder = argv, folder
        self.tag = f"{TAG}={uuid.uuid4().hex}"
        self.parent = os.getppid()
        self.reason, self.asked_at, self.code = "", 0.0, 0  # why it is being ended, by whom, with which exit code
        self.quiet, self.ending = False, None
        self.lines, self.view = Lines(), View()

    def run(self) -> int:
        """Start, forward, end, report; returns the exit code."""
        port = free_port()
        environment = child_environment(self.argv, port) | dict([self.tag.split("=")])
        self.report = Report(self.folder, self.argv)
        with self.report:
            watched = guard(self.tag, self.report.lock_fd,
                            lambda: settle_status(self.folder, "interrupted", "its launcher was killed"))
            before = {number: signal.signal(number, self._asked) for number in ENDS
                      if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP}
            try:
                return self._run(child_command(self.argv, port), environment)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                os.close(watched)

    def _run(self, command: list[str], environment: dict[str, str]) -> int:
        try:
            self.child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            self.report.error(f"error: cannot start {command[0]!r}: {error.strerror}\n  expected: a program in "
                              f"{Path(sys.executable).parent} or on PATH")
            return self.report.finish(127, "", self.view)
        self._forward()
        code = self.child.wait()
        code = 128 - code if code < 0 else code
        return self.report.finish(self.code or code, self.reason, self.view)

    def _asked(self, signum: int, _frame) -> None:
        hurried = signum == signal.SIGINT and self.ending and time.monotonic() - self.asked_at > 1
        self._end(ENDS[signum], 128 + signum)
        if hurried:  # a second Ctrl-C: do not wait for what the first one asked
            self.ending.hurry()
            self.asked_at = time.monotonic()

    def _end(self, reason: str, code: int) -> None:
        if not self.reason:
            self.reason, self.code, self.asked_at = reason, code, time.monotonic()
            grace = float(os.environ.get("DSCHAT_GRACE", "10"))  # seconds a training gets to write its checkpoint
            self.ending = Ending(self.tag, waits=(0.6 * grace, 0.4 * grace))

    def _forward(self) -> None:
        """Forward output until the job has ended and none of its processes is left."""
        source, poller = self.child.stdout.fileno(), select.poll()
        os.set_blocking(source, False)
        poller.register(source, select.POLLIN)
        gone_at = None
        while True:
            ready = dict(poller.poll(200))
            if source in ready and not self._read(source):
                poller.unregister(source)
            self.report.show(self.view.due())
            if self.report.reader_gone:
                self._end("the notebook's kernel or terminal is gone", 129)
            elif os.getppid() != self.parent and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
                self._end("the shell that started it is gone", 129)
            if self.child.poll() is not None and gone_at is None:
                gone_at = time.monotonic()
                self.ending = self.ending or Ending(self.tag, waits=(2.0, 2.0), first=0.5)
            if self.ending:
                self.report.ending()
                if self.ending.step() and gone_at is not None and not self._read(source):
                    break
        if rest := self.lines.rest():
            self._line(rest)

    def _read(self, source: int) -> bool:
        """Take what the job has written; False when nothing is there any more."""
        try:
            data = os.read(source, 1 << 16)
        except BlockingIOError:
            return False
        for line in self.lines.feed(data):
            self._line(line)
        return bool(data)

    def _line(self, raw: bytes) -> None:
        self.report.log(raw)
        text = raw.decode("utf-8", errors="replace").rstrip()
        if text.startswith("error: ") or (self.report.in_error and text.startswith("  ")):
            self.report.error(text)
            return
        self.report.in_error = False
        self.quiet = self.quiet or bool(self.reason and "Traceback" in text)  # everybody's KeyboardInterrupt
        if not self.quiet:
            self.view.add(raw)
            self.report.show(self.view.due())


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
