"""The only file that knows how ZeRO-3 holds parameters."""

import torch
from torch import nn

__all__ = ["full_state_dict"]


def full_state_dict(module: nn.Module, is_main: bool) -> dict[str, torch.Tensor]:
    """Whole weights of `module` on the CPU of the main rank; other ranks get {}.

    Every rank has to call it: under ZeRO-3 each parameter is gathered for a moment, one at a time.
    """
    import deepspeed
    sharded = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    if not sharded:
        return {name: value.detach().cpu() for name, value in module.state_dict().items()} if is_main else {}
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    if is_main:
        state |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in module.state_dict()}
    return state
