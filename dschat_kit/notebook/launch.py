"""The prefix command `dschat launch -- deepspeed --num_gpus 2 --module dschat_kit.train.ppo --run RUN`.

It makes a training started from a `%%bash` cell well behaved: every line of output goes to RUN/logs/launch.log and a
readable part of it to the cell; the exit code is passed on; when the job, the cell, the kernel or the shell ends, so
does every process of the job, and RUN/status.json says how. It leaves the command itself to the reader's eyes.
"""
import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from dschat_kit.machine import detect, own_path
from dschat_kit.notebook.processes import Ending, guard, handling, remove_stale_compile_locks
from dschat_kit.notebook.report import Report
from dschat_kit.runs import RunError, StageRun

TAG = "DSCHAT_LAUNCH_TAG"
SHARED_PORT = ("--master_port", "--hostfile", "-H", "--num_nodes", "--node_rank")  # several nodes need one known port
ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
PREEMPTED = 25.0  # seconds to save a checkpoint after SIGTERM; Slurm and Kubernetes kill after 30


def launch(argv: list[str]) -> int:
    """Run the command `argv` (a leading "--" is dropped) as a job and return its exit code.

    128 + the signal where one ended it, 2 where it cannot be started: nothing to run, folder in use or missing.
    """
    argv = argv[1:] if argv[:1] == ["--"] else list(argv)
    sys.stdout.flush()
    try:
        if not sys.platform.startswith("linux"):
            raise RunError(f"dschat launch needs Linux, got {sys.platform}\n  change: open the checkout in its "
                           "devcontainer, or run the command after `--` without it")
        if not argv:
            raise RunError("dschat launch: got no command\n  expected: dschat launch -- deepspeed ... --run RUN")
        return Job(argv, stage_run(argv)).run()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def option(argv: list[str], *names: str) -> str | None:
    """The value of one of `names` in a command, written `--name value` or `--name=value`; None without it."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, given, value = word.partition("=")
        if name in names:
            return value if given else following
    return None


def stage_run(argv: list[str]) -> StageRun | None:
    """The folder after `--run` in the command, None without one. Raises RunError when it does not exist."""
    value = option(argv, "--run")
    if value is not None and not Path(value).is_dir():
        raise RunError(f"--run: got {value!r}, which is no folder\n  expected: a prepared stage folder such as "
                       "runs/tiny/ppo\n  change: run the notebook's earlier cells, or `dschat run`")
    return None if value is None else StageRun(Path(value))


def child_command(argv: list[str], port: int) -> list[str]:
    """The command with a port of its own where DeepSpeed would take the default that collides."""
    if Path(argv[0]).name != "deepspeed" or option(argv, *SHARED_PORT) is not None:
        return argv
    return [argv[0], "--master_port", str(port), *argv[1:]]


def child_environment(argv: list[str], port: int) -> dict[str, str]:
    """os.environ with what a job needs; what the user has set stays, except that our programs come first on PATH."""
    machine = detect()
    ranks = option(argv, "--num_gpus", "--num_accelerators") or ""
    defaults = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
                "MASTER_PORT": str(port)}
    if machine.accelerator == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        if ranks.isdigit():  # else another launcher knows how many there are here, and a rank takes its share
            defaults["OMP_NUM_THREADS"] = str(max(1, machine.cores // max(1, int(ranks))))
    return {**defaults, **os.environ, "PATH": own_path()}


def free_port() -> int:
    """MASTER_PORT where it is set, else a port nobody listens on, below the range the kernel gives to connections."""
    if os.environ.get("MASTER_PORT", "").isdigit():
        return int(os.environ["MASTER_PORT"])
    for port in random.Random().sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RunError("no free port between 20000 and 32000\n  change: end other jobs, or set MASTER_PORT")


class Job:
    """One running command: its output, the reasons to end it, and its end."""

    def __init__(self, argv: list[str], run: StageRun | None):
        self.argv, self.stage = argv, run
        self.mark = {TAG: uuid.uuid4().hex}
        node = option(argv, "--node_rank", "--node-rank") or ""
        self.node = int(node) if node.isdigit() else 0
        self.parent = os.getppid()
        self.reason, self.code = "", 0  # why it is being ended, and the exit code of that
        self.in_error, self.quiet, self.ending = False, False, None
        self.part = b""  # of a line that has no newline yet

    def run(self) -> int:
        """Start, forward, end, report; returns the exit code."""
        port = free_port()
        environment = child_environment(self.argv, port) | self.mark

        def launcher_killed():
            self.report.settle("interrupted", "its launcher was killed")

        with (Report(self.stage, self.argv, self.node) as self.report, guard(self.mark, launcher_killed),
              handling(self._asked, *ENDS)):
            self._unlock_compiler()
            begun = time.time()
            command, pipe = child_command(self.argv, port), subprocess.PIPE
            try:
                self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT,
                                              env=environment, start_new_session=True)
            except OSError as error:
                self.report.error(f"error: cannot start {command[0]!r}: {error.strerror}\n  expected: a program in "
                                  f"{Path(sys.executable).parent} or on PATH")
                return self.report.finish(127, "")
            self._forward()
            code = self.child.wait()
            if code:
                self._unlock_compiler(begun)
            return self.report.finish(self.code or (128 - code if code < 0 else code), self.reason)

    def _unlock_compiler(self, since: float = math.inf) -> None:
        for lock in remove_stale_compile_locks(since):
            self.report.note(f"removed {lock}, which a killed compilation had left")

    def _asked(self, signum: int, _frame) -> None:
        patient = signum == signal.SIGTERM and "DSCHAT_GRACE" not in os.environ
        self._end(ENDS[signum], 128 + signum, seconds=PREEMPTED if patient else None, ranks_first=True)

    def _end(self, reason: str, code: int, **how) -> None:
        """Begin to end the job; `reason` is "" for what it left behind when it ended by itself."""
        if not self.reason:
            self.reason, self.code, self.ending = reason, code, Ending(self.mark, **how)
            self.report.ending()

    def _forward(self) -> None:
        """Forward output until the job has ended and none of its processes is left."""
        source, poller = self.child.stdout.fileno(), select.poll()
        os.set_blocking(source, False)
        poller.register(source, select.POLLIN)
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        while True:
            if poller.poll(200) and not self._read(source):
                poller.unregister(source)
            self.report.show()
            if self.report.reader_gone or os.getppid() != self.parent and not nohup:
                self._end("the kernel, terminal or shell that started it is gone", 129)
            ended = self.child.poll() is not None
            if ended and not self.ending:
                self._end("", 0, first=0.5, seconds=4.0)
            if self.ending and self.ending.step() and ended and not self._read(source):
                break
        if self.part:
            self._line(self.part + b"\n")

    def _read(self, source: int) -> bool:
        """Take what the job has written; False when nothing is there any more."""
        try:
            data = os.read(source, 1 << 16)
        except BlockingIOError:
            return False
        *whole, self.part = (self.part + data).split(b"\n")
        if len(self.part) > 1 << 20:  # so that memory stays bounded
            whole, self.part = [*whole, self.part], b""
        for line in whole:
            self._line(line + b"\n")
        return bool(data)

    def _line(self, raw: bytes) -> None:
        self.report.log(raw)
        text = raw.decode("utf-8", errors="replace").rstrip()
        self.in_error = text.startswith("error: ") or self.in_error and text.startswith("  ")
        self.quiet = self.quiet or bool(self.reason and "Traceback" in text)  # everybody's KeyboardInterrupt
        if self.in_error:
            self.report.error(text)
        elif not self.quiet:
            self.report.view.add(raw)
            self.report.show()


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
