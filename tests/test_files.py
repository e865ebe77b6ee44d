"""Every kind of file and folder gives the same rows; a damaged one gives an error, never fewer rows."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest

from dschat_kit.config import ConfigError, Data
from dschat_kit.data import files
from dschat_kit.data.files import raw_rows
from dschat_kit.data.sources import DataError, labels_of, read_source
from dschat_kit.runs import source_files

ROWS = [{"prompt": f"why {i}?", "chosen": f"because, \"{i}\"\nand é.", "rejected": "NA"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(name, **settings):
    records = list(read_source(str(name), labels_of([str(name)])[0], Data(**settings), 0))
    return [{"prompt": r.turns[0][1], "chosen": r.chosen, "rejected": r.rejected} for r in records]


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def by_prompt(rows):
    return sorted(rows, key=lambda row: row["prompt"])


KINDS = {
    "rows.jsonl": lambda path: write(path, LINES),
    "rows.jsonl.gz": lambda path: write(path, gzip.compress(LINES)),
    "rows.jsonl.bz2": lambda path: write(path, bz2.compress(LINES)),
    "rows.jsonl.xz": lambda path: write(path, lzma.compress(LINES)),
    "rows.json": lambda path: write(path, json.dumps(ROWS, indent=1).encode()),
    "rows.json.gz": lambda path: write(path, gzip.compress(json.dumps(ROWS).encode())),
    "lines.json": lambda path: write(path, LINES),
    "rows.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(str(path), index=False),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(str(path)),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, capfd):
    KINDS[name](tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_an_arrow_file_a_folder_and_a_glob(tmp_path):
    KINDS["saved"](tmp_path / "saved")
    arrow, = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "arrow").mkdir()
    arrow = arrow.rename(tmp_path / "arrow" / "rows.arrow")
    assert read(arrow) == ROWS == read(tmp_path / "arrow")
    (tmp_path / "many").mkdir()
    for i, row in enumerate(ROWS):
        write(tmp_path / "many" / f"part{i}.jsonl", json.dumps(row).encode())
    write(tmp_path / "many" / "README.txt", b"not data")
    assert by_prompt(read(tmp_path / "many")) == ROWS == by_prompt(read(f"{tmp_path}/man*/p*.jsonl"))


def test_save_to_disk_with_splits_holds_out_the_others(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole.select([0, 1, 2]), "test": whole.select([3, 4])}).save_to_disk(
        str(tmp_path / "saved"))
    assert [part for _, part, _ in raw_rows(str(tmp_path / "saved"))] == ["eval", "eval", "", "", ""]


def test_plain_text_is_cut_at_empty_lines(tmp_path):
    name = str(write(tmp_path / "book.txt", "one\nline\n\ntwo é\n".encode()))
    records = list(read_source(name, "book", Data(), 0))
    assert [(r.turns, r.chosen.strip()) for r in records] == [((), "one\nline"), ((), "two é")]


def test_line_endings_may_be_mixed_and_a_byte_order_mark_is_no_text(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    ended = zip(lines, (b"\r\n", b"\r", b"\n\r\n", b"\n", b""), strict=True)
    assert read(write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + b"".join(map(b"".join, ended)))) == ROWS


DAMAGED = {
    "truncated gzip": ("rows.jsonl.gz", gzip.compress(LINES * 99)[:-40], "cannot be read"),
    "no gzip": ("rows.jsonl.gz", LINES, "cannot be read"),
    "truncated csv of another encoding": ("rows.csv", b"prompt,chosen,rejected\na,b\xff,c\n", "cannot be read as csv"),
    "truncated parquet": ("rows.parquet", b"PAR1" + b"\0" * 50, "cannot be read as parquet"),
    "array without an end": ("rows.json", json.dumps(ROWS).encode()[:-30], "cannot be read as json"),
    "utf-16": ("rows.jsonl", LINES.decode().encode("utf-16"), "is not UTF-8"),
    "empty file": ("rows.jsonl", b"", "no rows"), "empty csv": ("rows.csv", b"", "no rows"),
    "empty gzip": ("rows.jsonl.gz", b"", "no rows"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_an_error_even_when_bad_rows_are_skipped(tmp_path, kind, capfd):
    name, content, said = DAMAGED[kind]
    with pytest.raises(DataError, match=said) as caught:
        read(write(tmp_path / name, content), bad_rows="skip")
    assert name in str(caught.value) and "change:" in str(caught.value)


def test_an_empty_file_among_others_is_an_error(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.jsonl", b"")
    with pytest.raises(DataError, match="b.jsonl has no rows"):
        read(tmp_path, bad_rows="skip")


def test_a_line_that_is_too_long_is_a_bad_row_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 2**20)
    name = write(tmp_path / "rows.jsonl", b'{"prompt": "' + b"x" * 100_000_000 + b'"}\n' + LINES)
    with pytest.raises(DataError, match="line 1: is longer than 1 MiB"):
        read(name)
    assert read(name, bad_rows="skip") == ROWS


def test_links_that_lead_nowhere_or_in_circles_are_refused(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "again").symlink_to(tmp_path / "folder")
    for name in ("a.jsonl", "folder", "*.jsonl", "nothing.csv"):
        with pytest.raises(ConfigError, match="does not exist"):
            source_files(str(tmp_path / name))
    write(tmp_path / "folder" / "rows.jsonl", LINES)
    assert read(tmp_path / "folder") == ROWS == read(f"{tmp_path}/folder/**/rows.jsonl")


def test_a_name_of_the_hub(monkeypatch):
    """Its code is never run: what would need some is taken from the Hub's own copy in Parquet."""
    asked, rows = [], datasets.Dataset.from_list([{"chosen": f"\n\nHuman: {i}\n\nAssistant: a",
                                                   "rejected": f"\n\nHuman: {i}\n\nAssistant: b"} for i in range(2)])

    def load(path, **options):
        asked.append((path, options, datasets.config.HF_HUB_OFFLINE))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported")
        return datasets.DatasetDict({"test": rows.select([0]), "train": rows.select([1]), "dev": rows.select([0])})
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "hub_answers", lambda: True)
    assert [(r.turns[0][1], r.part) for r in read_source("Anthropic/hh-rlhf", "hh", Data(), 0)] == [
        ("0", "eval"), ("0", "eval"), ("1", "")]
    assert asked == [("Anthropic/hh-rlhf", {}, False),
                     ("Anthropic/hh-rlhf", {"revision": "refs/convert/parquet"}, False)]
    monkeypatch.setattr(files, "hub_answers", lambda: False)
    assert list(files._load_hub("Cohere/miracl-zh-queries-22-12")) == ["train", "dev"]  # a testB has no judgments
    assert asked[-1][2] and not datasets.config.HF_HUB_OFFLINE  # its cache is asked, without retries
    files._load_hub("Hello-SimpleAI/HC3-Chinese")
    assert asked[-1][1] == {"revision": "refs/convert/parquet", "data_dir": "all"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="'no/such' cannot be loaded(.|\n)*change"):
        list(read_source("no/such", "no", Data(), 0))
