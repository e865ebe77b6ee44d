"""Roles of PPO that share weights.

Where the actor has adapters, the reference policy is the actor without them. With lora.share_base one base model holds
all four roles: actor and critic are adapters that are trained, the reward model is a frozen one, the reference policy
is the base without any. One DeepSpeed engine holds them; each role looks like its own. Gradients of actor and critic
are clipped by their common norm; a role is active from its forward to its backward pass only, in between the actor is.
"""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dschat_kit.config import Pipeline
from dschat_kit.engine.zero import clear_gradients
from dschat_kit.models.lora import ACTOR, adapted_layers, add_adapters, use_adapters
from dschat_kit.models.scalar_model import scalars
from dschat_kit.runs import RunError, read_json

ADAPTERS = {"actor": [ACTOR], "critic": ["critic"], "reward": ["reward"], "ref": []}


class SharedModel(nn.Module):
    """A causal model with the adapters of all roles, and two scalar heads. `reward` is the reward stage's model folder:
    its adapter is the start of the critic as well. Raises RunError where it has none."""

    def __init__(self, causal: nn.Module, reward: Path, pipeline: Pipeline):
        super().__init__()
        if not (reward / "adapter").exists():
            raise RunError(f"{reward} holds no adapter to share a base with\n  change: `dschat reward --fresh` with "
                           "lora.rank above 0, or --set lora.share_base=false")
        saved, config = load_file(reward / "adapter" / "adapter_model.safetensors"), read_json(reward / "config.json")
        self.shift, self.scale = config.get("score_shift", 0.0), config.get("score_scale", 1.0)
        for adapters in ADAPTERS.values():
            for name in adapters:
                add_adapters(causal, pipeline.lora, pipeline.seed, name)
        head, prefix = saved.pop("base_model.model.score.weight"), "base_model.model."
        self.causal, self.heads = causal, nn.ModuleDict()
        for role in ("critic", "reward"):
            self.heads[role] = nn.Linear(head.shape[1], 1, bias=False, dtype=head.dtype)
            self.heads[role].weight.data.copy_(head)
            for key, value in saved.items():
                path, side = key.removeprefix(prefix).removesuffix(".weight").rsplit(".", 1)
                causal.get_submodule(f"{path}.{side}.{role}").weight.data.copy_(value)
        self._layers = adapted_layers(causal)
        self.requires_grad_(False)
        for parameter in [*self.trained("actor"), *self.trained("critic")]:
            parameter.requires_grad_(True)
        self.use("actor")

    def trained(self, role: str) -> list[nn.Parameter]:
        """The parameters that the role trains."""
        return [parameter for name, parameter in self.named_parameters() if name == f"heads.{role}.weight"
                or "lora_" in name and name.split(".")[-2] in ADAPTERS[role]]

    def use(self, role: str) -> None:
        """Switch every adapted layer to the role."""
        use_adapters(self._layers, ADAPTERS[role])

    def forward(self, *args, role: str, **kwargs) -> Tensor:
        """What a causal model (actor, ref) or a scalar model (critic, reward) of that role gives."""
        if role in ("actor", "ref"):
            return self.causal(*args, **kwargs)
        backbone = getattr(self.causal, self.causal.base_model_prefix)
        return (scalars(backbone, self.heads[role], *args) - self.shift) * self.scale


class Reference:
    """The policy that an actor with adapters began as: its engine, for a forward pass without them."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.engine, self.module, self._layers = engine, engine.module, adapted_layers(engine.module)

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        use_adapters(self._layers, [])
        try:
            return self.engine(*args, **kwargs)
        finally:
            use_adapters(self._layers, [ACTOR])


class Role:
    """One role of an engine that holds a SharedModel, used as if it were an engine of its own."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, role: str):
        self.engine, self.role = engine, role
        self.module = engine.module.causal

    def __call__(self, *args, **kwargs):
        with self._active():
            return self.engine(*args, role=self.role, **kwargs)

    def backward(self, loss: Tensor, **how) -> None:
        """As the engine's; the role is active again for what gradient checkpointing computes anew."""
        with self._active():
            self.engine.backward(loss, **how)

    def step(self) -> None:
        """As the engine's, which makes an optimiser step once each role has had all its backward passes."""
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if last:
            clear_gradients(self.engine.module.trained("critic"))

    @property
    def optimizer(self) -> SimpleNamespace:
        """The parameter group of this role, for its learning rate."""
        return SimpleNamespace(param_groups=[self.engine.optimizer.param_groups[("actor", "critic").index(self.role)]])

    @contextmanager
    def _active(self):
        self.engine.module.use(self.role)
        try:
            yield
        finally:
            self.engine.module.use("actor")

    def __getattr__(self, name: str):
        return getattr(self.engine, name)
