"""The hybrid engine: one model that trains under ZeRO and generates, behind DeepSpeed's RolloutEngine interface.

A rollout gathers the weights once into a replica (engine/replica.py), decodes with memory that the engine owns
(engine/decode.py), and lets go of both where the configuration asks for it. What DeepSpeed holds is only read. Where
the replica does not fit, weights are gathered in every step (engine/streamed.py).
"""

import os
from contextlib import nullcontext
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.rollout.base import RolloutEngine, RolloutRequest, SamplingConfig

from dschat_kit.engine.attention import ATTENTION, FAMILIES, KVSlots, UnknownAttention, kv_bytes_per_token
from dschat_kit.engine.decode import Plain, Slots, decode
from dschat_kit.engine.graphs import GraphedSlots
from dschat_kit.engine.parity import TOLERANCE, first_difference
from dschat_kit.engine.replica import Replica
from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling
from dschat_kit.engine.streamed import Streamed
from dschat_kit.engine.tensor_parallel import TensorParallel
from dschat_kit.machine import available_memory, detect, give_back_freed_memory
from dschat_kit.models.loading import accepts
from dschat_kit.runs import RunError


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may take; ranks on one host share its memory. On a GPU also those that torch keeps after
    training has let go of them: the driver calls them taken."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1  # of torchrun, of DeepSpeed
    return available_memory() // int(ranks)


