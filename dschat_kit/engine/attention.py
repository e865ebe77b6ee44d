"""Keys and values in slots of memory that is allocated once, and the attention that reads them where they lie.

A row's tokens stand at columns 0, 1, ... of its slot, so nothing is padded on the left and nothing moves when a row
beside it ends. Slots form tiles; one tile reads only as far as its longest row. Transformers' own modules compute
everything else: `attend` is registered as an attention implementation and gets the slots as the argument `cache`, as
transformers' continuous batching passes its pages. BLOOM's attention cannot be replaced so; its class is.

Shapes: n active rows, H heads, K key-value heads, D head size, L columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

ATTENTION = "dschat"
FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "bloom")
"""Model types whose attention is nothing but softmax(QK)V, causal or with a sliding window, and goes through
transformers' attention interface; and BLOOM with its linear biases (ALiBi)."""
TILE = 16
"""Slots that are read to the same length: a large tile reads padding, a small one costs more kernel calls."""


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes that one token of one row takes over all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


class UnknownAttention(Exception):
    """The model asks for something that `attend` does not compute; the plain path does."""


class KVSlots:
    """`slots` rows of up to `length` tokens a layer, (slots, K, length, D) for keys and for values."""

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.tiles: list[list[int]] = [[] for _ in range(-(-slots // TILE))]  # rows by tile; slot = TILE * tile + place
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._filled: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """Active rows in the order in which a step computes them."""
        return [row for tile in self.tiles for row in tile]

    def clear(self) -> None:
        """Forget all rows, keep the memory."""
        for tile in self.tiles:
            tile.clear()

    def place(self, rows: list[int]) -> None:
        """Give each row a slot, which the prefill that follows writes."""
        slots, left = [], list(rows)
        for index, tile in enumerate(self.tiles):
            free = min(TILE, self.slots - TILE * index) - len(tile)
            some, left = left[:free], left[free:]
            slots += range(TILE * index + len(tile), TILE * index + len(tile) + len(some))
            tile += some
        self._filled = torch.tensor(slots)

    def places(self) -> list[int]:
        """The slot of each active row, in the order of `rows`."""
        return [TILE * index + place for index, tile in enumerate(self.tiles) for place in range(len(tile))]

    def advance(self, positions: Tensor, used: int | None = None) -> None:
        """The step that follows writes the token of the i-th active row at column positions[i]. With `used` it
        computes every slot instead, active or not, and reads that many columns of each: nothing then depends on a
        value, only on sizes, and the step can be captured."""
        self._filled, self._bias, start = None, {}, 0
        if used:
            self._spans = [(0, 0, positions, 0, used - 1)]
            self._slots = torch.arange(self.slots, device=positions.device)
        else:
            self._spans, self._slots = [], torch.tensor(self.places(), device=positions.device)
        for index, tile in enumerate(self.tiles if used is None else ()):
            if tile:
                span = positions[start:start + len(tile)]
                self._spans.append((start, TILE * index, span, int(span.min()), int(span.max())))
                start += len(tile)
        self._positions = positions

    def retire(self, rows: list[int], used: int) -> None:
        """Free the rows' slots: the last rows of a tile move into the gaps, with their first `used` columns."""
        gone, moves = set(rows), []
        for index, tile in enumerate(self.tiles):
            stay = [place for place, row in enumerate(tile) if row not in gone]
            gaps = [place for place in range(len(stay)) if tile[place] in gone]
            for gap, place in zip(gaps, stay[len(stay) - len(gaps):], strict=True):
                tile[gap] = tile[place]
                moves.append((TILE * index + gap, TILE * index + place))
            del tile[len(stay):]
        for memory in (memory for pair in self._layers.values() for memory in pair):
            for target, source in moves:
                memory[target, :, :used] = memory[source, :, :used]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None,
               bias: Tensor | None = None) -> Tensor:
        """(rows, queries, H, D) attention of new tokens to themselves and to what the slots hold; stores them. `bias`
        (H, 1, length) is added to the scores by column, the same in all layers."""
        if layer not in self._layers:  # zeros, because what is masked still has to be finite
            self._layers[layer] = tuple(new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
                                        for new in (key, value))
        keys, values = self._layers[layer]
        if self._filled is not None:
            slots, width, copies = self._filled.to(key.device), key.shape[2], len(self._filled) // key.shape[0]
            keys[slots, :, :width] = key.repeat_interleave(copies, 0)
            values[slots, :, :width] = value.repeat_interleave(copies, 0)
            return _prompt_attention(query, key, value, scaling, window, bias)
        (n, H, _, D), K = query.shape, key.shape[1]
        keys[self._slots, :, self._positions] = key[:, :, 0]
        values[self._slots, :, self._positions] = value[:, :, 0]
        query = query.reshape(n, K, H // K, D)  # heads that share keys are queries of one head
        output = torch.empty(n, 1, H, D, dtype=value.dtype, device=value.device)
        for start, slot, span, shortest, longest in self._spans:
            end, used = start + len(span), longest + 1
            k, v = (memory[slot:slot + len(span), :, :used] for memory in (keys, values))
            mask = None
            if shortest < longest or (window and used > window) or bias is not None:
                mask = self._mask(start, span, used, window, query.dtype, bias)
            found = F.scaled_dot_product_attention(query[start:end], k, v, attn_mask=mask, scale=scaling)
            output[start:end] = found.view(len(span), 1, H, D)
        return output

    def _mask(self, start: int, span: Tensor, used: int, window: int | None, dtype: torch.dtype,
              bias: Tensor | None) -> Tensor:
        """(rows of the tile, 1 or H, 1, used): 0 or `bias` where a row may look, -inf elsewhere; the same for all
        layers of a step."""
        if (start, window) not in self._bias:
            columns, last = torch.arange(used, device=span.device), span[:, None, None, None]
            hidden = columns > last
            if window:
                hidden |= columns <= last - window
            seen = torch.zeros((), dtype=dtype, device=span.device) if bias is None else bias[..., :used]
            self._bias[start, window] = torch.where(hidden, float("-inf"), seen)
        return self._bias[start, window]


def _prompt_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
                      bias: Tensor | None) -> Tensor:
    """Prompts stand on the left and are padded on the right, so causality alone keeps padding out of real tokens."""
    width, mask = query.shape[2], None
    if window and width > window or bias is not None:
        places = torch.arange(width, device=query.device)
        distance = places[:, None] - places
        mask = (distance >= 0) & (distance < (window or width))
        mask = mask if bias is None else torch.where(mask, bias[..., :width], float("-inf"))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
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

    for layer in layers:
        layer.__class__ = _BloomSlots
    if layers:
        model.register_forward_pre_hook(pass_on, with_kwargs=True)
        model.set_attn_implementation = lambda _name: None  # it has but one, and would warn
    return model
