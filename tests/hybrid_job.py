"""Launched by test_hybrid.py on two ranks: the hybrid engine at ZeRO 0-3, with and without adapters."""

import dataclasses
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from test_decode import SAMPLING, request, responses, run
from test_hybrid import with_adapters
from tiny_models import SHAPES, VOCABULARY, causal_lm
from transformers import AutoConfig, AutoModelForSequenceClassification

from dschat_kit.config import Pipeline
from dschat_kit.engine import attention, ds_config
from dschat_kit.engine import hybrid as hybrid_module
from dschat_kit.engine.engines import build_engine
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.shared import Role, SharedModel
from dschat_kit.engine.zero import full_state_dict
from dschat_kit.models import packed
from dschat_kit.models.lora import add_adapters, merge_adapters, save_adapter
from dschat_kit.models.scalar_model import ScalarModel
from dschat_kit.rlhf.logprobs import response_logprobs
from dschat_kit.runs import RunError
from dschat_kit.sections import ConfigError


def state_of(engine) -> list[torch.Tensor]:
    """Everything that ZeRO holds on this rank."""
    found = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    for group in engine.optimizer.param_groups:
        found += [p.detach().clone() for p in group["params"]]
    return found


def refused(engine, asked, words: str) -> None:
    try:
        engine.generate(asked, SAMPLING)
    except RunError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def check(stage: int, adapters: bool) -> None:
    rank = dist.get_rank()
    model = with_adapters() if adapters else causal_lm("opt")
    twin = causal_lm("llama") if adapters else causal_lm("opt")
    pipeline = Pipeline().with_overrides([f"zero.stage={stage}", "model.dtype=fp32"])
    engine = build_engine(model, pipeline, lr=0.05, batch_size=4, micro_batch_size=2, world_size=2, grad_clip=1.0)
    engine.train()
    hybrid = HybridEngine(engine, micro_batch_size=3)
    flags = [p.requires_grad for p in model.parameters()]
    asked = request(lengths=(3, 6, 4, 6, 5) if rank else (2, 5, 9, 1), seed=rank)  # different numbers of prompts
    for step in range(2):
        whole = full_state_dict(model, True)
        twin.load_state_dict(merge_adapters(model, whole))
        before = state_of(engine)
        batch = hybrid.generate(asked, SAMPLING)
        assert all(torch.equal(one, two) for one, two in zip(before, state_of(engine), strict=True))
        assert flags == [p.requires_grad for p in model.parameters()] and model.training
        expected = run(twin, asked)
        assert responses(batch) == responses(expected), (stage, adapters, step)
        assert torch.allclose(batch.logprobs, expected.logprobs, atol=1e-5)
        A = batch.response_mask.shape[1]
        logprobs, _ = response_logprobs(engine, batch.input_ids[:2], batch.attention_mask[:2], A)
        assert torch.allclose(logprobs.detach(), batch.logprobs[:2], atol=1e-5)
        engine.backward(logprobs.sum() / 10, scale_wrt_gas=False)
        engine.step()
        changed = [not torch.equal(one, two) for one, two in zip(before, state_of(engine), strict=True)]
        assert any(changed), "nothing was trained"
    assert hybrid.path == "slots", hybrid.reason
    empty = request(lengths=(3,)) if rank else asked
    if rank:
        empty.prompt_attention_mask[:] = False
    refused(hybrid, empty, "rank 1: prompt 0 is empty")
    if rank == 0:
        print(f"ZeRO {stage} adapters {adapters}: all is well", flush=True)


