"""Causal attention in bf16 on a CPU without AMX, as matrix products; families whose attention is known.

torch's attention kernel takes 1.2 to 3.5 times as long there, forward and backward (docs/performance.md). On other
machines, for other families and for masks, transformers' own choice computes.

Shapes: B sequences, T tokens, H heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dschat_kit.machine import detect

FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma")
"""Model types whose attention is nothing but softmax(QK)V, causal or with a sliding window (then they pass a mask), and
goes through transformers' attention interface."""

PRODUCTS = "dschat_products"
KEPT = 2**19
"""Entries of H x T x T up to which training keeps the probabilities, 1 MB a row and layer; longer rows are computed in
blocks of queries, whose probabilities the backward pass computes again. How many rows there are does not matter."""
BLOCK = 128
"""Queries of a block."""
AT_ONCE = 2**24
"""Probabilities that are computed at a time, 32 MB; at least those of one row."""
LONGEST = 2048
"""Tokens of a row up to which products were measured to be faster."""


def faster_as_products(like: Tensor) -> bool:
    """Whether torch's attention kernel is slower than products for tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(B, H, T, D) from (B, H, T, D) and (B, K, T, D). Scores are rounded to the dtype of the keys, as in transformers'
    eager attention."""
    if not faster_as_products(query) or query.shape[2] > LONGEST:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                              enable_gqa=query.shape[1] != key.shape[1])
    return _Products.apply(query, key, value, scaling)


class _Products(torch.autograd.Function):
    """softmax(QK)V, a few rows at a time, by blocks of queries; a block looks at the keys up to its last query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As causal_attention; what is returned lies in memory as (B, T, H, D)."""
        B, H, T, D = query.shape
        keep = H * T * T <= KEPT
        size, output, probs = T if keep else BLOCK, _by_token(query), []
        ctx.scaling, ctx.blocks = scaling, [(start, min(T, start + size)) for start in range(0, T, size)]
        at_once = max(1, AT_ONCE // (H * T * min(T, size)))
        ctx.rows = [slice(row, row + at_once) for row in range(0, B, at_once)]
        query = torch.mul(query, scaling, out=query.new_empty(query.shape))
        key, value = key.contiguous(), value.contiguous()
        for rows in ctx.rows:
            queries, keys, values = (_every_head(part[rows], H) for part in (query, key, value))
            for start, end in ctx.blocks:
                last = _probabilities(queries, keys, start, end)
                output[rows, :, start:end] = torch.bmm(last, values[:, :end]).view(-1, H, end - start, D)
            probs += [last] * keep
        ctx.save_for_backward(query, key, value, *probs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of query, key and value; sums over blocks are in fp32."""
        query, key, value, *kept = ctx.saved_tensors
        H, T, D = grad.shape[1:]
        grads = [_by_token(part) for part in (query, key, value)]
        for i, rows in enumerate(ctx.rows):
            sums: list[Tensor] = []
            queries, keys, values, outer = (_every_head(part[rows], H) for part in (query, key, value, grad))
            for start, end in reversed(ctx.blocks):
                probs = kept[i] if kept else _probabilities(queries, keys, start, end)
                above = outer[:, start:end]
                scores = torch._softmax_backward_data(torch.bmm(above, values[:, :end].mT), probs, -1, probs.dtype)
                torch.mul(torch.bmm(scores, keys[:, :end]).view(-1, H, end - start, D), ctx.scaling,
                          out=grads[0][rows, :, start:end])
                parts = torch.bmm(scores.mT, queries[:, start:end]), torch.bmm(probs.mT, above)
                if sums:
                    for whole, part in zip(sums, parts, strict=True):
                        whole[:, :end] += part
                else:  # the last block, which looks at all keys
                    sums = [part.float() if start else part for part in parts]
            for target, whole in zip(grads[1:], sums, strict=True):  # heads that share keys add up
                target[rows] = whole.view(-1, target.shape[1], H // target.shape[1], T, D).sum(2)
        return *grads, None


def _every_head(part: Tensor, heads: int) -> Tensor:
    """(B H, T, D) of (B, K, T, D)."""
    return part.repeat_interleave(heads // part.shape[1], 1).flatten(0, 1) if part.shape[1] < heads else \
        part.flatten(0, 1)


def _probabilities(query: Tensor, key: Tensor, start: int, end: int) -> Tensor:
    """(B H, end - start, end) of the scaled queries from start to end."""
    scores = torch.bmm(query[:, start:end], key[:, :end].mT)
    later = torch.full((end - start, end - start), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    scores[..., start:] += later
    return scores.softmax(-1)


def _by_token(like: Tensor) -> Tensor:
    """(B, H, T, D) that lies in memory as (B, T, H, D), as the layers before and after have it."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
            scaling: float | None = None, dropout: float = 0.0, **how) -> tuple[Tensor, None]:
    """Transformers' attention interface: (B, H, T, D) in, (B, T, H, D) out."""
    if attention_mask is not None or dropout or query.shape[2] != key.shape[2] or how.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **how)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


def take_products(model: nn.Module) -> nn.Module:
    """`model`, whose rows without a mask are computed as products where that is faster."""
    known = model.config.model_type in FAMILIES and model.config._attn_implementation == "sdpa"
    if known and detect().accelerator == "cpu" and faster_as_products(next(model.parameters())):
        AttentionInterface.register(PRODUCTS, _attend)
        AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
        model.set_attn_implementation(PRODUCTS)
    return model
