"""The only file that knows how ZeRO holds parameters: sharded loading, gathering, and each rank's own fp32 part."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_grad
from torch import Tensor, nn

from dschat_kit.config import Pipeline
from dschat_kit.engine.engines import frozen_config

__all__ = ["clear_gradients", "full_state_dict", "gathered", "owned_parts", "sharded_loading"]


@contextmanager
def sharded_loading(pipeline: Pipeline, source: str | Path):
    """Inside, transformers' `from_pretrained` shards each layer as it is made and filled where ZeRO-3 is asked for:
    rank 0 maps the file, no rank ever holds the whole model. Random weights, small and drawn alike under every stage,
    are sharded afterwards."""
    if pipeline.zero.stage < 3 or str(source) == "scratch":
        yield
        return
    from transformers.integrations import deepspeed as integration
    kept = integration.HfDeepSpeedConfig(frozen_config(pipeline))  # transformers sees it through a weak reference
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del kept


@contextmanager
def gathered(*parameters: nn.Parameter):
    """Whole parameters inside; what rank 0 writes is kept where they are sharded, so all have to write the same."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0) if sharded else nullcontext():
        yield


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


def full_state_dict(module: nn.Module, is_main: bool) -> dict[str, torch.Tensor]:
    """Whole weights of `module` on the CPU of the main rank; other ranks get {}.

    Every rank has to call it: under ZeRO-3 each parameter is gathered for a moment, one at a time. Tied weights stay
    one tensor with two names.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return {name: value.detach().cpu() for name, value in module.state_dict().items()} if is_main else {}
    state, whole = {}, {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main:
                if id(parameter) not in whole:
                    whole[id(parameter)] = parameter.detach().cpu().clone()
                state[name] = whole[id(parameter)]
    if is_main:
        persistent = module.state_dict()
        state |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in persistent}
    return state
