"""The only file that knows how ZeRO-3 holds parameters."""

import deepspeed
import torch
from torch import nn

__all__ = ["full_state_dict"]


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
