"""Linear layers whose weight lies in the order in which oneDNN's kernels on a CPU read it."""

from collections import Counter

import torch
from torch import Tensor, nn

from dschat_kit.machine import detect

LEAST = 2**16
"""Entries of an fp32 weight from which on packing is worth its call (256 x 256: 20 us either way); in bf16 it always
is."""


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight; otherwise every call brings the weight into that
    order, or reads it in a worse one. No gradient."""

    packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input @ weight.T + bias."""
        if self.packed is None:
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")

    def pack(self) -> None:
        """Has to be called whenever the weight has changed."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)


def packable(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[PackedLinear]:
    """Layers of a model that will have this dtype and device, ready to be packed; none where that is not possible."""
    mkldnn = torch.ops.mkldnn
    if not (device.type == "cpu" and torch.backends.mkldnn.is_available()
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and detect().bf16))
            and hasattr(mkldnn, "_reorder_linear_weight") and hasattr(mkldnn, "_linear_pointwise")):
        return []
    least = LEAST if dtype == torch.float32 else 0
    found = [module for module in model.modules() if type(module) is nn.Linear and module.weight.numel() >= least]
    for module in found:
        module.__class__ = PackedLinear
    return found


def pack(model: nn.Module) -> nn.Module:
    """`model`, which from now on can only compute: its weights are packed, and no others are kept, but where they are
    sharded or another layer shares them."""
    first = next(model.parameters())
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in packable(model, first.dtype, first.device):
        if users[id(module.weight)] == 1 and not hasattr(module.weight, "ds_id"):
            module.pack()
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    return model
