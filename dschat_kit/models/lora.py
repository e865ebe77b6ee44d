"""Low-rank adapters (Hu et al. 2021, 2106.09685) through peft, on every linear layer except the heads.

The model keeps its class and its forward signature. What is exported are whole weights, the adapters merged into them.
"""

import torch
from torch import Tensor, nn

from dschat_kit.config import Lora

__all__ = ["add_adapters", "merge_adapters"]


def add_adapters(model: nn.Module, settings: Lora, seed: int) -> nn.Module:
    """Freeze `model` (causal or scalar) in place and add adapters: they and a scalar head are all that is trained.

    The second matrix starts at 0, so nothing changes before the first step. Rank 0 leaves the model as it is.
    """
    if settings.rank == 0:
        return model
    from peft import LoraConfig, inject_adapter_in_model
    pretrained = getattr(model, "classifier", model)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear",
                        exclude_modules=None if pretrained is model else ["score"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, pretrained)
    if pretrained is not model:
        pretrained.score.requires_grad_(True)
    return model


def merge_adapters(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `model` without adapters: each weight W becomes W + alpha / rank * B A, computed in fp32.

    Works on gathered weights, so it does not matter how `model` itself is sharded.
    """
    from peft.tuners.lora import LoraLayer
    merged = dict(state)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            first, second = (merged.pop(f"{name}.lora_{side}.default.weight").float() for side in "AB")
            change = second @ first * layer.scaling["default"]
            base = merged.pop(f"{name}.base_layer.weight")
            merged[f"{name}.weight"] = (base.float() + (change.T if layer.fan_in_fan_out else change)).to(base.dtype)
            if f"{name}.base_layer.bias" in merged:
                merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged
