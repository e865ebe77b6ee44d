"""What a policy says about responses that are there: logits on response positions alone, log-softmax in chunks.

Shapes: B sequences, T prompt + response, A response tokens, V vocabulary, N real response tokens of all rows.
"""

import torch
from torch import Tensor, nn

from dschat_kit.models.loading import accepts, left_aligned, response_columns

CHUNK = 2**19
"""Entries of logits that are in fp32 at a time: 2 MB, which stay in the cache of a CPU."""


class _ChunkedLogprobs(torch.autograd.Function):
    """Neither pass holds more of the (N, V) softmax in fp32 than CHUNK entries; the gradient has the logits' dtype."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities and entropies in fp32."""
        logprobs, entropy, sums = torch.empty(3, len(tokens), device=logits.device)
        for rows in _chunks(logits):
            scaled = logits[rows].float() / temperature
            sums[rows] = scaled.logsumexp(-1)
            logprobs[rows] = scaled.gather(-1, tokens[rows, None]).squeeze(-1) - sums[rows]
            weights = (scaled - sums[rows, None]).exp_()
            entropy[rows] = sums[rows] - torch.linalg.vecdot(weights, scaled)
        ctx.save_for_backward(logits, tokens, sums)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
        """d logprob / d logits = (one-hot - softmax) / temperature."""
        logits, tokens, sums = ctx.saved_tensors
        result, scale = torch.empty_like(logits), (grad / ctx.temperature).float()
        for rows in _chunks(logits):
            weights = (logits[rows].float() / ctx.temperature - sums[rows, None]).exp_().mul_(-scale[rows, None])
            result[rows] = weights.scatter_add_(-1, tokens[rows, None], scale[rows, None])
        return result, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Rows that fit into CHUNK entries together."""
    rows = max(1, CHUNK // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def chunked_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) in nats, each (N,), of `tokens` (N,) under `logits` (N, V); the entropy has no gradient."""
    return _ChunkedLogprobs.apply(logits, tokens, temperature)


def response_logprobs(model: nn.Module, sequences: Tensor, attention_mask: Tensor, response_length: int,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), each (B, A), of the real tokens among the last `response_length`; 0 elsewhere.

    Rows are moved to the left and cut to the longest, so causality alone keeps padding out and no mask is computed;
    only positions that predict a real response token are projected to V.
    """
    real = attention_mask[:, -response_length:]
    ids, columns = left_aligned(sequences, attention_mask), response_columns(attention_mask, response_length)
    wanted = torch.zeros(ids.shape, dtype=torch.int, device=ids.device).scatter_add(1, columns, real.int()) > 0
    keep = {"logits_to_keep": wanted} if accepts(model, "logits_to_keep") else {}
    logits = model(input_ids=ids, use_cache=False, **keep).logits
    logits = logits if keep else logits[wanted]
    found = chunked_logprobs(logits, sequences[:, -response_length:][real], temperature)
    logprobs, entropy = (torch.zeros(real.shape, device=ids.device).masked_scatter(real, part) for part in found)
    return logprobs, entropy
