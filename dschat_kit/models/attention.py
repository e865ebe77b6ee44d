"""Causal attention in bf16 on a CPU without AMX, as matrix products; families whose attention is known.

torch's attention kernel takes two to four times as long there, forward and backward (8 rows, 12 heads, Zen 4: 127
tokens 29 ms beside 8, 512 tokens 160 beside 90). On other machines, for other families and for masks, transformers'
own choice computes.

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

__all__ = ["FAMILIES", "causal_attention", "faster_as_products", "take_products"]

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
"""Probabilities that exist at a time, 32 MB, rows allowing."""
LONGEST = 2048
"""Tokens of a row up to which products were measured to be faster."""


def faster_as_products(like: Tensor) -> bool:
    """Whether torch's attention kernel is slower than products for tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(B, H, T, D) from (B, H, T, D) and (B, K, T, D). Scores are rounded to the dtype of the keys, as in transformers'
    eager attention."""
    B, H, T, _ = query.shape
    if not faster_as_products(query) or T > LONGEST:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                              enable_gqa=H != key.shape[1])
    if H != key.shape[1]:
        key, value = (part.repeat_interleave(H // part.shape[1], 1) for part in (key, value))
    rows = max(1, AT_ONCE // (H * T * min(T, BLOCK)))
    if rows >= B:
        return _Products.apply(query, key, value, scaling)
    return torch.cat([_Products.apply(*some, scaling) for some in zip(query.split(rows), key.split(rows),
                                                                      value.split(rows), strict=True)])


class _Products(torch.autograd.Function):
    """softmax(QK)V by blocks of queries; a block looks at the keys up to its last query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(B, H, T, D) each; what is returned lies in memory as (B, T, H, D)."""
        H, T, D = query.shape[1:]
        size = T if H * T * T <= KEPT else BLOCK
        ctx.scaling, ctx.blocks = scaling, [(start, min(T, start + size)) for start in range(0, T, size)]
        output = _by_token(query)
        query = torch.mul(query, scaling, out=query.new_empty(query.shape)).view(-1, T, D)
        key, value = (part.contiguous().view(-1, T, D) for part in (key, value))
        for start, end in ctx.blocks:
            probs = _probabilities(query, key, start, end)
            output[:, :, start:end] = torch.bmm(probs, value[:, :end]).view(-1, H, end - start, D)
        ctx.save_for_backward(query, key, value, *([probs] if size == T else []))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of query, key and value; sums over blocks are in fp32."""
        query, key, value, *kept = ctx.saved_tensors
        H, T, D = grad.shape[1:]
        grads, sums = [_by_token(grad) for _ in range(3)], []
        grad = grad.contiguous().view(-1, T, D)
        for start, end in reversed(ctx.blocks):
            probs = kept[0] if kept else _probabilities(query, key, start, end)
            grad_probs = torch.bmm(grad[:, start:end], value[:, :end].mT)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.mul(torch.bmm(grad_scores, key[:, :end]).view(-1, H, end - start, D), ctx.scaling,
                      out=grads[0][:, :, start:end])
            parts = torch.bmm(grad_scores.mT, query[:, start:end]), torch.bmm(probs.mT, grad[:, start:end])
            if sums:
                for whole, part in zip(sums, parts, strict=True):
                    whole[:, :end] += part
            else:  # the last block, which looks at all keys
                sums = [part if kept else part.float() for part in parts]
        for target, whole in zip(grads[1:], sums, strict=True):
            target.copy_(whole.view(target.shape))
        return *grads, None


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
