"""DeepSpeed's rollout types with what PPO needs on top: seeds, stops, log-probabilities, finished rows."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.rollout.base import RolloutBatch, RolloutRequest, SamplingConfig
from torch import Tensor, nn


@dataclass
class KitRequest(RolloutRequest):
    """B prompts, padded on the left."""
    row_seeds: Tensor | None = None
    """(B,) int64: a row with the same seed and prompt gets the same tokens, whatever its batch mates"""
    row_lengths: Tensor | None = None
    """(B * n_samples_per_prompt,): responses are made to end with the first stop token after exactly so many tokens"""

    @classmethod
    def of(cls, request: RolloutRequest, sampling: SamplingConfig) -> "KitRequest":
        """A request of ours as it is; one of DeepSpeed's with seeds from torch's generator, where it is sampled."""
        if isinstance(request, cls):
            return request
        seeds = torch.randint(2**62, request.prompt_ids.shape[:1]) if sampling.temperature > 0 else None
        if seeds is not None and dist.is_initialized():
            seeds += dist.get_rank()  # ranks may be seeded alike
        return cls(request.prompt_ids, request.prompt_attention_mask, row_seeds=seeds)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_seeds is not None and self.row_seeds.shape != self.prompt_ids.shape[:1]:
            raise ValueError(f"row_seeds: got shape {tuple(self.row_seeds.shape)}, "
                             f"expected ({self.prompt_ids.shape[0]},)")


@dataclass
class KitSampling(SamplingConfig):
    """temperature 0 is greedy; everything else samples."""
    min_p: float = 0.0
    """Tokens less likely than so many times the likeliest are dropped; 0 drops none"""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response and belong to it"""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response with the token that completes them; they need `tokenizer`"""
    tokenizer: object = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                                     ("n_samples_per_prompt", self.n_samples_per_prompt >= 1, "at least 1"),
                                     ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
                                     ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (no filter)"),
                                     ("min_p", 0 <= self.min_p <= 1, "0 (no filter) to 1")):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings: got {self.stop_strings!r}, expected a tuple of texts that are not empty")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: got no tokenizer, expected one that decodes what is searched")

    @classmethod
    def of(cls, sampling: SamplingConfig, model: nn.Module) -> "KitSampling":
        """Settings of ours as they are; DeepSpeed's with the EOS and the padding of the model."""
        if isinstance(sampling, cls):
            return sampling
        eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
        stops = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
        return cls(**vars(sampling), stop_token_ids=stops, pad_token_id=pad or 0)

    def text_stops(self, tokens: list[int]) -> bool:
        """Whether a response that ends with `tokens` has just completed a stop string."""
        if not self.stop_strings:
            return False
        tail = tokens[-max(len(text.encode()) for text in self.stop_strings) - 1:]
        return any(text in self.tokenizer.decode(tail) for text in self.stop_strings)


@dataclass
class KitBatch(RolloutBatch):
    """(B, T) sequences; responses are the last A columns. B counts every sample of every prompt."""
    response_mask: Tensor = None
    """(B, A) bool: real response tokens, the stop token included"""
    logprobs: Tensor = None
    """(B, A) of the sampled tokens at the sampling temperature, 0 outside the mask"""
    entropy: Tensor = None
    """(B, A) of the distribution each token was sampled from, in nats, 0 outside the mask"""
    finished: Tensor = None
    """(B,) bool: ended with a stop within max_new_tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        B, A = self.response_mask.shape
        assert self.logprobs.shape == self.entropy.shape == (B, A) and self.finished.shape == (B,)
        assert B == self.input_ids.shape[0] and self.response_mask.dtype == self.finished.dtype == torch.bool
