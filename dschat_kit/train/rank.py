"""One rank of a `deepspeed` job: its start, its log, and an honest end whatever happens."""

import argparse
import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from dschat_kit.config import ConfigError
from dschat_kit.machine import detect, keep_freed_memory
from dschat_kit.metrics import read_metrics
from dschat_kit.runs import RunError, StageRun, cannot
from dschat_kit.train.session import Session
from dschat_kit.train.watch import Hanging, Interrupted, Stopped, Watch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LOST = ("closed by peer", "reset by peer", "onnection closed", "Broken pipe", "remote process exited")


def main(stage: Callable[[Session], dict], argv: list[str] | None = None) -> None:
    """Run a stage function as one rank of a `deepspeed` job and leave with the right exit code: 0, 1, or 2 for
    what the user can mend. A plain `python -m` is a job of one rank."""
    parser = argparse.ArgumentParser(description=sys.modules[stage.__module__].__doc__)
    parser.add_argument("--run", required=True, type=Path, help="absolute path of the stage's folder in a run folder")
    parser.add_argument("--resume", choices=("auto",), nargs="?", const="auto", help="go on from the newest checkpoint")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    code = _run_stage(stage, args)
    with suppress(OSError):  # a full disk: what went wrong was said before
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)


def _run_stage(stage: Callable[[Session], dict], args) -> int:
    rank, errors = int(os.environ.get("RANK", 0)), sys.stderr
    try:
        run = StageRun(args.run)
        run.pipeline  # noqa: B018  a config.json that is missing or damaged is named before anything is started
        console, errors = _rank_log(run, rank)
        with run.lock() if rank == 0 else nullcontext():
            if rank == 0:
                _claim(run, args.resume == "auto")
            try:
                watch = Watch(lambda error: _failed(run, rank, error, errors))
                watch.take_signals()
                start_distributed(run.pipeline.seed, max(30, 2 * run.pipeline.telemetry.hang_minutes))
                session = Session(run, args.resume == "auto", console, watch)
                session.finish(stage(session))
                watch.stop()
                dist.destroy_process_group()
                return 0
            except BaseException as error:  # noqa: BLE001  whatever it is, the run folder has to say it
                return _failed(run, rank, error, errors)
    except (ConfigError, RunError) as error:  # before the folder is ours: its status is not ours to write
        print(f"error: {error}", file=errors, flush=True)
        return 2


def _claim(run: StageRun, resume: bool) -> None:
    """Take over the locked folder. Raises RunError where that would write over what an earlier job left."""
    state = run.status.get("state", "missing")
    if state == "finished" or not (run.untouched or resume):
        go_on = "" if state == "finished" else "--resume to go on, or "
        raise RunError(f"{run.path} is {'interrupted' if state == 'running' else state}\n"
                       f"  change: {go_on}dschat {run.stage} --fresh to begin again")
    run.update_status(state="running", started=time.time(), error=None, pid=os.getpid(), host=socket.gethostname())


def start_distributed(seed: int, patience: float = 30.0) -> torch.device:
    """Threads and process group of a rank; without a launcher, a job of one. Returns the rank's device. A collective
    gives up after `patience` minutes: later than the watchdog, which says more."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    machine = detect()
    if machine.accelerator == "cpu":
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, machine.cores // int(here))
        torch.set_num_threads(int(threads))
        keep_freed_memory()
    # Plain gloo is no slower than the shared-memory all-reduce that DeepSpeed would compile at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if machine.accelerator == "cuda" else "gloo", verbose=False,
                               timeout=timedelta(minutes=patience))
    torch.manual_seed(seed)
    return torch.device(deepspeed.get_accelerator().current_device_name())


def _failed(run: StageRun, rank: int, error: BaseException, errors) -> int:
    """Record how a rank ended; the exit code. The first rank to fail is the one that is shown: it has written the
    status before its end makes the others fail."""
    if not isinstance(error, Hanging):  # which a thread says, after it has written the stacks
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # the log may be what is full
            traceback.print_exc()
            sys.stderr.flush()
    text, code = _explain(error, run)
    stopped = isinstance(error, Stopped)
    followed = isinstance(error, Interrupted) and not stopped or _lost_peer(error)
    if followed and "DSCHAT_LAUNCH_TAG" in os.environ:
        # `dschat launch` knows why: an asked end, or the signal that killed a rank; leave it the time to see it first.
        time.sleep(0 if isinstance(error, Interrupted) else 3)
        return code
    time.sleep(0.3 * min(rank, 3))
    ours = rank == 0 or dist.is_initialized()  # rank 0 holds the folder once all ranks have met
    first = ours and run.status.get("state") == "running" and (rank == 0 or not isinstance(error, Interrupted))
    if first or isinstance(error, Hanging):  # which may be seen on machines that no longer reach one another
        more = f"\n  the whole story: {run.logs / f'rank{rank}.log'}" if code == 1 else ""
        print(text if stopped else f"error: {text}{more}", file=errors, flush=True)
        try:
            steps = [row["step"] for row in read_metrics(run.metrics_path)[-1:]] or [0]
            if first:
                run.update_status(state="interrupted" if code == 130 else "failed", error=text, step=steps[0])
        except RunError as second:
            print(f"error: {second}", file=errors, flush=True)
    return code


def _explain(error: BaseException, run: StageRun) -> tuple[str, int]:
    """(message, exit code): 130 asked to end, 2 the user can mend it, 1 the rest."""
    name, text = type(error).__name__, str(error)
    first_line = (text or name).splitlines()[0]
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return first_line, 130
    if isinstance(error, (ConfigError, RunError)):
        return text, 2
    if isinstance(error, OSError) and error.errno in FULL:
        return str(cannot(f"write in {run.path}", error)), 2
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        cure = f"a smaller {run.stage}.micro_batch_size, or zero.stage=3"
        return f"out of memory: {first_line}\n  change: {cure}", 2
    if isinstance(error, Hanging):
        return f"rank {os.environ.get('RANK', 0)}: {text}; the stack of every rank is in {run.logs}", 1
    if _lost_peer(error):
        return f"another rank has ended: {first_line}", 1
    return f"{name}: {text}", 1


def _lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def _rank_log(run: StageRun, rank: int) -> tuple:
    """Send everything that libraries print to logs/rank{R}.log; returns the own (stdout, stderr) for the reader."""
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        log = os.open(run.logs / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise cannot(f"write in {run.logs}", error) from error
    console, errors = (os.fdopen(os.dup(fd), "w", encoding="utf-8", buffering=1) for fd in (1, 2))
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    return console, errors
