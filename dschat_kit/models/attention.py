"""Causal attention of short rows in bf16 on a CPU without AMX, as matrix products; families whose attention is known.

torch's attention kernel takes three to four times as long there, forward and backward (8 rows of 127 tokens, 12 heads,
Zen 5: 18 ms beside 5). On other machines, for other families and for masks, transformers' own choice computes.

Shapes: B sequences, T tokens, H heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dschat_kit.machine import detect

__all__ = ["FAMILIES", "causal_attention", "faster_as_products", "take_products"]

FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma")
"""Model types whose attention is nothing but softmax(QK)V, causal or with a sliding window (then they pass a mask), and
goes through transformers' attention interface."""

PRODUCTS = "dschat_products"
SCORES = 2**19
"""Entries of H x T x T up to which products are taken: 1 MB a row and layer, which training keeps. How many rows
there are does not matter."""


def faster_as_products(like: Tensor) -> bool:
    """Whether torch's attention kernel is slower than products for tensors like this one."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(B, H, T, D) from (B, H, T, D) and (B, K, T, D). Scores are rounded to the dtype of the keys, as in transformers'
    eager attention."""
    H, T = query.shape[1:3]
    if not faster_as_products(query) or H * T * T > SCORES:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                              enable_gqa=H != key.shape[1])
    if H != key.shape[1]:
        key, value = (part.repeat_interleave(H // part.shape[1], 1) for part in (key, value))
    later = torch.full((T, T), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    scores = (query * scaling) @ key.transpose(2, 3)
    return scores.add_(later).softmax(-1) @ value


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
            scaling: float | None = None, dropout: float = 0.0, **how) -> tuple[Tensor, None]:
    """Transformers' attention interface: (B, H, T, D) in, (B, T, H, D) out."""
    if attention_mask is not None or dropout or query.shape[2] != key.shape[2] or how.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **how)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


def take_products(model: nn.Module) -> nn.Module:
    """`model`, whose short rows without a mask are computed as products where that is faster."""
    known = model.config.model_type in FAMILIES and model.config._attn_implementation == "sdpa"
    if known and detect().accelerator == "cpu" and faster_as_products(next(model.parameters())):
        AttentionInterface.register(PRODUCTS, _attend)
        AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
        model.set_attn_implementation(PRODUCTS)
    return model
