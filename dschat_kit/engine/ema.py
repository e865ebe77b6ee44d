"""Moving average of a trained model's weights, in fp32 and sharded: each rank averages the part that it owns.

average <- decay * average + (1 - decay) * weights after every optimiser step, which after n steps is
decay^n w_0 + (1 - decay) sum_i decay^(n-i) w_i. Ouyang et al. 2022 (2203.02155), C.4: 0.992 for PPO.
"""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dschat_kit.engine.zero import owned_parts
from dschat_kit.models.lora import ACTOR
from dschat_kit.runs import RunError


class Ema:
    """The average of what `engine` trains (of a shared model: what the actor does). Saved and loaded by the name and
    place of each part, so that another number of ranks or another ZeRO stage can go on with it."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float):
        self.decay, self.device = decay, engine.device
        self.trained = {name: parameter for name, parameter in engine.module.named_parameters()
                         if parameter.requires_grad and ("lora_" not in name or f".{ACTOR}." in name)}
        self.parts = {name: (part.detach().float().clone(), start)
                      for name, (part, start) in owned_parts(self.trained).items()}

    @torch.no_grad()
    def update(self) -> None:
        """To be called once after every optimiser step."""
        for name, (part, _) in owned_parts(self.trained).items():
            self.parts[name][0].lerp_(part.detach().float(), 1 - self.decay)

    def instead(self, layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """A part of the state dict with the averages in the place of what is averaged. Collective."""
        averages = {id(value): self._whole(name).to(value) for name, value in layer.items() if name in self.trained}
        return {name: averages.get(id(value), value) for name, value in layer.items()}

    def _whole(self, name: str) -> Tensor:
        shape = getattr(self.trained[name], "ds_shape", self.trained[name].shape)
        whole = torch.zeros(shape.numel(), device=self.device)
        part, start = self.parts.get(name, (whole[:0], 0))
        whole[start:start + part.numel()] = part.to(whole.device)
        dist.all_reduce(whole)
        return whole.view(shape)

    def save_checkpoint(self, folder: str, tag: str, **_) -> None:
        """This rank's parts as one file beside the engines' shards."""
        (place := Path(folder) / tag).mkdir(parents=True, exist_ok=True)
        parts = {f"{start}:{name}": part.cpu() for name, (part, start) in self.parts.items()}
        save_file(parts, place / f"rank{dist.get_rank():05d}.safetensors")

    def load_checkpoint(self, folder: str, tag: str, **_) -> tuple[str, dict]:
        """Fill this rank's parts from the files of all ranks that saved. Raises RunError where one is missing."""
        missing = {name: part.numel() for name, (part, _) in self.parts.items()}
        for path in sorted((Path(folder) / tag).glob("rank*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    begin, name = key.split(":", 1)
                    saved, offset = file.get_slice(key), int(begin)
                    part, start = self.parts.get(name, (torch.empty(0), 0))
                    low = max(offset, start)
                    high = min(offset + saved.get_shape()[0], start + part.numel())
                    if low < high:
                        part[low - start:high - start] = saved[low - offset:high - offset].to(part.device)
                        missing[name] -= high - low
        if any(missing.values()):
            raise RunError(f"{folder} does not hold the whole moving average\n  change: --fresh")
        return folder, {}
