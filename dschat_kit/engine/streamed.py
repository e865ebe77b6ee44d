"""Generation in the trained module itself under ZeRO-3: every forward pass gathers one layer after another, so no rank
ever holds the whole model. Slow, for where the rollout replica does not fit.
"""

import torch
import torch.distributed as dist
from torch import nn

from dschat_kit.engine.attention import ATTENTION, KVSlots, take_slots
from dschat_kit.engine.decode import Slots
from dschat_kit.engine.parity import TOLERANCE
from dschat_kit.engine.rollout_types import KitRequest
from dschat_kit.runs import RunError


class Streamed:
    """What the decode loop calls in place of a replica, as a context. Gathering is collective, so before each forward
    pass the ranks agree whether there is one; a rank that is done computes a token that nobody reads until all are."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.config, self.device, self._slots = module, module.config, device, False
        self._plain = module.config._attn_implementation

    def __enter__(self) -> "Streamed":
        self._training = self.module.training
        take_slots(self.module).eval()  # no activation is checkpointed
        return self

    def __exit__(self, kind, *exc) -> None:
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():  # an interrupt may have come inside of a forward pass, where the others still are
            while (kind is None or issubclass(kind, RunError)) and self._any_at_work(0):
                self._forward(input_ids=nothing, use_cache=False)
        self.set_attn_implementation(self._plain)
        self.module.train(self._training)

    def __call__(self, **inputs):
        """A forward pass of the module."""
        self._any_at_work(1)
        return self._forward(**inputs)

    def set_attn_implementation(self, name: str) -> None:
        """Holds until the context ends."""
        self._slots = name == ATTENTION
        self.module.set_attn_implementation(name)

    @torch.no_grad()
    def difference(self, request: KitRequest) -> str | None:
        """None where a prefill and a step of the fast path say what transformers' attention says of the first prompt
        with its last token repeated."""
        prompt = request.prompt_ids[0, request.prompt_attention_mask[0].bool()]
        self.set_attn_implementation("sdpa")
        plain = self(input_ids=torch.cat([prompt, prompt[-1:]])[None], use_cache=False).logits[:, -1].float()
        self.set_attn_implementation(ATTENTION)
        steps = Slots(self, KVSlots(1, len(prompt) + 1))
        steps.admit(prompt[None], torch.ones_like(prompt[None]), [0])
        ours = steps.step(prompt[-1:], torch.tensor([len(prompt)], device=self.device))
        error = float((ours.float() - plain).abs().max() / plain.abs().max())
        return None if error <= TOLERANCE[ours.dtype] else f"logits differ by {error:.2g} of the largest"

    def _forward(self, **inputs):
        if self._slots and "cache" not in inputs:  # else the ranks would run other modules, and gather other weights
            inputs["cache"] = KVSlots(1, 1)
            inputs["cache"].place([0])
        return self.module(**inputs)

    def _any_at_work(self, here: int) -> bool:
        flag = torch.tensor(here, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
