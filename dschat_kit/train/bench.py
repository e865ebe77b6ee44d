"""One rank of `dschat bench`; here `rollout`: the same weights, prompts and lengths through our engine and its peers.

    deepspeed --num_gpus 2 --module dschat_kit.train.bench SPEC.json

Peers: `hf`, transformers' generate with the fastest of sdpa / eager attention and dynamic / static cache; `hf_default`,
generate as it comes; `deepspeed`, DeepSpeed's own HybridEngineRollout. Engines take turns, so that a machine that is
busy for a while is busy for all of them. What is counted is stated in docs/performance.md.
"""

import gc
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from dschat_kit.engine.attention import ATTENTION, KVSlots
from dschat_kit.engine.decode import Slots, decode
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.replica import Replica
from dschat_kit.engine.rollout_types import KitRequest, KitSampling
from dschat_kit.machine import PeakMemory, give_back_freed_memory
from dschat_kit.models.loading import DTYPES, load_config
from dschat_kit.runs import write_json
from dschat_kit.sections import error
from dschat_kit.train.rank import start_distributed
from dschat_kit.train.telemetry import forward_flop, matmul_peak, weights_of

SHAPES = {
    "opt-125m": ("opt", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072,
                             word_embed_proj_dim=768, vocab_size=50272)),
    "llama": ("llama", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
                            intermediate_size=2048, vocab_size=32000)),
    "bloom": ("bloom", dict(hidden_size=768, n_layer=12, n_head=12, vocab_size=250880)),
    "gpt-neox": ("gpt_neox", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                                  intermediate_size=3072, vocab_size=50432)),
    "qwen3": ("qwen3", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
                            head_dim=64, intermediate_size=2048, vocab_size=151936)),
    "tiny": ("llama", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                           intermediate_size=128, vocab_size=1000)),
}
"""`random:NAME`: 12 layers of width 768 with the family's vocabulary; `tiny` is for tests."""


def load_model(name: str, dtype: str, auto_class=AutoModelForCausalLM, **changes):
    """Random weights of a named shape, or the model in a folder or on the Hub; the same in every call on every rank."""
    torch.manual_seed(0)  # also of a head that a folder has not
    if not name.startswith("random:"):
        config = load_config(name)
        for field, value in changes.items():
            setattr(config, field, value)
        model = auto_class.from_pretrained(name, config=config, dtype=DTYPES[dtype]).eval()
        model.generation_config = GenerationConfig()  # a folder's own may hold penalties that only the peers pay
        return model
    if (kind := name.removeprefix("random:")) not in SHAPES:
        raise error("--model", name, f"a folder, a Hub name, or random: with one of {', '.join(SHAPES)}",
                    "--model random:opt-125m")
    architecture, shape = SHAPES[kind]
    off = dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "activation_dropout"), 0.0)
    config = AutoConfig.for_model(architecture, **shape, **off, **changes, pad_token_id=0, eos_token_id=1,
                                  bos_token_id=1)
    return auto_class.from_config(config, dtype=DTYPES[dtype]).eval()


