"""Logits -> tokens with their log-probabilities: filters, and draws that depend on a row's own seed alone.

Shapes: B sequences, A response tokens, V vocabulary.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dschat_kit.engine.rollout_types import KitSampling

BLOCK = 256
CACHED = 2**19
"""Logits that are worked on at a time on a CPU: 2 MB. Larger ones leave the cache, and the system hands out and takes
back their memory in every step, which cost 38 ms a step of 64 rows and 50,000 words, beside 4."""


def row_uniforms(seeds: Tensor, length: int, samples: int = 1) -> Tensor:
    """(B * samples, length) uniform numbers in [0, 1), each row a function of its own seed and sample alone."""
    found, source = np.empty((len(seeds) * samples, length)), np.random.Philox(key=0)
    draw, start = np.random.Generator(source), source.state
    for row, (seed, sample) in enumerate(itertools.product(seeds.tolist(), range(samples))):
        start["state"]["key"][:] = seed, sample
        source.state = start  # a generator of its own for each row would ask the system for entropy each time
        found[row] = draw.random(length)
    return torch.from_numpy(found)


def sample_tokens(logits: Tensor, uniforms: Tensor | None, sampling: KitSampling,
                  forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, logprobs, entropy), each (B,), from (B, V) logits by inverting the distribution function at `uniforms`
    (B,); where `forced` (B,) is not negative, that token is taken instead.

    Log-probabilities and entropy (in nats) are those of the distribution that was sampled, temperature and filters
    included. A few rows at a time, so that what is computed of them stays in the processor's cache.
    """
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [_sample(some, None if uniforms is None else uniforms[at:at + rows].to(logits.device), sampling,
                     None if forced is None else forced[at:at + rows])
             for at, some in zip(range(0, len(logits), rows), logits.split(rows), strict=True)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _sample(logits: Tensor, uniforms: Tensor | None, sampling: KitSampling, forced: Tensor | None) -> tuple:
    """The distribution function is summed in blocks: one pass over V, and a search in V / 256 sums and in one block,
    instead of a running sum over V."""
    (B, V), logits = logits.shape, logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    logits = _filtered(logits, sampling)
    weights, highest = logits.new_empty(B, -(-V // BLOCK) * BLOCK), logits.amax(-1, keepdim=True)
    torch.sub(logits, highest, out=weights[:, :V]).exp_()
    weights[:, V:] = 0
    blocks = weights.view(B, -1, BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        targets = uniforms[:, None] * total
        block = torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[1] - 1)
        before = F.pad(cumulative, (1, 0)).gather(1, block)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
        # The last place that adds anything: rounding must not choose a token of probability 0 behind it.
        last = torch.searchsorted(inside, inside[:, -1:].contiguous())
        tokens = (block * BLOCK + torch.searchsorted(inside, targets - before, right=True).minimum(last)).squeeze(1)
        tokens = tokens.clamp(max=V - 1)  # without finite logits there is nothing to find
    if forced is not None:
        tokens = torch.where(forced >= 0, forced, tokens)
    normaliser = (total.log() + highest).squeeze(1)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - normaliser
    entropy = normaliser - torch.linalg.vecdot(weights[:, :V], logits) / total.squeeze(1)
    return tokens, logprobs.float(), entropy.float()


def _filtered(logits: Tensor, sampling: KitSampling) -> Tensor:
    """Logits whose dropped tokens have probability 0, in transformers' order: top_k, top_p, min_p."""
    if sampling.temperature == 0:
        return logits
    nothing = torch.finfo(logits.dtype).min  # finite, so that 0 times it is 0
    if sampling.top_k > 0:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, nothing)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(outside, nothing)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), nothing)
    return logits
