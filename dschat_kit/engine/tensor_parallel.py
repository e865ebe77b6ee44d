"""Generation with the weights of every layer split over a few ranks (Shoeybi et al. 2019, 1909.08053, section 3).

Of a pair of matrices the first is split by output, the second by input; each rank has its heads and its part of the
feed-forward width, and the second product is summed over the group. Embeddings, norms and the head are whole. The ranks
of a group decode the same rows from the same sums, so they sample the same tokens.

DeepSpeed's AutoTP splits a module in place and once, from whole weights; the replica is filled anew in every rollout,
from shards, so it splits by the same rule what it copies.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dschat_kit.engine.rollout_types import KitBatch, KitRequest
from dschat_kit.feasible import check_split
from dschat_kit.runs import RunError

SECOND = ("o_proj", "out_proj", "down_proj", "fc2")


class SummedLinear(nn.Linear):
    """The second matrix of a pair: holds a part of the inputs, gives the sum over the group."""

    group = None

    def forward(self, input: Tensor) -> Tensor:
        """input (..., its part) -> (..., all outputs)."""
        product = nn.functional.linear(input, self.weight)
        dist.all_reduce(product, group=self.group)
        return product if self.bias is None else product + self.bias


class TensorParallel:
    """This rank's group of `size` consecutive ranks, and its part of each weight; every rank has to build it.

    Raises ConfigError for a family or heads that cannot be split so, RunError for such a number of ranks.
    """

    def __init__(self, size: int, config):
        world = dist.get_world_size()
        check_split(size, config.to_dict())
        if world % size:
            raise RunError(f"rollout.inference_tp_size={size}: got {world} ranks\n  expected: a multiple of {size}\n"
                           "  change: rollout.inference_tp_size=1")
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        self.size, self.place, self.group = size, dist.get_rank() % size, groups[dist.get_rank() // size]
        self._dimension: dict[str, int] = {}

    def split(self, model: nn.Module) -> None:
        """Make `model`, whose weights are on the meta device, one that holds this rank's parts."""
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        stem = next(name for name, module in model.named_modules() if module is layers)
        for name, module in layers.named_modules(prefix=stem):
            if type(module) is nn.Linear:
                second = name.rpartition(".")[2] in SECOND
                if second:
                    module.__class__, module.group = SummedLinear, self.group
                self._dimension[f"{name}.weight"] = int(second)
                if not second:
                    self._dimension[f"{name}.bias"] = 0
            elif isinstance(getattr(module, "num_heads", None), int):
                module.num_heads //= self.size
        for name, parameter in model.named_parameters():
            parameter.data = self.part(name, parameter.data)

    def part(self, name: str, weight: Tensor) -> Tensor:
        """This rank's part of a whole weight of the replica, in memory of its own; what is not split comes as it is."""
        dimension = self._dimension.get(name)
        return weight if dimension is None else weight.chunk(self.size, dimension)[self.place].clone()

    def union(self, request: KitRequest) -> KitRequest:
        """The prompts of the whole group, in the order of its ranks."""
        found: list = [None] * self.size
        mine = (request.prompt_ids, request.prompt_attention_mask, request.row_seeds, request.row_lengths)
        dist.all_gather_object(found, [None if part is None else part.cpu() for part in mine], group=self.group)
        ids, masks, seeds, lengths = zip(*found, strict=True)
        width, self._rows = max(part.shape[1] for part in ids), [len(part) for part in ids]
        whole = [torch.cat([nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]).to(mine[0].device)
                 for parts in (ids, masks)]
        return KitRequest(*whole, *(None if parts[0] is None else torch.cat(parts) for parts in (seeds, lengths)))

    def own(self, batch: KitBatch, request: KitRequest) -> KitBatch:
        """This rank's rows of the batch that answers `union(request)`, as if it had decoded them alone."""
        copies = len(batch.input_ids) // sum(self._rows)
        first = copies * sum(self._rows[:self.place])
        rows = slice(first, first + copies * self._rows[self.place])
        used = int(batch.response_mask[rows].sum(1).max())
        cut = batch.input_ids.shape[1] - batch.response_mask.shape[1] - request.prompt_ids.shape[1]
        end = cut + request.prompt_ids.shape[1] + used
        return KitBatch(batch.input_ids[rows, cut:end], batch.attention_mask[rows, cut:end],
                        batch.response_start_idx[rows] - cut, batch.response_mask[rows, :used],
                        batch.logprobs[rows, :used], batch.entropy[rows, :used], batch.finished[rows])
