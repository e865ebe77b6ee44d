"""Keys and values in slots of memory that is allocated once, and the attention that reads them where they lie.

A row's tokens stand at columns 0, 1, ... of its slot, so nothing is padded on the left and nothing moves when a row
beside it ends. A step on a CPU is the loop of engine/loops.py; elsewhere torch's attention reads every row as far
as the longest, with a mask. Transformers' own modules compute everything else: `attend` is registered as an attention
implementation and gets the slots as the argument `cache`, as transformers' continuous batching passes its pages.
BLOOM's attention cannot be replaced so; its class is.

Shapes: n active rows, H heads, K key-value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from dschat_kit.engine.loops import attend_one, compiles
from dschat_kit.models.attention import FAMILIES as INTERFACED
from dschat_kit.models.attention import causal_attention

ATTENTION = "dschat"
FAMILIES = (*INTERFACED, "bloom")
"""Model types that `attend` computes, and BLOOM with its linear biases (ALiBi)."""
COLUMNS = 32
"""Columns by which the memory of a layer grows."""


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes that one token of one row takes over all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


class UnknownAttention(Exception):
    """The model asks for something that `attend` does not compute; the plain path does."""


class KVSlots:
    """`slots` rows of up to `length` tokens: memory for keys and for values in each layer, (slots, K, columns, D). On a
    CPU its columns follow the longest row; elsewhere all are there from the start, so that its address stays."""

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.rows: list[int] = []
        """Active rows, each in the slot of its place, in the order in which a step computes them."""
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self._filled: slice | None = None

    def clear(self) -> None:
        """Forget all rows, keep the memory."""
        self.rows = []

    def place(self, rows: list[int]) -> None:
        """Give each row a slot, which the prefill that follows writes."""
        self._filled, self.rows = slice(len(self.rows), len(self.rows) + len(rows)), self.rows + rows

    def advance(self, positions: Tensor, used: int | None = None) -> None:
        """The step that follows writes the token of the i-th active row at column positions[i]. With `used` it
        computes every slot instead, active or not, and reads that many columns of each: nothing then depends on a
        value, only on sizes, and the step can be captured."""
        self._filled, self._masks, self._positions = None, {}, positions
        self._shortest, self._used = (0, used) if used else (int(positions.min()), int(positions.max()) + 1)

    def retire(self, rows: list[int], used: int) -> None:
        """Free the rows' slots: the last rows move into the gaps, with their first `used` columns."""
        left, gone = list(self.rows), set(rows)
        stay = [place for place, row in enumerate(left) if row not in gone]
        gaps = [place for place in range(len(stay)) if left[place] in gone]
        for gap, place in zip(gaps, stay[len(stay) - len(gaps):], strict=True):
            left[gap] = left[place]
            for memory in (part for pair in self._memory.values() for part in pair):
                memory[gap, :, :used] = memory[place, :, :used]
        self.rows = left[:len(stay)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None,
               bias: Tensor | None = None) -> Tensor:
        """(rows, queries, H, D) attention of new tokens to themselves and to what the slots hold; stores them. `bias`
        (H, 1, length) is added to the scores by column, the same in all layers."""
        keys, values = self._columns(layer, key.shape[2] if self._filled else self._used, key)
        if self._filled:
            for memory, new in ((keys, key), (values, value)):  # every sample of a prompt has its own
                memory[self._filled, :, :key.shape[2]].unflatten(0, (len(key), -1)).copy_(new[:, None])
            return _prompt_attention(query, key, value, scaling, window, bias)
        if compiles(key):
            return attend_one(query, key, value, keys, values, self._positions, scaling, window, bias)
        (n, H, _, D), K, used = query.shape, key.shape[1], self._used
        places = torch.arange(n, device=key.device)
        keys[places, :, self._positions], values[places, :, self._positions] = key[:, :, 0], value[:, :, 0]
        mask = None
        if self._shortest + 1 < used or (window and used > window) or bias is not None:
            mask = self._mask(window, query.dtype, bias)
        queries = query.reshape(n, K, H // K, D)  # heads that share keys are queries of one head
        return F.scaled_dot_product_attention(queries, keys[:n, :, :used], values[:n, :, :used], attn_mask=mask,
                                              scale=scaling).reshape(n, 1, H, D)

    def _columns(self, layer: int, used: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with at least `used` columns; on a CPU less than twice as many, once all rows have
        had their prefill."""
        held = self._memory.get(layer)
        wanted = min(self.length, -(-used // COLUMNS) * COLUMNS) if like.device.type == "cpu" else self.length
        if held and self._filled:  # the rows beside those that come may be longer
            wanted = max(wanted, held[0].shape[2])
        if held is None or not wanted <= held[0].shape[2] < 2 * wanted:
            kept = min(wanted, held[0].shape[2]) if held else 0
            made = [like.new_empty(self.slots, like.shape[1], wanted, like.shape[3]) for _ in range(2)]
            for new, old in zip(made, held or made, strict=True):
                new[:, :, :kept] = old[:, :, :kept]
                new[:, :, kept:] = 0  # what counts for nothing has to be finite
            self._memory[layer] = held = tuple(made)
        return held

    def _mask(self, window: int | None, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """(rows, 1 or H, 1, used): 0 or `bias` where a row may look, -inf elsewhere; the same for all layers of a step.
        """
        if window not in self._masks:
            last = self._positions[:, None, None, None]
            columns = torch.arange(self._used, device=last.device)
            hidden = columns > last
            if window:
                hidden |= columns <= last - window
            seen = torch.zeros((), dtype=dtype, device=last.device) if bias is None else bias[..., :self._used]
            self._masks[window] = torch.where(hidden, float("-inf"), seen)
        return self._masks[window]


def _prompt_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
                      bias: Tensor | None) -> Tensor:
    """Prompts stand on the left and are padded on the right, so causality alone keeps padding out of real tokens."""
    width = query.shape[2]
    if bias is None and not (window and width > window):
        return causal_attention(query, key, value, scaling).transpose(1, 2)
    places = torch.arange(width, device=query.device)
    distance = places[:, None] - places
    mask = (distance >= 0) & (distance < (window or width))
    mask = mask if bias is None else torch.where(mask, bias[..., :width], float("-inf"))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                            enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           scaling: float | None = None, sliding_window: int | None = None, cache: KVSlots,
           softcap: float | None = None, **_) -> tuple[Tensor, None]:
    """Transformers' attention interface: (n, H, queries, D) in, (n, queries, H, D) out."""
    if softcap is not None or attention_mask is not None:
        raise UnknownAttention("soft-capped attention, or a mask of the model's own")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


class _BloomSlots(BloomAttention):
    """BLOOM's attention with its keys and values in slots, wherever there are some."""

    cache: KVSlots | None = None
    _bias: Tensor | None = None

    def forward(self, hidden_states: Tensor, residual: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        """As BloomAttention; rows begin in the first column, so no mask is needed."""
        if self.cache is None:
            return super().forward(hidden_states, residual, *args, **kwargs)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if self._bias is None or self._bias.shape[-1] < self.cache.length or self._bias.dtype != query.dtype:
            columns = torch.ones(1, self.cache.length, dtype=torch.long, device=query.device)
            self._bias = build_alibi_tensor(columns, self.num_heads, query.dtype)
        found = self.cache.attend(self.layer_idx, query, key, value, self.inv_norm_factor, bias=self._bias)
        return residual + self.dense(found.flatten(2)), None


def take_slots(model: nn.Module) -> nn.Module:
    """`model`, whose forward pass now takes KVSlots as `cache`: while its attention implementation is ATTENTION, BLOOM
    whenever there is one."""
    AttentionInterface.register(ATTENTION, attend)
    layers = [module for module in model.modules() if type(module) is BloomAttention]

    def pass_on(_model: nn.Module, _args: tuple, inputs: dict) -> None:
        for layer in layers:
            layer.cache = inputs.get("cache")

    def forget(*_) -> None:  # else the layers would hold the memory that the engine lets go of
        for layer in layers:
            layer.cache = None

    for layer in layers:
        layer.__class__ = _BloomSlots
    if layers:
        model.register_forward_pre_hook(pass_on, with_kwargs=True)
        model.register_forward_hook(forget, always_call=True)
        model.set_attn_implementation = lambda _name: None  # it has but one, and would warn
    return model
