"""The only file that knows how ZeRO holds parameters: sharded loading, gathering, and each rank's own fp32 part."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_grad
from torch import Tensor, nn

from dschat_kit.config import Pipeline
from dschat_kit.engine.engines import frozen_config

LAYER = re.compile(r".*?\.\d+\.|.*?(?=\.base_layer\.|\.lora_|\.[^.]+$)|.*")
"""What names of one layer begin with; outside of the layers, those of one module and its adapters."""


@contextmanager
def sharded_loading(pipeline: Pipeline, source: str | Path):
    """Inside, a model is sharded layer by layer as it is made where ZeRO-3 is asked for, so that no rank ever holds the
    whole of it: transformers' `from_pretrained` fills each layer from the file that rank 0 maps, and random weights
    (`scratch`) are those of the other stages."""
    if pipeline.zero.stage < 3:
        yield
        return
    from transformers.integrations import deepspeed as integration
    if str(source) == "scratch":
        with (_drawn_in_parts(), integration.prevent_arange_dtype_change(),
              deepspeed.zero.Init(config_dict_or_path=frozen_config(pipeline))):
            yield
        return
    kept = integration.HfDeepSpeedConfig(frozen_config(pipeline))  # transformers sees it through a weak reference
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del kept


@contextmanager
def _drawn_in_parts():
    """Inside, transformers draws the weights of one module at a time while that module is whole. Its own way at ZeRO-3
    skips torch's first draws, and so has other numbers than without sharding."""
    from transformers import PreTrainedModel
    draw = PreTrainedModel._initialize_weights

    def draw_whole(model: nn.Module, module: nn.Module, *custom) -> None:
        with gathered(*(p for part in (module, *module.children()) for p in part.parameters(recurse=False)), writer=0):
            draw(model, module, *custom)

    PreTrainedModel._initialize_weights = draw_whole
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = draw


def gathered(*tensors: Tensor, writer: int | None = None):
    """A context in which those that ZeRO-3 has sharded are whole. What the rank `writer` writes inside is kept."""
    return deepspeed.zero.GatheredParameters(tensors, modifier_rank=writer)


def owned_parts(trained: dict[str, nn.Parameter]) -> dict[str, tuple[Tensor, int]]:
    """name -> (this rank's part of a trained parameter, where it begins in the flattened parameter), in fp32 where the
    optimiser keeps fp32 weights. The parts of all ranks make up the parameter, without overlap under every stage."""
    rank, world_size, parts = dist.get_rank(), dist.get_world_size(), {}
    for name, parameter in trained.items():
        if hasattr(parameter, "ds_id"):
            part = safe_get_local_fp32_param(parameter).flatten()
            start = rank * part.numel()  # the last part is padded to the length of the others
            part = part[:max(parameter.ds_numel - start, 0)]
        elif hasattr(parameter, "_hp_mapping"):
            if parameter._hp_mapping is None:  # wholly another rank's
                continue
            part, start = parameter._hp_mapping.hp_fragment, parameter._hp_mapping.lp_fragment_address.start
        else:
            part, size = parameter.detach().flatten(), -(-parameter.numel() // world_size)
            part, start = part[rank * size:(rank + 1) * size], rank * size
        if part.numel():
            parts[name] = (part, start)
    return parts


def clear_gradients(parameters: list[nn.Parameter]) -> None:
    """Empty the gradient shards of parameters that get none in the first backward pass of the next step: ZeRO-3 would
    add to what is left of this one."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            safe_set_local_grad(parameter, torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device))


def whole_layers(module: nn.Module, keep: bool) -> Iterator[dict[str, Tensor]]:
    """The state dict of `module` in parts: one decoder layer after another, outside of them one module.

    Every rank has to take all of them: under ZeRO-3 a layer is gathered when it is asked for, so no rank ever holds the
    whole model. `keep` makes copies on the CPU; without it a layer is whole only until the next one is asked for.
    Tied weights come together, one tensor with several names.
    """
    names: dict[int, list[str]] = {}
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in names:
            layers.setdefault(LAYER.match(name).group(), []).append(tensor)
        names.setdefault(id(tensor), []).append(name)
    for tensors in layers.values():
        with gathered(*tensors):
            whole = {}
            for tensor in tensors:
                value = tensor.detach().to("cpu", copy=hasattr(tensor, "ds_id")) if keep else tensor.detach()
                whole |= dict.fromkeys(names[id(tensor)], value)
            yield whole


def full_state_dict(module: nn.Module, is_main: bool) -> dict[str, Tensor]:
    """All of `whole_layers` at once on the CPU of the main rank, for small models; other ranks get {}. Collective."""
    return {name: value for layer in whole_layers(module, is_main) for name, value in layer.items() if is_main}
