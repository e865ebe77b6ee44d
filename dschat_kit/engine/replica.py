"""The rollout replica: a plain copy of the trained module without hooks, whose weights are whole and adapters fused.

Below ZeRO-3 it shares every weight that it does not have to change (a CPU has packed copies beside them); at ZeRO-3 the
shards are gathered once a rollout, layer by layer. The trained module is only read: nothing has to be undone, and its
parameters, shards and `requires_grad` are what they were whatever happens.
"""

import copy
import re

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dschat_kit.engine.attention import take_slots
from dschat_kit.engine.tensor_parallel import TensorParallel
from dschat_kit.engine.zero import LAYER, gathered
from dschat_kit.models.lora import ACTOR, merged_weight
from dschat_kit.models.packed import packable


class Replica:
    """`model` is ready between `fill` and `release`, in `dtype` on the device of the source.

    Every rank has to call `fill` at ZeRO-3, where it needs the memory of the whole model; with `parallel`, of this
    rank's part of it.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype, parallel: TensorParallel | None = None):
        self.source, self.dtype, self.parallel = source, dtype, parallel
        config = copy.deepcopy(source.config)
        with torch.device("meta"):
            self.model = take_slots(type(source)(config).eval().requires_grad_(False))
        if parallel:
            parallel.split(self.model)
        self._bytes = sum(parameter.numel() for parameter in self.model.parameters()) * dtype.itemsize
        config.pad_token_id = None  # some families look for it among the tokens of every step, to warn: a wait on a GPU
        self.model.generation_config = GenerationConfig()  # a folder's own may hold penalties, which nobody asked for
        self._places: dict[str, list[str]] = {}  # name in the source -> names in the replica; tied weights have several
        first: dict[int, str] = {}
        parameters = dict(source.named_parameters(remove_duplicate=False))
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            own = name if name in parameters else re.sub(r"\.(weight|bias)$", r".base_layer.\1", name)
            self._places.setdefault(first.setdefault(id(parameters[own]), own), []).append(name)
        self._parameters = parameters
        self._packed = packable(self.model, dtype, next(iter(parameters.values())).device)

    def needed_bytes(self) -> int:
        """Memory that `fill` would take for whole weights: none for those that it still holds."""
        held = not next(self.model.parameters()).is_meta
        return 0 if held else self._bytes * (2 if self._packed else 1)

    def fill(self) -> nn.Module:
        """Bring every weight up to date: shared where nothing is to be computed, copied elsewhere."""
        for name, buffer in self.source.named_buffers():
            module, leaf = _inside(self.model, name.replace(".base_layer.", "."))
            if leaf in module._buffers:
                module._buffers[leaf] = buffer
        for names in self._groups():
            involved = [self._parameters[part] for name in names for part in (name, *self._adapter(name))]
            sharded = any(hasattr(parameter, "ds_id") for parameter in involved)
            with gathered(*involved):
                for name in names:
                    self._set(name, self._whole(name), lasting=not sharded)
        for module in self._packed:
            module.pack()
        return self.model

    def release(self) -> None:
        """Let go of every weight; sizes and layout stay."""
        for module in self._packed:
            module.packed = None
        for names in self._places.values():
            for name in names:
                module, leaf = _inside(self.model, name)
                weight = getattr(module, leaf)
                setattr(module, leaf, nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))

    def _groups(self) -> list[list[str]]:
        """Names by decoder layer, so that at ZeRO-3 one layer is gathered at a time."""
        groups: dict[str, list[str]] = {}
        for name in self._places:
            groups.setdefault(LAYER.match(name).group(), []).append(name)
        return list(groups.values())

    def _adapter(self, name: str) -> list[str]:
        """Names of the low-rank factors that belong to a weight; [] when there are none."""
        stem = name.removesuffix(".base_layer.weight")
        names = [f"{stem}.lora_{side}.{ACTOR}.weight" for side in "AB"]
        return names if stem != name and names[0] in self._parameters else []

    def _whole(self, name: str) -> Tensor:
        weight, adapter = self._parameters[name].detach(), self._adapter(name)
        if adapter:
            layer = self.source.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = merged_weight(layer, weight, *(self._parameters[part].detach() for part in adapter))
        weight = weight.to(self.dtype)
        return self.parallel.part(self._places[name][0], weight) if self.parallel else weight

    def _set(self, name: str, weight: Tensor, lasting: bool) -> None:
        """`lasting`: the source's memory stays what it is, so that it can be shared."""
        module, leaf = _inside(self.model, self._places[name][0])
        there, own = getattr(module, leaf), weight.data_ptr() != self._parameters[name].data_ptr()
        if not (lasting and not own) and there.device == weight.device and there.dtype == weight.dtype:
            there.data.copy_(weight)  # kept since the last rollout
            return
        parameter = nn.Parameter(weight if own or lasting else weight.clone(), requires_grad=False)
        for place in self._places[name]:
            module, leaf = _inside(self.model, place)
            setattr(module, leaf, parameter)


def _inside(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
