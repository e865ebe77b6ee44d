"""One model that trains under ZeRO and generates: the actor behind DeepSpeed's RolloutEngine interface."""

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.rollout.base import RolloutEngine

from dschat_kit.engine.decode import decode
from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling

__all__ = ["HybridEngine", "join_batches"]


class HybridEngine(RolloutEngine):
    """Generates with the weights that are being trained; leaves the module in the mode in which it was found."""
    name = "dschat_kit"

    def __init__(self, engine: deepspeed.DeepSpeedEngine, *, micro_batch_size: int):
        self.engine, self.micro_batch_size = engine, micro_batch_size
        self._sharded = engine.zero_optimization_stage() == 3

    def generate(self, request: KitRequest, sampling: KitSampling) -> KitBatch:
        """Sample one response a prompt. Under ZeRO-3 every rank has to bring the same number of prompts."""
        training = self.engine.module.training
        self.engine.module.eval()
        try:
            parts = [decode(self.engine.module, part, sampling, self._keep_going)
                     for part in _slices(request, self.micro_batch_size)]
        finally:
            self.engine.module.train(training)
        return join_batches(parts, sampling)

    def sync_weights(self, step: int) -> None:
        """Nothing to do: training and generation share their parameters."""

    def _keep_going(self, unfinished: bool) -> bool:
        if not self._sharded:
            return unfinished
        flag = torch.tensor([float(unfinished)], device=self.engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _slices(request: KitRequest, size: int):
    for start in range(0, request.prompt_ids.shape[0], size):
        rows = slice(start, start + size)
        yield KitRequest(prompt_ids=request.prompt_ids[rows], prompt_attention_mask=request.prompt_attention_mask[rows],
                         row_seeds=None if request.row_seeds is None else request.row_seeds[rows])


def join_batches(parts: list[KitBatch], sampling: KitSampling) -> KitBatch:
    """One batch of several with the same prompt width, padded on the right to the longest response."""
    width = max(part.response_mask.shape[1] for part in parts)

    columns = {"input_ids": sampling.pad_token_id, "attention_mask": 0, "response_mask": 0, "logprobs": 0}
    joined = {name: torch.cat([F.pad(getattr(part, name), (0, width - part.response_mask.shape[1]), value=fill)
                               for part in parts]) for name, fill in columns.items()}
    return KitBatch(**joined,
                    finished=torch.cat([part.finished for part in parts]),
                    response_start_idx=torch.cat([part.response_start_idx for part in parts]))
