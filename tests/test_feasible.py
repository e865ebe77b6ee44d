"""What cannot work is refused before a rank starts, with its reason: dtypes, adapters' targets, extras, own JSON."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

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


def test_random_weights_have_targets_too_and_a_name_of_the_hub_is_left_to_the_ranks():
    refuse(Pipeline().with_overrides(["lora.rank=2", "lora.targets=gate_proj"]), CPU)
    with pytest.raises(ConfigError, match="c_attn"):
        refuse(Pipeline().with_overrides(["lora.rank=2", "lora.targets=c_attn"]), CPU)
    assert weight_names("facebook/opt-125m") == []


def test_a_damaged_weight_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((64).to_bytes(8, "little") + b"no json")
    with pytest.raises(ConfigError, match="model.safetensors is damaged"):
        weight_names(str(tmp_path))


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
