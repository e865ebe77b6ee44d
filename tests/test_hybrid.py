"""The hybrid engine: what it generates, what it leaves untouched, and what it says when something is wrong."""

import copy
import gc
import inspect
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from test_decode import SAMPLING, request, responses, run
from test_ranks import environment
from tiny_models import causal_lm

from dschat_kit import machine
from dschat_kit.config import Lora, Pipeline, Rollout
from dschat_kit.engine import attention, hybrid, parity, replica
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.shared import Reference
from dschat_kit.models import attention as products
from dschat_kit.models import packed
from dschat_kit.models.attention import take_products
from dschat_kit.models.lora import add_adapters, merge_adapters
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.runs import RunError
from dschat_kit.train.roles import rollout_engine

GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(autouse=True)
def everything_packed(monkeypatch):
    """Weights are packed as those of a model of real size are."""
    monkeypatch.setattr(packed, "LEAST", 0)


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


def test_a_frozen_model_answers_alone_or_in_the_engine_that_zero_3_has_it_in():
    model, session = causal_lm(), SimpleNamespace(pipeline=Pipeline(), device="cpu", follow=lambda module: None)
    assert all(rollout_engine(session, actor).engine.module is model for actor in (model, Engine(model)))


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


@pytest.mark.parametrize("place", [(hybrid, "decode"), (replica.Replica, "fill"), (packed.PackedLinear, "forward"),
                                   (attention.KVSlots, "retire")], ids=lambda place: place[1])
def test_an_interrupt_inside_leaves_the_model_trainable(monkeypatch, place):
    """Before, between and in the middle of the steps."""
    model = causal_lm()
    engine = engine_of(model, release_inference_cache=False)
    few = replace(SAMPLING, stop_token_ids=tuple(range(1, 60)))

    def broken(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(*place, broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(request(), few)
    monkeypatch.undo()
    model(input_ids=request().prompt_ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert responses(engine.generate(request(), SAMPLING)) == responses(run(causal_lm(), request()))


def test_deepspeeds_own_types_will_do():
    """Sampled with seeds of torch's generator, ended by the model's EOS, at most so many rows at a time."""
    asked = RolloutRequest(request().prompt_ids, request().prompt_attention_mask)
    model = causal_lm()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1, 5], 0
    engine = engine_of(model, release_inference_cache=False)
    greedy = engine.generate(asked, SamplingConfig(max_new_tokens=12, temperature=0.0, continuous_batch_size=2))
    assert engine.path == "slots" and engine._kv.slots == 2
    assert responses(greedy) == responses(run(causal_lm(), request(), replace(GREEDY, stop_token_ids=(1, 5))))
    torch.manual_seed(3)
    sampled = engine.generate(asked, SamplingConfig(max_new_tokens=12))
    torch.manual_seed(3)
    seeds = torch.randint(2**62, (4,)).tolist()
    expected = run(causal_lm(), request(seeds=seeds), replace(SAMPLING, stop_token_ids=(1, 5)))
    assert responses(sampled) == responses(expected)


def test_bf16_logprobs_of_the_sampler_are_near_those_of_a_forward_pass(monkeypatch):
    """Products in blocks and kept, in prompts and in the pass; the error is that of rounding to 8 bits."""
    fast = replace(hybrid.detect(), bf16=True)
    monkeypatch.setattr(hybrid, "detect", lambda: fast)
    monkeypatch.setattr(products, "faster_as_products", lambda like: True)
    model, asked = causal_lm("opt").bfloat16(), request(lengths=(30, 6, 41, 17))
    for name, value in (("KEPT", 4 * 20 * 20), ("BLOCK", 16)):
        monkeypatch.setattr(products, name, value)
    engine = engine_of(model)
    batch = engine.generate(asked, SAMPLING)
    assert engine.path == "slots" and engine.replica.dtype == torch.bfloat16
    again, _ = response_logprobs(take_products(model), batch.input_ids, batch.attention_mask,
                                 batch.response_mask.shape[1])
    gap = (again - batch.logprobs).abs()[batch.response_mask]
    assert 0 < gap.max() < 0.3 and gap.mean() < 0.05


def test_a_penalty_in_the_models_folder_is_nobodys(monkeypatch):
    model = causal_lm()
    model.generation_config.repetition_penalty = 5.0
    engine = engine_of(model)
    located = []
    monkeypatch.setattr(parity, "_locate", lambda *_: located.append(1))
    engine.generate(request(), SAMPLING)
    assert engine.path == "slots" and not located


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
    slow = replace(hybrid.detect(), bf16=False)
    monkeypatch.setattr(hybrid, "detect", lambda: slow)
    model = causal_lm().bfloat16()
    engine = engine_of(model)
    batch = engine.generate(request(), SAMPLING)
    assert responses(batch) == responses(run(copy.deepcopy(model).float(), request()))
    assert next(model.parameters()).dtype == torch.bfloat16
    monkeypatch.setattr(hybrid, "detect", lambda: replace(slow, bf16=True))
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


@pytest.mark.parametrize("changes, words", [
    (dict(row_lengths=torch.tensor([1, 2, 3])), r"expected: \(4,\) of 1 to 12"),
    (dict(row_lengths=torch.tensor([1, 2, 3, 13])), "of 1 to 13"),
    (dict(row_lengths=torch.tensor([1, 0, 3, 4])), "of 0 to 4"),
    (dict(prompt_attention_mask=request().prompt_attention_mask.flip(1)), "padding behind their tokens"),
])
def test_requests_that_nothing_could_answer_are_said(changes, words):
    with pytest.raises(RunError, match=words):
        engine_of(causal_lm()).generate(replace(request(), **changes), SAMPLING)


def test_lengths_need_a_stop_token():
    with pytest.raises(RunError, match="got no stop token"):
        engine_of(causal_lm()).generate(replace(request(), row_lengths=torch.tensor([1, 2, 3, 4])),
                                        replace(SAMPLING, stop_token_ids=()))


def test_the_reference_is_the_actor_without_its_adapters():
    """And nothing of it stays: not the switch, even after an error, and no gradient."""
    model, plain, ids = with_adapters(), causal_lm("llama"), request().prompt_ids

    class Callable(Engine):
        def __call__(self, **inputs):
            return self.module(**inputs)
    reference, before = Reference(Callable(model)), model(input_ids=ids).logits
    found = reference(input_ids=ids).logits
    assert torch.equal(found, plain(input_ids=ids).logits) and not found.requires_grad
    with pytest.raises(ValueError):
        reference(input_ids=None)
    after = model(input_ids=ids).logits
    assert torch.equal(after, before) and not torch.allclose(after, found) and after.requires_grad


def test_memory_that_is_not_there_is_said_with_the_rows_that_would_fit(monkeypatch):
    available = type("Memory", (), {"available": 3 * 18 * 2 * 2 * 2 * 8 * 4})  # 3 rows of 18 tokens, 2 layers, 2 heads
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: available)
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
    assert done.stdout.count("the ranks agree") == 1
    assert done.stdout.count("streamed is whole") == 5
