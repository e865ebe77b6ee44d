"""DeepSpeed's rollout types with what PPO needs on top: seeds, stop tokens, log-probabilities, finished rows."""

from dataclasses import dataclass

import torch
from deepspeed.runtime.rollout.base import RolloutBatch, RolloutRequest, SamplingConfig
from torch import Tensor

__all__ = ["KitBatch", "KitRequest", "KitSampling"]


@dataclass
class KitRequest(RolloutRequest):
    """B prompts, padded on the left."""
    row_seeds: Tensor | None = None
    """(B,) int64: a row with the same seed and prompt gets the same tokens, whatever its batch mates"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_seeds is not None and self.row_seeds.shape != self.prompt_ids.shape[:1]:
            raise ValueError(f"row_seeds: got shape {tuple(self.row_seeds.shape)}, "
                             f"expected ({self.prompt_ids.shape[0]},)")


@dataclass
class KitSampling(SamplingConfig):
    """temperature 0 is greedy; everything else samples."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response and belong to it"""
    pad_token_id: int = 0


@dataclass
class KitBatch(RolloutBatch):
    """(B, T) sequences; responses are the last A columns."""
    response_mask: Tensor = None
    """(B, A) bool: real response tokens, the stop token included"""
    logprobs: Tensor = None
    """(B, A) of the sampled tokens at the sampling temperature, 0 outside the mask"""
    finished: Tensor = None
    """(B,) bool: ended with a stop token within max_new_tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        B, A = self.response_mask.shape
        assert self.logprobs.shape == (B, A) and self.finished.shape == (B,) and B == self.input_ids.shape[0]
        assert self.response_mask.dtype == self.finished.dtype == torch.bool
