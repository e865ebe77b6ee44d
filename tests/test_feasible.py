"""What cannot work is refused before a rank starts, with its reason: dtypes, adapters' targets, extras, own JSON."""

import dataclasses
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
from tiny_models import causal_lm, folder

from dschat_kit.config import ConfigError, Pipeline
from dschat_kit.feasible import refuse, weight_names
from dschat_kit.machine import Machine, resolve
from dschat_kit.models.lora import add_adapters

CPU = Machine(accelerator="cpu", devices=2, cores=2, bf16=False, torch_build="")
AMPERE = dataclasses.replace(CPU, accelerator="cuda", bf16=True)
TURING = dataclasses.replace(AMPERE, bf16=False)


@pytest.mark.parametrize("machine, dtype, said", [(CPU, "fp16", "fp16 losses on GPUs only"),
                                                  (TURING, "bf16", "older than Ampere"), (CPU, "bf16", None),
                                                  (AMPERE, "bf16", None), (TURING, "fp16", None), (CPU, "fp32", None)])
def test_a_dtype_that_the_machine_does_not_multiply_is_refused_with_the_reason(machine, dtype, said):
    pipeline = Pipeline().with_overrides([f"model.dtype={dtype}"])
    if said is None:
        refuse(pipeline, machine)
        return
    with pytest.raises(ConfigError, match=said) as caught:
        refuse(pipeline, machine)
    assert "expected:" in str(caught.value) and "--set model.dtype=" in str(caught.value)


@pytest.mark.parametrize("family, good, bad", [("llama", "q_proj, v_proj", "query_key_value"), ("opt", "fc1", "c_attn"),
                                               ("bloom", "query_key_value", "q_proj"), ("gpt2", "c_attn", "q_proj"),
                                               ("gpt_neox", "dense_h_to_4h", "proj")])
def test_a_target_that_matches_no_module_is_refused_and_those_that_do_are_named(tmp_path, family, good, bad):
    pipeline = Pipeline().with_overrides([f"model.name={folder(tmp_path, family)}", "lora.rank=2"])
    refuse(pipeline.with_overrides([f"lora.targets={good}"]), CPU)
    refuse(pipeline.with_overrides([f"lora.targets={bad}", "lora.rank=0"]), CPU)
    with pytest.raises(ConfigError, match="matches no module") as caught:
        refuse(pipeline.with_overrides([f"lora.targets={good},{bad}"]), CPU)
    assert good.split(",")[0] in str(caught.value) and f"'{bad}'" in str(caught.value)


@pytest.mark.parametrize("family, bad", [("llama", "input_layernorm"), ("llama", "embed_tokens"), ("llama", "lm_head"),
                                         ("opt", "final_layer_norm"), ("opt", "embed_positions"), ("gpt2", "wte"),
                                         ("gpt2", "ln_1"), ("gpt_neox", "embed_in"), ("gpt_neox", "embed_out"),
                                         ("bloom", "word_embeddings"), ("bloom", "word_embeddings_layernorm")])
def test_norms_embeddings_and_heads_take_no_adapters(tmp_path, family, bad):
    """peft would take embeddings and heads, whose adapters the export does not merge."""
    pipeline = Pipeline().with_overrides([f"model.name={folder(tmp_path, family)}", "lora.rank=2",
                                          f"lora.targets={bad}"])
    with pytest.raises(ConfigError, match=f"'{bad}', which matches no module") as caught:
        refuse(pipeline, CPU)
    assert bad not in str(caught.value).split("expected:")[1]
    with pytest.raises(ConfigError, match=f"got {bad}, which match no module"):
        add_adapters(causal_lm(family), pipeline.lora, 0)


def test_random_weights_have_targets_too():
    refuse(Pipeline().with_overrides(["lora.rank=2", "lora.targets=gate_proj"]), CPU)
    with pytest.raises(ConfigError, match="c_attn"):
        refuse(Pipeline().with_overrides(["lora.rank=2", "lora.targets=c_attn"]), CPU)


@pytest.mark.parametrize("family, size, said", [
    ("scratch", 2, None), ("scratch", 3, "3 for num_attention_heads 4, .*expected: multiples of 3"),
    ("opt", 2, None), ("opt", 4, None), ("llama", 4, "num_key_value_heads 2, "),
    ("gpt2", 2, "2 for a gpt2\n.*one of opt"), ("bloom", 2, "2 for a bloom")])
def test_weights_that_no_ranks_can_share_in_generation_are_refused(tmp_path, family, size, said):
    pipeline = Pipeline().with_overrides([f"rollout.inference_tp_size={size}", *(
        [] if family == "scratch" else [f"model.name={folder(tmp_path, family)}"])])
    if said is None:
        refuse(pipeline, CPU)
        return
    with pytest.raises(ConfigError, match=re.compile(said, re.S)) as caught:
        refuse(pipeline, CPU)
    assert "--set rollout.inference_tp_size=1" in str(caught.value)


