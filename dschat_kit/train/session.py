"""What every launched stage shares: ranks, logs, sums over ranks, metrics, checkpoints, and a clean end."""

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from dschat_kit.config import ConfigError
from dschat_kit.data.pipeline import build_stage_data, tokenizer_of
from dschat_kit.data.tokenizer import pad_id_of
from dschat_kit.engine.checkpoints import load_checkpoint, save_checkpoint
from dschat_kit.engine.zero import full_state_dict
from dschat_kit.machine import detect
from dschat_kit.metrics import JsonlWriter, truncate_after
from dschat_kit.models.loading import save_folder
from dschat_kit.runs import RunError, StageRun, open_run, prepare_stage, write_json

__all__ = ["Session", "main"]


class Interrupted(BaseException):
    """SIGTERM or SIGINT; a BaseException so that nothing on the way swallows it."""


class Session:
    """One rank of one stage, from `config.json` to `result.json`."""

    def __init__(self, run: StageRun, resume: bool, console):
        self.run, self.resume, self.console, self.started = run, resume, console, time.time()
        self.pipeline, self.root = run.pipeline, run.root
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self.first_step, self.resumed_from = 0, list(run.status.get("resumed_from", [])) if resume else []
        self._metrics = self._samples = None
        self.pipeline.check_ranks(run.stage, self.world_size)

    def begin(self, total: int, engines: dict, **state) -> dict:
        """Load the newest checkpoint when resuming (returns its state, otherwise `state`) and open the metrics files."""
        loaded = load_checkpoint(self.run.checkpoints, engines) if self.resume else None
        self.first_step, self.total, self.engines = (loaded or {"step": 0})["step"], total, engines
        self.resumed_from = self.resumed_from + [self.first_step] if self.resume else []
        if self.is_main:
            for path in (self.run.metrics_path, self.run.samples_path):
                truncate_after(path, self.first_step)
            self._metrics, self._samples = JsonlWriter(self.run.metrics_path), JsonlWriter(self.run.samples_path)
            self.run.update_status(state="running", step=self.first_step, total=total, resumed_from=self.resumed_from)
            if self.resume:
                self.say(f"goes on after step {self.first_step}")
        return loaded or {"step": 0, **state}

    def prepare_data(self) -> tuple:
        """(data folder, tokenizer, id for padding); the main rank builds the data stage first where it is missing."""
        data = open_run(self.root, "data")
        if self.is_main and data.state != "finished":
            prepare_stage(self.root, "data", self.pipeline, preset=self.run.config["preset"], resume="auto")
            build_stage_data(data, report=self.say)
        dist.barrier()
        tokenizer = tokenizer_of(data)
        return data.path, tokenizer, pad_id_of(tokenizer)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in one exchange."""
        return self.sum_tensor(torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])).tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all ranks."""
        total = tensor.to(self.device)
        dist.all_reduce(total)
        return total

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.tolist()

    def backward(self, engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
        """Add a rank's part of a global mean: DeepSpeed averages over ranks, so the part is multiplied by their number.
        The optimiser steps at the last micro batch of a step."""
        engine.backward(loss * self.world_size, scale_wrt_gas=False)
        engine.step()

    def log(self, step: int, row: dict, show: tuple[str, ...] = ()) -> None:
        """One line of metrics.jsonl after `step` steps. Raises RunError on every rank when a loss is not finite."""
        bad = [name for name, value in row.items() if name.endswith("loss") and value != value]
        if bad:
            raise RunError(f"{', '.join(bad)} is not finite at step {step}\n  change: a lower learning rate; the last "
                           f"checkpoint is kept in {self.run.checkpoints}")
        if self.is_main:
            self._metrics.write({"step": step, **row})
            self.run.update_status(state="running", step=step, total=self.total)
            if show:
                self.say(f"step {step}/{self.total}  " + "  ".join(f"{n} {row[n]:.4g}" for n in show if row.get(n) is not None))

    def samples(self, rows: list[dict]) -> None:
        """Lines of samples.jsonl (main rank's rows only)."""
        if self.is_main:
            for row in rows:
                self._samples.write(row)

    def checkpoint(self, step: int, **state) -> None:
        """Save after `step` steps where checkpoint.every_steps says so."""
        every = self.pipeline.checkpoint.every_steps
        if every and step % every == 0 and step < self.total:
            save_checkpoint(self.run.checkpoints, step, self.engines, state, self.pipeline.checkpoint.keep)

    def export(self, module, tokenizer) -> None:
        """The stage's Hugging Face folder `model/`; every rank has to call it."""
        state = full_state_dict(module, self.is_main)
        if self.is_main:
            save_folder(module, tokenizer, self.run.model_dir, state)
        dist.barrier()

    def finish(self, result: dict) -> None:
        """Write result.json and the final status."""
        if self.is_main:
            common = {"config_hash": self.run.config["config_hash"], "seed": self.pipeline.seed, "world_size": self.world_size,
                      "resumed_from": self.resumed_from, "versions": _versions()}
            write_json(self.run.path / "result.json", {**result, **common})
            self.run.update_status(state="finished", step=self.total, total=self.total, error=None)
        dist.barrier()

    def say(self, text: str) -> None:
        """A line for the reader of the cell (main rank) and for the log."""
        if self.is_main:
            print(f"{self.run.stage:<6} {text}", file=self.console, flush=True)
        print(text, flush=True)


def main(stage: Callable[[Session], dict], argv: list[str] | None = None) -> None:
    """Run a stage function as one rank of a `deepspeed` job and leave with the right exit code: 0, 1, or 2 for
    what the user can mend. A plain `python -m` is a job of one rank."""
    parser = argparse.ArgumentParser(description=sys.modules[stage.__module__].__doc__)
    parser.add_argument("--run", required=True, type=Path, help="absolute path of the stage's folder in a run folder")
    parser.add_argument("--resume", choices=("auto",), nargs="?", const="auto", help="go on from the newest checkpoint")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    code = _run_stage(stage, args)
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(0)


def _run_stage(stage: Callable[[Session], dict], args) -> int:
    rank = int(os.environ.get("RANK", 0))
    try:
        run = StageRun(args.run)
        run.config
        with _rank_log(run, rank) as (console, errors):
            try:
                with run.lock() if rank == 0 else _nothing():
                    _start(run, rank)
                    session = Session(run, args.resume == "auto", console)
                    session.finish(stage(session))
                    dist.destroy_process_group()
                    return 0
            except BaseException as error:
                return _failed(run, rank, error, errors)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _start(run: StageRun, rank: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    if rank == 0:
        run.update_status(state="running", started=time.time(), error=None, pid=os.getpid(), host=socket.gethostname())
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    machine = detect()
    if machine.accelerator == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, machine.cores // int(os.environ["WORLD_SIZE"]))
        torch.set_num_threads(int(threads))
    # Plain gloo is no slower than the shared-memory all-reduce that DeepSpeed would compile at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if machine.accelerator == "cuda" else "gloo", verbose=False)
    torch.manual_seed(run.pipeline.seed)


def _interrupt(number, _frame):
    raise Interrupted(signal.Signals(number).name)


def _failed(run: StageRun, rank: int, error: BaseException, errors) -> int:
    """Record how a rank ended. The first rank to fail is the one that is shown; others follow because of it."""
    traceback.print_exc()
    state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
    known = isinstance(error, (ConfigError, RunError, Interrupted))
    text = str(error) if known else f"{type(error).__name__}: {error}"
    time.sleep(0.3 * min(rank, 3))
    if run.status.get("state") == "running" and (state == "failed" or rank == 0):
        print(f"error: {text}" + ("" if known else f"\n  the whole story: {run.logs / f'rank{rank}.log'}"), file=errors, flush=True)
        try:
            run.update_status(state=state, error=text)
        except RunError as second:
            print(f"error: {second}", file=errors, flush=True)
    return 130 if state == "interrupted" else 2 if known else 1


@contextmanager
def _rank_log(run: StageRun, rank: int):
    """Everything that libraries print goes to logs/rank{R}.log; yields the original (stdout, stderr) for the reader."""
    run.logs.mkdir(parents=True, exist_ok=True)
    console, errors = (os.fdopen(os.dup(fd), "w", encoding="utf-8", buffering=1) for fd in (1, 2))
    sys.stdout.flush(), sys.stderr.flush()
    log = os.open(run.logs / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    yield console, errors
    sys.stdout.flush(), sys.stderr.flush()


@contextmanager
def _nothing():
    yield


def _versions() -> dict:
    return {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "datasets")}
