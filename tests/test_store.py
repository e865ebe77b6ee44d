"""The cache of rows: one builder at a time, nothing half-written is believed, damage is noticed."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dschat_kit.data.store import TEXTS, TOKENS, cached, intact, open_rows, place, table_writer
from dschat_kit.runs import RunError

COLUMNS = [["a", "b"]] * len(TEXTS) + [[[1, 2], [3]]] * len(TOKENS)


def build(folder):
    stream, write = table_writer(folder / "rows" / "table.arrow", with_tokens=True)
    with stream:
        write(COLUMNS)
    np.save(folder / "rows" / "sft.npy", np.array([1, 0, 1]))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def test_rows_are_built_once_and_mapped_in_the_order_of_their_part(tmp_path):
    said: list[str] = []
    entry = cached(tmp_path / "cache", "key", build, said.append)
    assert cached(tmp_path / "cache", "key", lambda _: pytest.fail("built again"), said.append) == entry
    assert len(said) == 1 and "taken from" in said[0]
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        place(entry, tmp_path / run)
        assert open_rows(tmp_path / run, "sft")["prompt_ids"][:] == [[3], [1, 2], [3]] and intact(tmp_path / run)
    assert os.path.samefile(tmp_path / "one" / "rows" / "table.arrow", entry / "rows" / "table.arrow")
    place(entry, tmp_path / "one")  # over what is there


@pytest.mark.parametrize("file", ["rows/table.arrow", "rows/sft.npy", "tokenizer/tokenizer.json", "rows/manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_the_rows_are_built_anew(tmp_path, file, damage):
    entry = cached(tmp_path, "key", build, print)
    path = entry / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-1]),
     "remove": path.unlink}[damage]()
    assert not intact(entry)
    said: list[str] = []
    assert intact(cached(tmp_path, "key", build, said.append)) and "damaged" in said[0]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        build(folder)
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        cached(tmp_path, "key", fail, print)
    assert [path.name for path in tmp_path.iterdir()] == [".key.lock"]


def test_a_killed_builder_is_followed_by_the_next(tmp_path):
    code = ("import sys, time; from pathlib import Path; from dschat_kit.data.store import cached\n"
            "cached(Path(sys.argv[1]), 'key', lambda f: ((f / 'rows/x').touch(), print('in', flush=True), "
            "time.sleep(60)), print)")
    builder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "in\n"
    said: list[str] = []
    waiting = threading.Thread(target=lambda: cached(tmp_path, "key", build, said.append))
    waiting.start()
    while not said:
        time.sleep(0.01)
    assert "waiting" in said[0]  # for the lock, which the kernel lets go of
    builder.kill()
    builder.wait()
    builder.stdout.close()
    waiting.join(30)
    assert intact(tmp_path / "key") and not (tmp_path / "key" / "rows" / "x").exists()


def test_runs_at_the_same_time_build_once(tmp_path):
    built: list[int] = []

    def slowly(folder):
        built.append(1)
        time.sleep(0.2)
        build(folder)
    threads = [threading.Thread(target=cached, args=(tmp_path, "key", slowly, str)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert built == [1] and intact(tmp_path / "key")


def test_damaged_rows_of_a_run_are_named(tmp_path):
    entry = cached(tmp_path / "cache", "key", build, print)
    with pytest.raises(RunError, match="no whole rows of ppo(.|\n)*dschat data"):
        open_rows(entry, "ppo")
    (entry / "rows" / "table.arrow").write_bytes(b"")
    with pytest.raises(RunError, match="no whole rows of sft"):
        open_rows(entry, "sft")