class Hub(http.server.BaseHTTPRequestHandler):
    """One model, as huggingface.co serves it."""
    place, asked = None, []

    def do_HEAD(self):
        self.answer(self.path.partition("/resolve/main/")[2], body=False)

    def do_GET(self):
        if self.path.startswith("/api/models/owner/name"):
            self.send(json.dumps({"id": "owner/name", "sha": "0" * 40}).encode(), "application/json")
        else:
            self.answer(self.path.partition("/resolve/main/")[2], body=True)

    def answer(self, name, body):
        Hub.asked.append(name)
        path = self.place / (name or "nothing")
        if self.path != "/" and not (self.path.startswith("/owner/name/") and path.is_file()):
            self.send(b"", status=404, **{"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes() if self.path != "/" else b""
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first):int(last) + 1 if last else None]
        self.send(part, body=body, status=206 if "Range" in self.headers else 200,
                  **{"ETag": f'"{hash(content)}"', "X-Repo-Commit": "0" * 40})

    def send(self, content, kind="application/octet-stream", status=200, body=True, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """(environment of a program that asks a Hub on this machine, its cache); the Hub has owner/name, a Llama."""
    Hub.place, Hub.asked = folder(tmp_path / "served"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "cache"
    yield {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), "HF_HUB_CACHE": str(cache), "DS_ACCELERATOR":
           "cpu", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}, cache
    server.shutdown()


def asked_of(environment, *settings):
    done = subprocess.run([sys.executable, "-c", "import sys\nfrom dschat_kit.config import Pipeline\n"
                           "from dschat_kit.feasible import refuse\nfrom dschat_kit.machine import detect\n"
                           "refuse(Pipeline().with_overrides(sys.argv[1:]), detect())", "model.name=owner/name",
                           *settings], env=environment, capture_output=True, text=True, timeout=60)
    return done.stderr


def test_a_name_of_the_hub_is_refused_before_a_rank_starts_too(hub):
    environment, _ = hub
    assert asked_of(environment, "lora.rank=2", "lora.targets=q_proj", "rollout.inference_tp_size=2") == ""
    said = asked_of(environment, "lora.rank=2", "lora.targets=c_attn")
    assert "'c_attn', which matches no module of owner/name" in said and "q_proj" in said.split("expected:")[1]
    assert "3 for num_attention_heads 4" in asked_of(environment, "rollout.inference_tp_size=3")


def test_a_model_in_the_cache_of_the_hub_needs_no_network(hub):
    environment, cache = hub
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(Hub.place, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    said = asked_of(environment, "lora.rank=2", "lora.targets=c_attn")
    assert "'c_attn', which matches no module of owner/name" in said and not Hub.asked


@pytest.mark.parametrize("name", ["owner/other", "/no/such/folder", "three/part/name"])
def test_a_model_that_is_nowhere_is_left_to_loading_which_says_so(hub, name):
    environment, _ = hub
    for endpoint in (environment["HF_ENDPOINT"], "http://127.0.0.1:9"):
        assert asked_of(environment | {"HF_ENDPOINT": endpoint}, f"model.name={name}", "lora.rank=2",
                        "lora.targets=c_attn", "rollout.inference_tp_size=3") == ""


def test_a_damaged_weight_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((64).to_bytes(8, "little") + b"no json")
    with pytest.raises(ConfigError, match="model.safetensors is damaged"):
        weight_names(str(tmp_path))


def test_a_damaged_configuration_is_named_where_weights_are_split(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "op')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        refuse(Pipeline().with_overrides([f"model.name={tmp_path}", "rollout.inference_tp_size=2"]), CPU)


def test_tensorboard_that_is_not_installed_is_said(monkeypatch):
    pipeline, find = Pipeline().with_overrides(["telemetry.tensorboard=true"]), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ConfigError, match="env/setup.sh tensorboard"):
        refuse(pipeline, CPU)


@pytest.mark.parametrize("machine, ranks, said", [
    (CPU, 3, "got 3\n  expected: 1 to 2, the cores"), (CPU, 0, "got 0"), (CPU, 2, None),
    (dataclasses.replace(AMPERE, devices=8), 8, None), (dataclasses.replace(AMPERE, devices=8), 9, "got 9.*\n.*GPUs")])
def test_more_ranks_than_devices_are_refused(machine, ranks, said):
    if said is None:
        machine.check_ranks(ranks)
        return
    with pytest.raises(ConfigError, match=f"--num-gpus: {said}") as caught:
        machine.check_ranks(ranks)
    assert "change:   --num-gpus 2" in str(caught.value) or ranks == 9


def test_a_deepspeed_json_travels_as_text_and_changes_the_hash(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization":   {"zero_hpz_partition_size": 8}}')
    pipeline = resolve(Pipeline().with_overrides([f"zero.deepspeed={path}"]))
    path.unlink()
    assert json.loads(pipeline.zero.deepspeed) == {"zero_optimization": {"zero_hpz_partition_size": 8}}
    assert Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict()))) == resolve(pipeline) == pipeline
    assert pipeline.config_hash("sft") != resolve(Pipeline()).config_hash("sft")
    for text in ("{", "[1, 2]", "null", "3", '"words"', None):
        path.unlink(missing_ok=True) if text is None else path.write_text(text)
        with pytest.raises(ConfigError, match="zero.deepspeed"):
            resolve(Pipeline().with_overrides([f"zero.deepspeed={path}"]))


def test_the_command_says_it_before_a_folder_is_made(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dschat_kit.cli", "sft", "--run-root", str(tmp_path / "run"), "--set",
                           "model.dtype=fp16"], capture_output=True, text=True, env={"DS_ACCELERATOR": "cpu",
                                                                                     "PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 2 and "model.dtype: got fp16" in done.stderr and "change:" in done.stderr
    assert not (tmp_path / "run").exists()
