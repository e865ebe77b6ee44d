"""Experience: everything that one rollout hands to the PPO updates, named and shape-checked."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Experience:
    sequences: Tensor
    """(B, T) prompt padded on the left, response padded on the right"""
    attention_mask: Tensor
    """(B, T) bool"""
    response_mask: Tensor
    """(B, A) bool: real response tokens, EOS included; A is the last A columns of T"""
    logprobs: Tensor
    """(B, A) of the policy that sampled, at the sampling temperature"""
    ref_logprobs: Tensor
    """(B, A) of the frozen SFT policy, at the same temperature"""
    values: Tensor
    """(B, A) the critic's value before each response token"""
    scores: Tensor
    """(B,) the reward model's scalar for each response"""
    rewards: Tensor
    """(B, A) per token: KL penalty everywhere, score at the last real token"""
    advantages: Tensor
    """(B, A) whitened over the global batch"""
    returns: Tensor
    """(B, A) targets of the critic"""

    def __post_init__(self):
        (B, T), A = self.sequences.shape, self.response_mask.shape[1]
        expected = {"attention_mask": (B, T), "scores": (B,)}
        for field in dataclasses.fields(self):
            shape, want = tuple(getattr(self, field.name).shape), expected.get(field.name, (B, A))
            assert field.name == "sequences" or shape == want, f"{field.name}: {shape} instead of {want}"
        assert A <= T and self.response_mask.dtype == self.attention_mask.dtype == torch.bool

    def __len__(self) -> int:
        return self.sequences.shape[0]

    def select(self, rows) -> "Experience":
        """The same experience for some of its rows."""
        index = torch.as_tensor(rows, device=self.sequences.device)
        return Experience(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def by_length(self) -> "Experience":
        """The same rows, those of similar length side by side, so that little of a micro batch is padding."""
        return self.select(self.attention_mask.sum(1).argsort(stable=True))

    def split(self, size: int) -> "Iterator[Experience]":
        """Consecutive parts of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))
