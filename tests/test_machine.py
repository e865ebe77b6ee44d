"""What the machine has decides device, dtype and ranks; names become what they stand for here."""

import os
import subprocess
import sys

import pytest

from dschat_kit import machine
from dschat_kit.config import Data, Model, Pipeline
from dschat_kit.machine import Machine, checkout, detect, resolve


@pytest.fixture
def gpus(monkeypatch):
    """An nvidia-smi that shows two GPUs (compute capability 9.0 and 8.0), and a torch that can use them."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_torch_build", lambda: "2.13.0+cu130")
    said = {"--query-gpu=index": "0\n1\n", "--query-gpu=compute_cap": "9.0\n8.0\n"}

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=said[command[1]], stderr="")
    monkeypatch.setattr(subprocess, "run", run)
    return said


def test_one_rank_a_gpu(gpus):
    found = detect()
    assert (found.accelerator, found.devices, found.default_ranks, found.dtype) == ("cuda", 2, 2, "bf16")


@pytest.mark.parametrize("visible, devices", [("1", 1), ("", 0), ("-1", 0), ("0,1", 2), ("0,1,2,3", 2)])
def test_hidden_gpus_are_not_counted(gpus, monkeypatch, visible, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect()
    assert (found.accelerator, found.devices if devices else 0) == ("cuda" if devices else "cpu", devices)


def test_bf16_needs_every_gpu_to_multiply_it(gpus):
    gpus["--query-gpu=compute_cap"] = "9.0\n7.5\n"
    assert detect().dtype == "fp32"


@pytest.mark.parametrize("why", ["asked", "cpu build", "no driver"])
def test_without_gpus_two_ranks_on_the_cpu(gpus, monkeypatch, why):
    if why == "asked":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if why == "cpu build":
        monkeypatch.setattr(machine, "_torch_build", lambda: "2.13.0+cpu")
    if why == "no driver":
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    found = detect()
    assert found.accelerator == "cpu" and found.default_ranks == min(2, found.cores)


def test_a_single_core_gets_one_rank():
    assert Machine(accelerator="cpu", devices=1, cores=1, bf16=False, torch_build="").default_ranks == 1


def test_auto_becomes_a_dtype_and_a_given_one_stays(gpus):
    assert resolve(Pipeline()).model.dtype == "bf16"
    assert resolve(Pipeline(model=Model(dtype="fp32"))).model.dtype == "fp32"


def sources(text: str) -> str:
    return resolve(Pipeline(data=Data(sources=text))).data.sources


def test_the_alias_is_the_local_folder_or_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("DSCHAT_DATA", str(tmp_path))
    assert sources("hh-helpful") == str(tmp_path / "hh_helpful_256")
    monkeypatch.delenv("DSCHAT_DATA")
    assert sources("hh-helpful") == "Dahoas/rm-static"


def test_relative_paths_become_absolute_with_their_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").touch()
    (tmp_path / "toy").mkdir()
    assert sources("my rows.jsonl:2, org/name:0.5") == f"{tmp_path}/my rows.jsonl:2,org/name:0.5"
    assert sources("toy") == "toy"
    assert sources(sources("my rows.jsonl")) == f"{tmp_path}/my rows.jsonl"
    assert sources("my*.jsonl:2") == f"{tmp_path}/my*.jsonl:2"  # notebooks have another current folder


def test_a_module_is_a_file_or_a_name_whatever_folders_there_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.py").touch()
    for module, resolved in (("mine", "mine"), ("mine.py", f"{tmp_path}/mine.py"), ("", "")):
        assert resolve(Pipeline(data=Data(module=module))).data.module == resolved


def test_a_model_in_models_is_found_by_its_hub_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "some-model"
    folder.mkdir(parents=True)
    pipeline = Pipeline(model=Model(name="org/some-model"))
    assert resolve(pipeline).model.name == "org/some-model"
    (folder / "config.json").write_text("{}")
    assert resolve(pipeline).model.name == str(folder)


def test_the_checkout_is_this_repository(monkeypatch, tmp_path):
    assert (checkout() / "pyproject.toml").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "dschat_kit" / "machine.py"))
    assert checkout() == tmp_path


def test_a_comma_in_a_path_survives_being_resolved(tmp_path):
    (tmp_path / "a, b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text("")
    escaped = str(tmp_path / "a, b.jsonl").replace(",", "\\,")
    pipeline = Pipeline().with_overrides([f"data.sources={escaped}:2,{tmp_path / 'c.jsonl'}"])
    for resolved in (resolve(pipeline), resolve(resolve(pipeline))):
        assert resolved.data.weighted_sources() == [(str(tmp_path / "a, b.jsonl"), 2.0),
                                                    (str(tmp_path / "c.jsonl"), None)]


@pytest.mark.parametrize("limit, available", [("max", 900), ("500", 500 - 400 + 250), ("5000", 900)])
def test_the_limit_of_a_container_bounds_what_can_be_had_and_its_file_cache_does_not(tmp_path, monkeypatch, limit,
                                                                                     available):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 900}))
    assert machine.available_memory() == 900
    for name, text in (("max", limit), ("current", "400"), ("stat", "anon 150\nactive_file 50\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.available_memory() == available


@pytest.mark.parametrize(("asked", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step_until_it_is_given_back(asked, kept):
    """100 MB that are freed stay with the process, but where the user's MALLOC_ variables ask for something else."""
    code = """
import torch
from dschat_kit.machine import PeakMemory, give_back_freed_memory, keep_freed_memory
keep_freed_memory()
blocks, after = [torch.ones(2**18) for _ in range(100)], []
full = PeakMemory._now()
del blocks
print(full - PeakMemory._now())
give_back_freed_memory()
print(full - PeakMemory._now())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | asked
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    freed, given_back = map(float, done.stdout.split())
    assert (freed < 10) == kept
    assert given_back > 90
