"""The hybrid engine: what it generates, what it leaves untouched, and what it says when something is wrong."""

import copy
import gc
import inspect
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_decode import SAMPLING, request, responses, run
from test_ranks import environment
from tiny_models import causal_lm

from dschat_kit.config import Lora, Rollout
from dschat_kit.engine import attention, hybrid, replica
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.models.lora import add_adapters, merge_adapters
from dschat_kit.runs import RunError

GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    """Weights are packed as those of a model of real size are."""
    monkeypatch.setattr(replica, "PACKED", 0)


class Engine:
    """What the hybrid engine reads of DeepSpeed's, in one process."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")


def engine_of(module, **how):
    return HybridEngine(Engine(module), **{"micro_batch_size": 4} | how)


def with_adapters(seed=0):
    """A model with adapters that do something."""
    model = add_adapters(causal_lm("llama", seed), Lora(rank=4), seed)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("architecture", ["opt", "bloom", "gpt2", "gemma2"])
def test_it_generates_what_the_plain_path_generates(architecture):
    model = causal_lm(architecture).train()
    engine, asked = engine_of(model), request(lengths=(3, 6, 4, 6, 5, 2, 7))
    assert responses(engine.generate(asked, SAMPLING)) == responses(run(causal_lm(architecture), asked, path="plain"))
    assert engine.path == ("plain" if architecture == "gemma2" else "slots") and engine.reason
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_shared_and_memory_is_let_go():
    model = causal_lm()
    engine = engine_of(model, release_inference_cache=False)
    engine.generate(request(), SAMPLING)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in engine.replica.model.parameters()} == shared
    assert engine._kv is not None
    engine.release_inference_cache = True
    engine.generate(request(), SAMPLING)
    assert engine._kv is None and all(parameter.is_meta for parameter in engine.replica.model.parameters())


@pytest.mark.parametrize("release", [True, False])
def test_adapters_are_fused_and_every_rollout_sees_the_newest_weights(release):
    model = with_adapters()
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    engine = engine_of(model, release_inference_cache=release)
    for _ in range(2):
        merged = causal_lm("llama")
        merged.load_state_dict(merge_adapters(model, dict(model.state_dict())))
        expected = run(merged, request(), SAMPLING)
        batch = engine.generate(request(), SAMPLING)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.allclose(batch.logprobs, expected.logprobs, atol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert flags == [p.requires_grad for p in model.parameters()]
        with torch.no_grad():  # a training step
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        before = copy.deepcopy(model.state_dict())
    assert responses(batch) != responses(run(causal_lm("llama"), request(), SAMPLING))


def test_an_exception_inside_leaves_the_model_trainable(monkeypatch):
    model = causal_lm()
    engine = engine_of(model)

    def broken(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(hybrid, "decode", broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(request(), SAMPLING)
    monkeypatch.undo()
    model(input_ids=request().prompt_ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert responses(engine.generate(request(), SAMPLING)) == responses(run(causal_lm(), request()))


def test_a_fast_path_that_is_wrong_is_noticed_located_and_left(monkeypatch):
    honest = attention.KVSlots.attend

    def wrong(self, layer, query, key, value, scaling, *more):
        factor = 1.7 if layer == 1 and query.shape[2] == 1 else 1.0
        return honest(self, layer, query, key, value, scaling * factor, *more)
    monkeypatch.setattr(attention.KVSlots, "attend", wrong)
    engine = engine_of(causal_lm("opt"))
    batch = engine.generate(request(), SAMPLING)
    assert engine.path == "plain" and "layer 1 differs from plain transformers by" in engine.reason
    assert responses(batch) == responses(run(causal_lm("opt"), request(), path="plain"))


def test_bf16_decodes_in_fp32_where_it_would_be_emulated(monkeypatch):
    machine = replace(hybrid.detect(), bf16=False)
    monkeypatch.setattr(hybrid, "detect", lambda: machine)
    model = causal_lm().bfloat16()
    engine = engine_of(model)
    batch = engine.generate(request(), SAMPLING)
    assert responses(batch) == responses(run(copy.deepcopy(model).float(), request()))
    assert next(model.parameters()).dtype == torch.bfloat16
    monkeypatch.setattr(hybrid, "detect", lambda: replace(machine, bf16=True))
    assert engine_of(model).replica.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths, changes, how, words", [
    ((), {}, {}, "got no prompts on this rank"),
    ((3, 0), {}, {}, "prompt 1 is empty"),
    ((3, 6), dict(max_new_tokens=123), {}, "expected: at most 128"),
    ((3, 6), {}, dict(max_out_tokens=17), "expected: at most 17"),
])
def test_bad_input_is_said(lengths, changes, how, words):
    asked = request(lengths=lengths) if lengths else replace(request(), prompt_ids=torch.zeros(0, 4, dtype=torch.long),
                                                             prompt_attention_mask=torch.zeros(0, 4, dtype=torch.bool),
                                                             row_seeds=torch.zeros(0, dtype=torch.long))
    with pytest.raises(RunError, match=words):
        engine_of(causal_lm(), **how).generate(asked, replace(SAMPLING, **changes))


def test_memory_that_is_not_there_is_said_with_the_rows_that_would_fit(monkeypatch):
    available = type("Memory", (), {"available": 3 * 18 * 2 * 2 * 2 * 8 * 4})  # 3 rows of 18 tokens, 2 layers, 2 heads
    monkeypatch.setattr(hybrid.psutil, "virtual_memory", lambda: available)
    with pytest.raises(RunError, match="which 3 rows would fit"):
        engine_of(causal_lm()).generate(request(), SAMPLING)


def test_what_glibc_keeps_is_given_back_before_memory_is_short(monkeypatch):
    free, given = [1000], []
    monkeypatch.setattr(hybrid, "free_memory", lambda device: free[0])
    monkeypatch.setattr(hybrid, "give_back_freed_memory", lambda: given.append(1) or free.__setitem__(0, 10**12))
    engine_of(causal_lm()).generate(request(), SAMPLING)
    assert len(given) == 1


@pytest.mark.parametrize("architecture", ["opt", "bloom"])
def test_no_module_holds_the_memory_that_was_released(architecture):
    engine = engine_of(causal_lm(architecture))
    made = []
    decode = hybrid.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "decode", lambda steps, *rest: made.append(weakref.ref(steps.kv)) or decode(steps, *rest))
        engine.generate(request(), SAMPLING)
    gc.collect()
    assert made and not any(kept() for kept in made)


def test_memory_that_torch_keeps_after_training_is_free(monkeypatch):
    for name, found in (("mem_get_info", (3, 80)), ("memory_reserved", 70), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert hybrid.free_memory(torch.device("cuda")) == 53


def test_a_model_without_finite_logits_or_without_a_cache_is_named():
    broken = causal_lm()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    engine = engine_of(broken)
    with pytest.raises(RunError, match="row 0, response token 0"):
        engine.generate(request(lengths=(6, 3)), SAMPLING)
    with pytest.raises(RunError, match="has no cache"):
        engine_of(torch.nn.Linear(2, 2))


def test_every_rollout_setting_reaches_the_engine():
    """PPO and DPO hand the section over as it is (train/roles.py)."""
    taken = set(inspect.signature(HybridEngine).parameters) - {"engine"}
    assert taken == {field.name for field in fields(Rollout)} - {"reuse_logprobs"}


def test_all_rows_may_end_at_their_first_token():
    batch = engine_of(causal_lm()).generate(request(), replace(SAMPLING, stop_token_ids=tuple(range(300))))
    assert batch.response_mask.shape[1] == 1 and batch.finished.all()


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_at_every_zero_stage(tmp_path):
    """One launch: stages 0-3, with and without adapters; see tests/hybrid_job.py for what is asserted."""
    tests = Path(__file__).parent
    job = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29741",
           str(tests / "hybrid_job.py"), str(tmp_path / "reward")]
    done = subprocess.run(job, env=environment() | {"PYTHONPATH": f"{tests.parent}:{tests}"}, capture_output=True,
                          text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("all is well") == 8 and done.stdout.count("split is whole") == 2
    assert done.stdout.count("streamed is whole") == 5
