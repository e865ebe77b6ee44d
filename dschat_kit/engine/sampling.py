"""Logits -> tokens with their log-probabilities: filters, and draws that depend on a row's own seed alone.

Shapes: B sequences, A response tokens, V vocabulary.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dschat_kit.engine.loops import BLOCK, compiles, draw
from dschat_kit.engine.rollout_types import KitSampling

NEVER = -1e9
"""Logit of a token that is not to be chosen; finite, so that probability 0 times it is 0."""


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
    included.
    """
    logits = _filtered(logits.float() if logits.dtype == torch.float16 else logits, sampling)
    if forced is None:
        forced = torch.full((len(logits),), -1, device=logits.device)
    if sampling.temperature == 0:
        forced = torch.where(forced < 0, logits.argmax(-1), forced)
        uniforms = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    draws = draw if compiles(logits) else _draw
    return draws(logits, sampling.temperature or 1.0, uniforms.to(logits.device), forced)


def _draw(logits: Tensor, temperature: float, uniforms: Tensor, forced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As engine/loops.py's, where nothing is compiled. The distribution function is summed in blocks: one pass over V,
    and a search in V / 256 sums and in one block, instead of a running sum over V."""
    (B, V), logits = logits.shape, logits.float()
    weights = logits.new_zeros(B, -(-V // BLOCK) * BLOCK)
    logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    torch.exp(logits, out=weights[:, :V])
    blocks = weights.view(B, -1, BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    targets = uniforms[:, None] * total
    block = torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    # The last place that adds anything: rounding must not choose a token of probability 0 behind it.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    tokens = (block * BLOCK + torch.searchsorted(inside, targets - before, right=True).minimum(last)).squeeze(1)
    tokens = torch.where(forced < 0, tokens.clamp(max=V - 1), forced)  # without finite logits there is nothing to find
    normaliser = total.log().squeeze(1)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - normaliser
    entropy = normaliser - torch.linalg.vecdot(weights[:, :V], logits) / total.squeeze(1)
    return tokens, logprobs.float(), entropy.float()


def _filtered(logits: Tensor, sampling: KitSampling) -> Tensor:
    """Logits whose dropped tokens have probability 0, in transformers' order: temperature, top_k, top_p, min_p."""
    temperature = sampling.temperature
    if temperature == 0 or (sampling.top_k <= 0 and sampling.top_p == 1 and sampling.min_p == 0):
        return logits
    logits, never = logits.float(), NEVER * max(temperature, 1)
    if sampling.top_k > 0:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, never)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = (ordered / temperature).softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), never)
    if sampling.min_p > 0:
        lowest = logits.amax(-1, keepdim=True) + temperature * math.log(sampling.min_p)
        logits = logits.masked_fill(logits < lowest, never)
    return logits