class Work:
    """This rank's prompts and, where lengths are drawn, how long each response is."""

    def __init__(self, spec: dict, config, rank: int, device: torch.device):
        rng, B, new = np.random.default_rng((spec["seed"], rank)), spec["batch"], spec["new_tokens"]
        vocabulary, widths = config.vocab_size, [spec["prompt_tokens"]] * B
        eos, ids = config.eos_token_id, spec.get("prompt_ids")
        self.eos, self.pad = (eos[0] if isinstance(eos, list) else eos or 1), config.pad_token_id or 0
        if ids:
            chosen = [ids[int(i)][-spec["prompt_tokens"]:] for i in rng.integers(len(ids), size=B)]
            widths = [len(row) for row in chosen]
        limit = getattr(config, "max_position_embeddings", None) or 10**9
        if max(widths) + new > limit:
            raise error("--prompt-tokens and --new-tokens", f"{max(widths)} + {new}",
                        f"at most {limit} together, the model's positions", "--prompt-tokens 64 --new-tokens 64")
        self.prompts = torch.full((B, max(widths)), self.pad, device=device)
        self.mask = torch.zeros(self.prompts.shape, dtype=torch.bool, device=device)
        for row, width in enumerate(widths):
            tokens = np.array(chosen[row]) % vocabulary if ids else rng.integers(2, vocabulary, width)
            self.prompts[row, -width:] = torch.from_numpy(tokens)
            self.mask[row, -width:] = True
        self.lengths = torch.full((B,), new, device=device)
        if spec.get("response_lengths"):
            drawn = rng.choice(spec["response_lengths"], B)
            self.lengths = torch.from_numpy(np.clip(drawn, 1, new)).to(device)
        self.fixed, self.new, self.temperature = not spec.get("response_lengths"), new, spec["temperature"]

    def kit(self) -> tuple[KitRequest, KitSampling]:
        """As our engine takes it."""
        request = KitRequest(self.prompts, self.mask, row_seeds=torch.arange(len(self.prompts)),
                             row_lengths=None if self.fixed else self.lengths)
        stops = () if self.fixed else (self.eos,)
        return request, KitSampling(max_new_tokens=self.new, temperature=self.temperature, stop_token_ids=stops,
                                    pad_token_id=self.pad)

    def generate(self, model, sharded: bool, **how) -> torch.Tensor:
        """transformers' generate on the same work; it stops when every row has."""
        ends = [] if self.fixed else [_EndAt(self.lengths, self.prompts.shape[1], self.eos)]
        sample = dict(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        return model.generate(input_ids=self.prompts, attention_mask=self.mask.long(), max_new_tokens=self.new,
                              eos_token_id=None if self.fixed else self.eos, pad_token_id=self.pad, use_cache=True,
                              logits_processor=ends, synced_gpus=sharded,
                              **(sample if self.temperature else dict(do_sample=False)), **how)

    def cost(self, model) -> tuple[float, float]:
        """(floating-point operations, elements read) that have to happen at least once: see docs/performance.md."""
        (body, head, attention), config = weights_of(model), model.config
        P, A = self.mask.sum(1).double(), self.lengths.double()
        fed = P + A - 1  # the last token is never fed
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kv = 2 * attention * heads / config.num_attention_heads
        read = (body + head) * A.max() + (kv * (fed * (fed + 1) - P * (P + 1)) / 2).sum()
        return forward_flop(model, fed, A), float(read)


class _EndAt(LogitsProcessor):
    def __init__(self, lengths: torch.Tensor, width: int, eos: int):
        self.lengths, self.width, self.eos = lengths, width, eos

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.width + 1
        scores[:, self.eos] = float("-inf")
        scores[place >= self.lengths] = float("-inf")
        scores[place >= self.lengths, self.eos] = 0.0
        return scores


def peak_anon_mb(function) -> float:
    """Megabytes of anonymous memory that a call needs beyond what was held before it."""
    gc.collect()
    give_back_freed_memory()
    with PeakMemory() as memory:
        function()
    return memory.peak_mb - memory.before_mb


def roofline(dtype: str, device, before: dict[str, float] | None = None) -> dict[str, float]:
    """What this rank multiplies and reads a second, while the others do the same; the best of it and of `before`, since
    a shared machine is slow for seconds at a time."""
    memory = torch.zeros(2**26, device=device)
    dist.barrier()
    flops = matmul_peak(dtype, device, 2048)
    seconds = min(timed(memory.sum) for _ in range(4))
    found = {"matrix_gflops": flops / 1e9, "read_gb_per_s": 4 * 2**26 / seconds / 1e9}
    return {name: max(value, (before or {}).get(name, 0.0)) for name, value in found.items()}


def engines_of(spec: dict, work: Work, engine, sharded: bool) -> tuple[dict, HybridEngine]:
    """({name: call}, our engine); `hf` is {variant: call}, of which the fastest is taken."""
    def hf(attention: str, cache: str):
        def call() -> torch.Tensor:
            engine.module.set_attn_implementation(attention)
            static = dict(cache_implementation="static", disable_compile=True) if cache == "static" else {}
            return work.generate(engine.module, sharded, **static)
        return call

    def peer() -> None:
        engine.module.set_attn_implementation("sdpa")
        tokens = SimpleNamespace(pad_token_id=work.pad, eos_token_id=work.eos)
        HybridEngineRollout(engine, tokens).generate(
            RolloutRequest(work.prompts, work.mask.long()),
            SamplingConfig(max_new_tokens=work.new, temperature=work.temperature))
    hybrid = HybridEngine(engine, micro_batch_size=spec["batch"])
    every = {"kit": lambda: hybrid.generate(*work.kit()), "hf_default": hf("sdpa", "dynamic"), "deepspeed": peer,
             "hf": {f"{a} {c}": hf(a, c) for a, c in itertools.product(("sdpa", "eager"), ("dynamic", "static"))}}
    return {name: every[name] for name in spec["engines"]}, hybrid


def timed(function) -> float:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    start = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - start


def fastest(calls: dict) -> str:
    """Name of the call that takes least time, the same on every rank."""
    next(iter(calls.values()))()  # the first pays for what is warmed up
    warm = {name: timed(call) for name, call in calls.items()}
    choice = [min(warm, key=warm.get)]
    dist.broadcast_object_list(choice)
    return choice[0]


@torch.no_grad()
def same_greedy_tokens(module, work: Work) -> bool:
    """Ours against plain transformers on a few rows, both in fp32 with these weights."""
    model = Replica(module, torch.float32).fill()
    request = KitRequest(work.prompts[:4], work.mask[:4])
    sampling = KitSampling(max_new_tokens=min(16, work.new), temperature=0.0, pad_token_id=work.pad)
    model.set_attn_implementation(ATTENTION)
    slots = KVSlots(4, work.prompts.shape[1] + sampling.max_new_tokens)
    ours = decode(Slots(model, slots), request, sampling)
    model.set_attn_implementation("sdpa")
    plain = model.generate(input_ids=request.prompt_ids, attention_mask=request.prompt_attention_mask.long(),
                           do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=None,
                           pad_token_id=work.pad)
    return bool(torch.equal(ours.input_ids, plain))


def rollout(spec: dict) -> dict:
    """The JSON of `dschat bench rollout`."""
    device, rank = start_distributed(0), dist.get_rank()
    model = load_model(spec["model"], spec["dtype"])
    sharding = {"stage": spec["zero"]}
    if spec["zero"] == 3 and spec["live_parameters"] is not None:
        live = spec["live_parameters"]
        sharding |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live,
                     "stage3_param_persistence_threshold": min(live, 100_000)}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config={
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": sharding, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": spec["dtype"] == "bf16"}, "steps_per_print": 10**9})
    engine.module.eval()
    work = Work(spec, model.config, rank, device)
    calls, hybrid = engines_of(spec, work, engine, spec["zero"] == 3)
    variant, peaks, seconds, peak = None, {}, {name: [] for name in calls}, roofline(spec["dtype"], device)
    if "hf" in calls:
        variant = fastest(calls["hf"])
        calls["hf"] = calls["hf"][variant]
    for name, call in calls.items():  # also the warm-up of the others
        peaks[name] = peak_anon_mb(call)
    for _ in range(spec["repeats"]):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    flops, elements = work.cost(engine.module)
    peak = roofline(spec["dtype"], device, peak)
    totals = torch.tensor([float(work.lengths.sum()), flops, elements, *peak.values()], dtype=torch.float64,
                          device=device)
    dist.all_reduce(totals)
    useful, flops, elements, gflops, bandwidth = totals.tolist()
    found = {name: {"tokens_per_second": useful / float(np.median(times)), "seconds": float(np.median(times)),
                    "peak_anon_mb": peaks[name], "all_seconds": times} for name, times in seconds.items()}
    if {"hf", "hf_default"} <= set(found) and found["hf_default"]["seconds"] < found["hf"]["seconds"]:
        variant, found["hf"] = "sdpa dynamic", found["hf_default"]  # the warm-up had chosen another
    shares = {}
    if "kit" in found:
        spent = found["kit"]["seconds"]
        shares = {"share_of_matrix_peak": flops / spent / gflops / 1e9,
                  "share_of_bandwidth": elements * DTYPES[spec["dtype"]].itemsize / spent / bandwidth / 1e9}
    same = same_greedy_tokens(engine.module, work) if hybrid.path == "slots" else None
    return {"engines": found, "hf_variant": variant, "identical_greedy_tokens": same, "useful_tokens": useful,
            "path": hybrid.path, "reason": hybrid.reason,
            "roofline": {"matrix_gflops": gflops, "read_gb_per_s": bandwidth, **shares}}


def main(measure) -> None:
    """Run a measurement as one rank; the main rank writes what it returns beside the specification."""
    asked = next(Path(argument) for argument in sys.argv[1:] if argument.endswith(".json"))
    result = measure(json.loads(asked.read_text()))
    if dist.get_rank() == 0:
        write_json(asked.with_suffix(".result"), result)
    dist.barrier()


if __name__ == "__main__":
    main(rollout)