def check_split(stage: int, adapters: bool) -> None:
    """Two ranks that share the weights of generation say what each says with whole weights."""
    rank = dist.get_rank()
    model = with_adapters() if adapters else causal_lm("opt")
    pipeline = Pipeline().with_overrides([f"zero.stage={stage}", "model.dtype=fp32"])
    engine = build_engine(model, pipeline, lr=0.05, batch_size=4, micro_batch_size=2, world_size=2, grad_clip=1.0)
    asked = request(lengths=(3, 6, 4, 6, 5) if rank else (2, 5, 9, 1), seed=rank)
    whole = HybridEngine(engine, micro_batch_size=3).generate(asked, SAMPLING)
    split = HybridEngine(engine, micro_batch_size=3, inference_tp_size=2, release_inference_cache=False)
    for _ in range(2):  # filled, and filled again
        batch = split.generate(asked, SAMPLING)
        for field in ("input_ids", "attention_mask", "response_start_idx", "response_mask", "finished"):
            assert torch.equal(getattr(batch, field), getattr(whole, field)), (stage, adapters, field)
        assert torch.allclose(batch.logprobs, whole.logprobs, atol=1e-5) and split.path == "slots", split.reason
    free, tight = hybrid_module.free_memory, HybridEngine(engine, micro_batch_size=3, inference_tp_size=2)
    hybrid_module.free_memory = lambda device: 10**12 if rank else 5000  # the other rank would wait for a layer's sum
    refused(tight, asked, "rank 0: keys and values of 3 rows")
    hybrid_module.free_memory = free
    held = sum(parameter.numel() for parameter in split.replica.model.model.parameters())
    assert held < 0.75 * sum(parameter.numel() for parameter in causal_lm(model.config.model_type).model.parameters())
    try:
        HybridEngine(engine, micro_batch_size=3, inference_tp_size=4)
    except (RunError, ConfigError) as error:  # of the shape, where it has but two heads of keys
        assert "got 2 ranks" in str(error) or "got 4 for num_attention_heads" in str(error)
    else:
        raise AssertionError("four parts on two ranks are not refused")
    if rank == 0:
        print(f"ZeRO {stage} adapters {adapters}: split is whole", flush=True)


def check_agreement() -> None:
    """A fast path that is wrong on one rank alone is left by all. DeepSpeed's own types are drawn apart on the ranks,
    however alike these are seeded."""
    rank, honest = dist.get_rank(), attention.KVSlots.attend
    pipeline = Pipeline().with_overrides(["model.dtype=fp32"])
    engine = build_engine(causal_lm("opt"), pipeline, lr=0.05, batch_size=4, micro_batch_size=2, world_size=2,
                          grad_clip=1.0)
    hybrid = HybridEngine(engine, micro_batch_size=4)
    if rank:
        attention.KVSlots.attend = lambda self, layer, query, key, value, scaling, *more: honest(
            self, layer, query, key, value, scaling * (1.7 if layer == 1 and query.shape[2] == 1 else 1.0), *more)
    asked = request(lengths=(3, 6, 4, 6, 5) if rank else (2, 5, 9, 1), seed=rank)
    batch = hybrid.generate(asked, SAMPLING)
    attention.KVSlots.attend = honest
    assert hybrid.path == "plain" and "rank 1: layer 1 differs from plain" in hybrid.reason, hybrid.reason
    assert responses(batch) == responses(run(causal_lm("opt"), asked, path="plain"))
    torch.manual_seed(0)
    alike, found = request(seed=0), [None, None]
    batch = hybrid.generate(RolloutRequest(alike.prompt_ids, alike.prompt_attention_mask),
                            SamplingConfig(max_new_tokens=8, temperature=1.0))
    dist.all_gather_object(found, responses(batch))
    assert found[0] != found[1]
    if rank == 0:
        print("the ranks agree", flush=True)


