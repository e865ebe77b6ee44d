"""Low-rank adapters (Hu et al. 2021, 2106.09685) through peft, on every linear layer except the heads.

The model keeps its class and its forward signature. What is exported are whole weights, the adapters merged into them,
and beside them the adapter in peft's own format.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dschat_kit.config import ConfigError, Lora

ACTOR = "default"
"""peft's name of a model's first adapter."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {"mixtral": ATTENTION, "qwen2_moe": ATTENTION, "qwen3_moe": ATTENTION}
"""Families where all linear layers would be wrong: a router that moves sends tokens to experts not trained for them."""


def add_adapters(model: nn.Module, settings: Lora, seed: int, adapter: str = ACTOR) -> nn.Module:
    """Freeze `model` (causal or scalar) in place and add adapters: they and a scalar head are all that is trained.

    The second matrix starts at 0, so nothing changes before the first step. Rank 0 leaves the model as it is. Raises
    ConfigError when a target of lora.targets matches no module.
    """
    if settings.rank == 0:
        return model
    from peft import inject_adapter_in_model
    pretrained = getattr(model, "classifier", model)
    named = [name.strip() for name in settings.targets.split(",")]
    targets = named if settings.targets != "auto" else TARGETS.get(pretrained.config.model_type, "all-linear")
    config = _config(settings, targets, scalar=pretrained is not model)
    if settings.targets != "auto":
        there = _linear_names(pretrained)
        if set(named) - set(there):
            raise ConfigError(f"lora.targets: got {', '.join(sorted(set(named) - set(there)))}, which match no module\n"
                              f"  expected: some of {', '.join(there)}\n"
                              "  change:   --set lora.targets=auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, pretrained, adapter_name=adapter)
    if pretrained is not model:
        pretrained.score.requires_grad_(True)
    return model


def _config(settings: Lora, targets: str | list[str], scalar: bool):
    from peft import LoraConfig
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=targets,
                      exclude_modules=["score"] if scalar else None)


def _linear_names(model: nn.Module) -> list[str]:
    """Of the layers that may have adapters. A head may not: its weight can be the embeddings' too."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D
    heads = (getattr(model, "score", None), model.get_output_embeddings())
    return sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules()
                   if isinstance(layer, (nn.Linear, Conv1D, LoraLayer)) and layer not in heads})


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> layer, of those with adapters."""
    from peft.tuners.lora import LoraLayer
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def use_adapters(layers: dict[str, nn.Module], adapters: list[str]) -> None:
    """Let the layers compute with those adapters alone. peft's own switch would also change what is trained."""
    for layer in layers.values():
        layer._active_adapter = adapters


def merged_weight(layer: nn.Module, base: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """W + alpha / rank * B A of one adapted layer from W, A and B, computed in fp32 and rounded as W is."""
    change = second.float() @ first.float() * layer.scaling[ACTOR]
    return (base.float() + (change.T if layer.fan_in_fan_out else change)).to(base.dtype)


def merge_adapters(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model`, or of some of its layers, without adapters: each weight becomes its `merged_weight`.

    Works on gathered weights, so it does not matter how `model` itself is sharded. Adapters of other roles are dropped.
    """
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if "lora_" not in name}
    for name, layer in adapted_layers(model).items():
        if f"{name}.base_layer.weight" in state:
            factors = (state[f"{name}.lora_{side}.{ACTOR}.weight"] for side in "AB")
            merged[f"{name}.weight"] = merged_weight(layer, merged[f"{name}.weight"], *factors)
    return merged


def save_adapter(model: nn.Module, settings: Lora, state: dict[str, Tensor], base: str, folder: Path) -> None:
    """The adapter of `model` as peft reads it: PeftModel.from_pretrained(the model in `base`, folder). A scalar head is
    among it (`modules_to_save`)."""
    layers, scalar = adapted_layers(model), hasattr(model, "score")
    config = _config(settings, sorted({name.rsplit(".", 1)[-1] for name in layers}), scalar)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type, config.modules_to_save = ("SEQ_CLS", ["score"]) if scalar else ("CAUSAL_LM", None)
    config.fan_in_fan_out = any(layer.fan_in_fan_out for layer in layers.values())
    names = [f"{name}.lora_{side}.{ACTOR}.weight" for name in layers for side in "AB"]
    found = {name: state[name] for name in names + (["score.weight"] if scalar else [])}
    config.save_pretrained(folder)
    save_file({f"base_model.model.{name.replace(f'.{ACTOR}.', '.')}": value.contiguous()
               for name, value in found.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
