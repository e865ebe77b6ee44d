"""What a policy says about responses that are there: logits on response positions alone, log-softmax in chunks.

Shapes: B sequences, T prompt + response, A response tokens, V vocabulary, N real response tokens of all rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dschat_kit.models.loading import accepts, left_aligned, response_columns

CHUNK = 2**19
"""Entries of logits that are in fp32 at a time: 2 MB, which stay in the cache of a CPU."""


class _ChunkedLogprobs(torch.autograd.Function):
    """Neither pass holds more of the (N, V) softmax in fp32 than two CHUNKs; the gradient has the logits' dtype."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities and entropies in fp32."""
        logprobs, entropy, sums = torch.empty(3, len(tokens), device=logits.device)
        for rows, scaled, weights in _chunks(logits, temperature):
            highest = scaled.amax(-1, keepdim=True)
            torch.sub(scaled, highest, out=weights).exp_()
            total = weights.sum(-1)
            sums[rows] = total.log() + highest.squeeze(-1)
            logprobs[rows] = scaled.gather(-1, tokens[rows, None]).squeeze(-1) - sums[rows]
            entropy[rows] = sums[rows] - torch.linalg.vecdot(weights, scaled) / total
        ctx.save_for_backward(logits, tokens, sums)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
        """d logprob / d logits = (one-hot - softmax) / temperature."""
        logits, tokens, sums = ctx.saved_tensors
        result, scale = torch.empty_like(logits), (grad / ctx.temperature).float()
        for rows, scaled, weights in _chunks(logits, ctx.temperature):
            torch.sub(scaled, sums[rows, None], out=weights).exp_().mul_(-scale[rows, None])
            result[rows] = weights.scatter_add_(-1, tokens[rows, None], scale[rows, None])
        return result, None, None


def _chunks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows that fit into CHUNK entries together, their logits over the temperature in fp32, and as much memory to work
    in. The memory of both is that of the chunk before: fresh memory costs more than the arithmetic."""
    size = max(1, CHUNK // logits.shape[1])
    held, free = torch.empty(2, min(size, len(logits)), logits.shape[1], device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        count = rows.stop - start
        yield rows, held[:count].copy_(logits[rows]).div_(temperature), free[:count]


def chunked_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) in nats, each (N,), of `tokens` (N,) under `logits` (N, V); the entropy has no gradient."""
    return _ChunkedLogprobs.apply(logits, tokens, temperature)


def _logits(model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """(N, V) logits at the N `wanted` (B, T) places; elsewhere nothing is projected to V, where the model allows it."""
    keep = {"logits_to_keep": wanted} if accepts(model, "logits_to_keep") else {}
    logits = model(**inputs, use_cache=False, **keep).logits
    return logits if keep else logits[wanted]


def sequence_logprobs(model: nn.Module, sequences: Tensor, attention_mask: Tensor, response_mask: Tensor,
                      packed_positions: Tensor | None = None) -> Tensor:
    """(B,) log-probabilities of whole responses (B, T), each token predicted from the position before it.

    Rows are moved to the left as in `response_logprobs`. Packed ones stay; their positions say where each begins
    (without a cache: a model with one believes that it goes on).
    """
    inputs = {"input_ids": sequences, "position_ids": packed_positions}
    if packed_positions is None:
        sequences, response_mask = (left_aligned(part, attention_mask) for part in (sequences, response_mask))
        places = torch.arange(sequences.shape[1], device=sequences.device)
        inputs, response_mask = {"input_ids": sequences}, response_mask & (places < attention_mask.sum(1, keepdim=True))
    real = response_mask[:, 1:].bool()
    logits = _logits(model, inputs, F.pad(real, (0, 1)))
    found, _ = chunked_logprobs(logits, sequences[:, 1:][real])
    return torch.zeros(real.shape, device=logits.device).masked_scatter(real, found).sum(-1)


def response_logprobs(model: nn.Module, sequences: Tensor, attention_mask: Tensor, response_length: int,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), each (B, A), of the real tokens among the last `response_length`; 0 elsewhere.

    Rows are moved to the left and cut to the longest, so causality alone keeps padding out and no mask is computed;
    only positions that predict a real response token are projected to V.
    """
    real = attention_mask[:, -response_length:]
    ids, columns = left_aligned(sequences, attention_mask), response_columns(attention_mask, response_length)
    wanted = torch.zeros(ids.shape, dtype=torch.int, device=ids.device).scatter_add(1, columns, real.int()) > 0
    logits = _logits(model, {"input_ids": ids}, wanted)
    found = chunked_logprobs(logits, sequences[:, -response_length:][real], temperature)
    logprobs, entropy = (torch.zeros(real.shape, device=ids.device).masked_scatter(real, part) for part in found)
    return logprobs, entropy