def follow_gathered(module: torch.nn.Module) -> list[float]:
    """A list whose last entry becomes the largest share of the weights that was whole, or on its way, at once."""
    peak, whole = [0.0], sum(parameter.ds_numel for parameter in module.parameters())

    def look(*_):
        now = sum(p.ds_numel for p in module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        peak[-1] = max(peak[-1], now / whole)
    for part in module.modules():
        part.register_forward_pre_hook(look)
        part.register_forward_hook(look, prepend=True)
    return peak


def check_streamed(architecture: str, adapters: bool) -> None:
    """Weights gathered in every step give what a whole copy gives, with other numbers of prompts on the ranks; where
    memory is short on one rank, all do so by themselves. Neither they nor training ever gather the whole."""
    rank, ds_config.BUCKET = dist.get_rank(), 2000
    model = with_adapters() if adapters else causal_lm(architecture)
    pipeline = Pipeline().with_overrides(["zero.stage=3", "model.dtype=fp32"])
    engine = build_engine(model, pipeline, lr=0.05, batch_size=4, micro_batch_size=2, world_size=2, grad_clip=1.0)
    asked = request(lengths=(3, 6, 4, 6, 5, 2, 2) if rank else (2, 9), seed=rank)
    whole = HybridEngine(engine, micro_batch_size=3, gather="rollout").generate(asked, SAMPLING)
    before, implementation = state_of(engine), model.config._attn_implementation
    peak = follow_gathered(model)
    short = HybridEngine(engine, micro_batch_size=3)
    hybrid_module.free_memory = lambda device: short.replica.needed_bytes() - rank
    for engine_of_steps in (HybridEngine(engine, micro_batch_size=3, gather="step", release_inference_cache=False),
                            short):
        for _ in range(2):
            batch = engine_of_steps.generate(asked, SAMPLING)
            assert torch.equal(batch.input_ids, whole.input_ids) and torch.equal(batch.finished, whole.finished)
            assert torch.allclose(batch.logprobs, whole.logprobs, atol=1e-5)
            assert all(parameter.is_meta for parameter in engine_of_steps.replica.model.parameters())
        assert engine_of_steps.gather == "step"
        assert engine_of_steps.path == ("plain" if architecture == "gemma2" else "slots"), engine_of_steps.reason
    assert all(torch.equal(one, two) for one, two in zip(before, state_of(engine), strict=True))
    assert model.training and model.config._attn_implementation == implementation
    empty = request(lengths=(3,))
    logits, honest = model.get_output_embeddings(), type(model.get_output_embeddings()).forward
    logits.forward = lambda hidden: honest(logits, hidden) + (float("nan") if rank else 0)
    refused(short, empty, "rank 1: the model gives no finite logits")  # and rank 0 is not left waiting
    del logits.forward
    for _ in range(6):  # DeepSpeed looks at two, then gathers ahead, and keeps what it soon needs again
        logprobs, _ = response_logprobs(engine, batch.input_ids[:2], batch.attention_mask[:2], 2)
        engine.backward(logprobs.sum() / 10, scale_wrt_gas=False)
        engine.step()
    assert any(not torch.equal(one, two) for one, two in zip(before, state_of(engine), strict=True))
    assert 0 < peak[0] < 0.5, (architecture, peak)
    if rank == 0:
        print(f"{architecture} adapters {adapters}: streamed is whole", flush=True)


def shared_base(folder: Path) -> DeepSpeedEngine:
    """All four roles on one base, their adapters made to do something."""
    pipeline = Pipeline().with_overrides(["zero.stage=3", "model.dtype=fp32", "lora.rank=4", "lora.share_base=true"])
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, pad_token_id=0, num_labels=1, **SHAPES["llama"])
    torch.manual_seed(0)
    scored = add_adapters(ScalarModel(AutoModelForSequenceClassification.from_config(config)), pipeline.lora, 0)
    if dist.get_rank() == 0:
        scored.classifier.config.save_pretrained(folder)
        save_adapter(scored.classifier, pipeline.lora, dict(scored.classifier.state_dict()), "", folder / "adapter")
    dist.barrier()
    model = SharedModel(causal_lm("llama"), folder, pipeline)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return build_engine(model, pipeline, lr=0.05, batch_size=4, micro_batch_size=2, world_size=2, grad_clip=1.0,
                        groups=[model.trained("actor"), model.trained("critic")])


def check_streamed_on_a_shared_base(folder: Path) -> None:
    """As check_streamed with one base for all roles and several answers a prompt, between the passes of the others."""
    rank, engine = dist.get_rank(), shared_base(folder)
    actor, critic, ref = (Role(engine, name) for name in ("actor", "critic", "ref"))
    asked = request(lengths=(3, 6, 4, 6, 5, 2, 2) if rank else (2, 9), seed=rank)
    sampling, tokens = dataclasses.replace(SAMPLING, n_samples_per_prompt=3), []
    whole, streamed = (HybridEngine(actor, micro_batch_size=4, gather=gather) for gather in ("rollout", "step"))
    for _ in range(3):
        expected, batch = whole.generate(asked, sampling), streamed.generate(asked, sampling)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.allclose(batch.logprobs, expected.logprobs, atol=1e-5)
        tokens.append(responses(batch))
        with torch.no_grad():
            response_logprobs(ref, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1])
        logprobs, _ = response_logprobs(actor, batch.input_ids[:2], batch.attention_mask[:2], 2)
        actor.backward(logprobs.sum() / 10, scale_wrt_gas=False)
        actor.step()
        critic.backward(critic(batch.input_ids[:2], batch.attention_mask[:2]).sum() / 100, scale_wrt_gas=False)
        critic.step()
    assert tokens[0] != tokens[1] and streamed.path == "slots", streamed.reason
    if rank == 0:
        print("a shared base: streamed is whole", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    packed.LEAST = 0  # weights are packed as those of a model of real size are
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for zero_stage in range(4):
        for lora in (False, True):
            check(zero_stage, lora)
    check_agreement()
    check_split(0, False)
    check_split(3, True)
    free_memory = hybrid_module.free_memory
    for architecture, lora in (("opt", False), ("llama", True), ("bloom", False), ("gemma2", False)):
        check_streamed(architecture, lora)
        hybrid_module.free_memory = free_memory
    check_streamed_on_a_shared_base(Path(sys.argv[-1]))
    dist.barrier()
    os._exit(0)
