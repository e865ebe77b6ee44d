"""Checkpoints as files: what is whole, what is damaged, what a crash leaves. One gloo rank, engines of two files."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from dschat_kit.engine.checkpoints import load_checkpoint, save_checkpoint
from dschat_kit.runs import RunError, read_json, write_json


class Engine:
    """What checkpoints ask of a DeepSpeed engine."""

    def __init__(self, number: int = 0, fault: BaseException | None = None):
        self.number, self.fault = number, fault

    def save_checkpoint(self, folder, tag, exclude_frozen_parameters):
        Path(folder, tag).mkdir(parents=True)
        for shard in range(2):
            Path(folder, tag, f"shard{shard}.pt").write_bytes(bytes([self.number, shard]) * 5000)
            if self.fault:
                raise self.fault

    def load_checkpoint(self, folder, tag):
        self.number = Path(folder, tag, "shard1.pt").read_bytes()[0]
        return folder, {}

    def zero_optimization_stage(self):
        return 2

    class _config:
        load_universal_checkpoint = False


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three checkpoints of which two are kept: steps 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def save(folder: Path, step: int, **how) -> None:
    save_checkpoint(folder, {"actor": Engine(step, **how), "critic": Engine(step + 1)}, 2, step=step, elapsed=1.5,
                    state={"tokens": step})


def load(folder: Path) -> tuple:
    engines, said = {"actor": Engine(), "critic": Engine()}, []
    state = load_checkpoint(folder, engines, said.append)
    return state and (state["step"], state["state"]["tokens"], engines["actor"].number, engines["critic"].number), said


def test_the_newest_is_loaded_and_the_oldest_are_gone(folder):
    assert load(folder) == ((30, 30, 30, 31), [])
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000020", "step-000030"]
    assert read_json(folder / "latest") == "step-000030"
    assert load(folder / "nowhere") == (None, [])


def test_the_millionth_step_is_the_newest(folder):
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(folder, {"actor": Engine(step % 7)}, 2, step=step, elapsed=1.5, state={})
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-1000000", "step-1000001"]
    assert load_checkpoint(folder, {"actor": Engine()}, print)["step"] == 1_000_001


def truncate(file: Path) -> None:
    os.truncate(file, 9999)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("spoil, file, word", [
    (truncate, "critic/state/shard1.pt", "size [9999"), (flip, "actor/state/shard0.pt", "checksum"),
    (Path.unlink, "actor/state/shard1.pt", "cannot be read"), (truncate, "state.json", "not readable JSON"),
    (Path.unlink, "state.json", "does not exist")])
def test_a_damaged_one_is_said_and_the_one_before_is_taken(folder, spoil, file, word):
    if spoil is truncate and file == "state.json":
        (folder / "step-000030" / file).write_text('{"step": 30, "wor')
    else:
        spoil(folder / "step-000030" / file)
    found, said = load(folder)
    assert found == (20, 20, 20, 21)
    assert len(said) == 1 and "step-000030 is damaged" in said[0] and word in said[0] and Path(file).name in said[0]
    assert (folder / "damaged-step-000030").exists() and not (folder / "step-000030").exists()
    save(folder, 25)  # what is set aside is not counted as one of those that are kept
    assert load(folder) == ((25, 25, 25, 26), []) and (folder / "step-000020").exists()


def test_where_none_is_whole_the_run_does_not_silently_begin_again(folder):
    for step in (20, 30):
        flip(folder / f"step-0000{step}" / "actor" / "state" / "shard0.pt")
    with pytest.raises(RunError, match="no checkpoint in .* is whole\n  change: --fresh"):
        load(folder)


def test_a_checkpoint_that_never_got_its_manifest_is_damaged(folder):
    state = read_json(folder / "step-000030" / "state.json")
    write_json(folder / "step-000030" / "state.json", {key: state[key] for key in state if key != "files"})
    found, said = load(folder)
    assert found[0] == 20 and "files" in said[0]


@pytest.mark.parametrize("fault", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_previous_one_and_room_to_say_so(folder, fault):
    with pytest.raises(RunError, match="the disk may be full"):
        save(folder, 40, fault=fault)
    assert not list(folder.glob(".step*")) and load(folder)[0] == (30, 30, 30, 31)


def test_a_crash_while_saving_leaves_the_previous_one(folder):
    class Killed(BaseException):
        pass

    with pytest.raises(Killed):
        save(folder, 40, fault=Killed())
    assert (folder / ".step-000040.tmp").exists() and load(folder)[0] == (30, 30, 30, 31)
    save(folder, 40)
    assert not list(folder.glob(".step*")) and load(folder)[0] == (40, 40, 40, 41)


def test_a_crash_between_the_rename_and_latest_loses_nothing(folder):
    shutil.copytree(folder / "step-000030", folder / "step-000040")
    assert read_json(folder / "latest") == "step-000030" and load(folder)[0] == (30, 30, 30, 31)