class HybridEngine(RolloutEngine):
    """Generates with the weights that are being trained.

    `micro_batch_size` responses are decoded at a time. `release_inference_cache` frees replica and KV memory after
    each rollout; without it both stay for the next. `max_out_tokens` bounds prompt and response together (0: the
    model's positions do), as in DeepSpeed. `cuda_graphs` captures decode steps. `inference_tp_size` ranks
    share the weights of generation and each other's prompts. `gather` says when ZeRO-3's weights are gathered: once a
    "rollout", in every "step", or what fits ("auto"). `path` says how steps are computed, `reason` why.
    """
    name = "dschat_kit"

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, micro_batch_size: int,
                 release_inference_cache: bool = True, max_out_tokens: int = 0, cuda_graphs: bool = False,
                 inference_tp_size: int = 1, gather: str = "auto"):
        self.cuda_graphs, self._steps = cuda_graphs, None
        self.engine, self.slots, self.max_out_tokens = engine, micro_batch_size, max_out_tokens
        self.release_inference_cache, self._kv, self._checked = release_inference_cache, None, False
        module = engine.module
        if not accepts(module, "past_key_values"):
            raise RunError(f"{type(module).__name__} has no cache of keys and values\n"
                           "  expected: a causal language model that takes past_key_values\n  change: model.name")
        dtype = next(module.parameters()).dtype
        if dtype == torch.bfloat16 and engine.device.type == "cpu" and not detect().bf16:
            dtype = torch.float32  # emulated bf16 is several times slower, and no more exact
        self.parallel = TensorParallel(inference_tp_size, module.config) if inference_tp_size > 1 else None
        self.replica, family = Replica(module, dtype, self.parallel), module.config.model_type
        self._plain_attention = module.config._attn_implementation
        sharded = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
        self.streamed, self.gather = Streamed(module, engine.device), gather if sharded else "rollout"
        known = family in FAMILIES
        self.path = "slots" if known else "plain"
        self.reason = f"{family} is known" if known else f"{family} is not one of {', '.join(FAMILIES)}"

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> KitBatch:
        """Sample responses to this rank's prompts. Every rank has to call it; what is wrong on one is raised on all.
        DeepSpeed's own types will do: seeds are then drawn from torch's generator, and the model says what EOS is."""
        request, sampling = KitRequest.of(request, sampling), KitSampling.of(sampling, self.engine.module)
        self._agree(self._problem(request, sampling))
        asked = self.parallel.union(request) if self.parallel else request
        try:
            with self.streamed if self._streams() else nullcontext(self.replica.fill()) as model:
                if not self._checked and self.path == "slots":
                    self._check(model, asked)
                batch, problem = self._decode(model, asked, sampling), None
            if self.parallel:
                batch = self.parallel.own(batch, request)
        except RunError as error:  # of the decode loop, on this rank: the others have to hear of it
            batch, problem, self._kv, self._steps = None, error, None, None
        finally:
            if self.release_inference_cache:
                self.shutdown()
        self._agree(problem)
        return batch

    def _decode(self, model, request: KitRequest, sampling: KitSampling) -> KitBatch:
        rows = request.prompt_ids.shape[0] * sampling.n_samples_per_prompt
        slots = min(rows, max(sampling.continuous_batch_size or self.slots, sampling.n_samples_per_prompt))
        if self.path == "plain":
            model.set_attn_implementation(self._plain_attention)
            return decode(Plain(model, slots), request, sampling)
        model.set_attn_implementation(ATTENTION)
        longest = int(request.prompt_attention_mask.sum(1).max()) + sampling.max_new_tokens
        if self._kv is None or self._kv.slots < slots or self._kv.length < longest:
            self._kv = None
            self._check_memory(slots, longest)
            self._kv = KVSlots(slots, longest)
            graphs = self.cuda_graphs and model is not self.streamed  # which stops for the other ranks
            self._steps = (GraphedSlots(model, self._kv, request.prompt_ids.device) if graphs else
                           Slots(model, self._kv))
        self._kv.clear()  # an interrupted rollout may have left rows
        try:
            return decode(self._steps, request, sampling)
        except RunError as error:  # it names a row, of all that the group decodes
            raise RunError(f"rows of {self.parallel.size} ranks: {error}") if self.parallel else error from None

    def _check(self, model, request: KitRequest) -> None:
        """The first prompts, greedily, against plain transformers; another answer on any rank means the plain path from
        now on, on all."""
        if self.parallel:
            self._agree(self._split_problem(model, request))
        try:
            difference = (self.streamed.difference if model is self.streamed else partial(first_difference, model))(
                request)
        except RunError:  # no finite logits: the rollout itself says it, with the right row
            difference = ""
        except UnknownAttention as error:
            difference = f"the model has {error}"
        found = self._of_all(difference)
        self._checked = "" not in found
        wrong = next((f"rank {rank}: {text}" if len(found) > 1 else text for rank, text in enumerate(found) if text),
                     None)
        self.path = "plain" if wrong else "slots"
        self.reason = wrong or "greedy answers are those of plain transformers, to rounding"
        if not self._checked:
            return
        print(f"rollout: path {self.path}: {self.reason}", flush=True)

    @torch.no_grad()
    def _split_problem(self, model, request: KitRequest) -> RunError | None:
        """Weights split over ranks have to give the logits of the module that is trained."""
        ids = request.prompt_ids[:1, request.prompt_attention_mask[0].bool()]
        model.set_attn_implementation(self._plain_attention)
        split, whole = (found(input_ids=ids).logits[:, -1].float() for found in (model, self.engine.module))
        error = float((split - whole).abs().max() / whole.abs().max())
        if error <= TOLERANCE[whole.dtype if self.replica.dtype == torch.float32 else self.replica.dtype]:
            return None
        return RunError(f"rollout.inference_tp_size={self.parallel.size}: split weights give other logits, by "
                        f"{error:.2g} of the largest\n  change: rollout.inference_tp_size=1")

    def _problem(self, request: KitRequest, sampling: KitSampling) -> RunError | None:
        if not len(request.prompt_ids):
            return RunError("got no prompts on this rank\n  expected: at least one\n"
                            "  change: ppo.rollout_batch_size, or the number of ranks")
        if not request.prompt_attention_mask.any(1).all():
            row = int((~request.prompt_attention_mask.bool().any(1)).nonzero()[0])
            return RunError(f"prompt {row} is empty\n  expected: at least one token\n  change: the prompts")
        if sampling.temperature > 0 and request.row_seeds is None:
            return RunError("got no row_seeds\n  expected: one a prompt\n  change: give them, or temperature=0")
        mask, lengths = request.prompt_attention_mask.bool(), request.row_lengths
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            return RunError("got prompts with padding behind their tokens\n  expected: padding on the left")
        if lengths is not None:
            rows = len(mask) * sampling.n_samples_per_prompt
            if lengths.shape != (rows,) or lengths.min() < 1 or lengths.max() > sampling.max_new_tokens:
                return RunError(f"row_lengths: got shape {tuple(lengths.shape)} of {lengths.min()} to {lengths.max()}\n"
                                f"  expected: ({rows},) of 1 to {sampling.max_new_tokens}, max_new_tokens")
            if not sampling.stop_token_ids:
                return RunError("row_lengths: got no stop token\n  expected: one, with which the rows end")
        longest, new = int(mask.sum(1).max()), sampling.max_new_tokens
        limit = min(self.max_out_tokens or 10**9, getattr(self.replica.model.config, "max_position_embeddings", 10**9))
        if longest + new > limit:
            return RunError(f"a prompt of {longest} tokens and {new} new ones make {longest + new}\n"
                            f"  expected: at most {limit}, the model's positions or rollout.max_out_tokens\n"
                            "  change: data.max_prompt_tokens, sampling.max_new_tokens or rollout.max_out_tokens")
        return None

    def _streams(self) -> bool:
        """Whether weights are gathered in every step, the same on every rank."""
        if self.gather != "auto" or self.parallel:
            return self.gather == "step"
        needed = self.replica.needed_bytes()
        free = self._free(needed)
        if needed > free:
            self.gather = "step"
            print(f"rollout: the whole weights do not fit on every rank ({needed / 2**30:.1f} GB of {free / 2**30:.1f} "
                  "GB free), so they are gathered in every step", flush=True)
        return needed > free

    def _free(self, needed: int, group=None, alone: bool = False) -> int:
        """Bytes that each rank of the group (`alone`: this one) may take. Where `needed` are more, all have given back
        what glibc keeps."""
        for attempt in range(2):
            free = torch.tensor(free_memory(self.engine.device), device=self.engine.device)
            if not alone:
                dist.all_reduce(free, dist.ReduceOp.MIN, group=group)
            if needed <= free or attempt:
                break
            give_back_freed_memory()
            if not alone:
                dist.barrier(group=group)
        return int(free)

    def _check_memory(self, slots: int, length: int) -> None:
        row = length * kv_bytes_per_token(self.replica.model.config, self.replica.dtype)
        row //= self.parallel.size if self.parallel else 1
        # Ranks that share weights wait for one another in every layer: all of them have to raise.
        free = self._free(slots * row, self.parallel and self.parallel.group, alone=not self.parallel)
        if slots * row > free:
            raise RunError(f"keys and values of {slots} rows of {length} tokens take {slots * row / 2**30:.1f} GB\n"
                           f"  expected: at most {free / 2**30:.1f} GB, which {free // row} rows would fit\n"
                           f"  change: rollout.micro_batch_size={max(free // row, 1)}")

    def _agree(self, problem: RunError | None) -> None:
        """Raise on every rank what is wrong on any."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            if problem:
                raise problem
            return
        wrong = torch.tensor(int(problem is not None), device=self.engine.device)
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        if not wrong:
            return
        for rank, text in enumerate(self._of_all(problem and str(problem))):
            if text:
                raise RunError(f"rank {rank}: {text}")

    @staticmethod
    def _of_all(text: str | None) -> list[str | None]:
        """What every rank says, in their order."""
        if not dist.is_initialized():
            return [text]
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, text)
        return found

    def sync_weights(self, step: int) -> None:
        """Nothing to do: each rollout brings the replica up to date."""

    def shutdown(self) -> None:
        """Free the KV memory and every weight that the replica does not share."""
        self.replica.release()
        self._kv = self._steps = None
