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

from dschat_kit.models.attention import FAMILIES as INTERFACED
from dschat_kit.models.attention import causal_attention

ATTENTION = "dschat"
FAMILIES = (*INTERFACED, "bloom")
"""Model types that `attend` computes, and BLOOM with its linear biases (ALiBi)."""
TILE = 32
"""Slots that are read to the same length: a large tile reads padding, a small one costs more kernel calls."""
COLUMNS = 32
"""Columns by which a tile's memory grows."""


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes that one token of one row takes over all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


class UnknownAttention(Exception):
    """The model asks for something that `attend` does not compute; the plain path does."""


class KVSlots:
    """`slots` rows of up to `length` tokens a layer. Each tile has memory of its own, (TILE, K, columns, D) for keys
    and for values; on a CPU it follows the longest row, elsewhere it has all columns from the start, so that its
    address stays."""

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.tiles: list[list[int]] = [[] for _ in range(-(-slots // TILE))]  # rows by tile; slot = TILE * tile + place
        self._memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by layer and tile
        self._filled: list[tuple[int, int, int]] = []

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
        self._filled, left = [], list(rows)
        for index, tile in enumerate(self.tiles):
            free = self._size(index) - len(tile)
            some, left = left[:free], left[free:]
            if some:
                self._filled.append((index, len(tile), len(some)))
            tile += some

    def places(self) -> list[int]:
        """The slot of each active row, in the order of `rows`."""
        return [TILE * index + place for index, tile in enumerate(self.tiles) for place in range(len(tile))]

    def advance(self, positions: Tensor, used: int | None = None) -> None:
        """The step that follows writes the token of the i-th active row at column positions[i]. With `used` it
        computes every slot instead, active or not, and reads that many columns of each: nothing then depends on a
        value, only on sizes, and the step can be captured."""
        self._filled, self._masks, self._spans, start = [], {}, [], 0
        for index, tile in enumerate(self.tiles):
            if count := self._size(index) if used else len(tile):
                span = positions[start:start + count]
                shortest, longest = (0, used - 1) if used else (int(span.min()), int(span.max()))
                self._spans.append((index, start, span, shortest, longest + 1))
                start += count
        self._places = torch.arange(TILE, device=positions.device)

    def retire(self, rows: list[int], used: int) -> None:
        """Free the rows' slots: the last rows of a tile move into the gaps, with their first `used` columns."""
        gone, moves = set(rows), []
        for index, tile in enumerate(self.tiles):
            stay = [place for place, row in enumerate(tile) if row not in gone]
            gaps = [place for place in range(len(stay)) if tile[place] in gone]
            for gap, place in zip(gaps, stay[len(stay) - len(gaps):], strict=True):
                tile[gap] = tile[place]
                moves.append((index, gap, place))
            del tile[len(stay):]
        for layer in dict.fromkeys(layer for layer, _ in self._memory):
            for index, target, source in moves:
                for memory in self._memory[layer, index]:
                    memory[target, :, :used] = memory[source, :, :used]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None,
               bias: Tensor | None = None) -> Tensor:
        """(rows, queries, H, D) attention of new tokens to themselves and to what the slots hold; stores them. `bias`
        (H, 1, length) is added to the scores by column, the same in all layers."""
        if self._filled:
            copies, width = sum(count for *_, count in self._filled) // len(key), key.shape[2]
            parts = [new.repeat_interleave(copies, 0).split([count for *_, count in self._filled])
                     for new in (key, value)]
            for (index, place, count), *news in zip(self._filled, *parts, strict=True):
                for memory, new in zip(self._columns(layer, index, width, key), news, strict=True):
                    memory[place:place + count, :, :width] = new
            return _prompt_attention(query, key, value, scaling, window, bias)
        (n, H, _, D), K = query.shape, key.shape[1]
        query = query.reshape(n, K, H // K, D)  # heads that share keys are queries of one head
        output = torch.empty(n, 1, H, D, dtype=value.dtype, device=value.device)
        for index, start, span, shortest, used in self._spans:
            count, rows = len(span), slice(start, start + len(span))
            keys, values = self._columns(layer, index, used, key)
            places = self._places[:count]
            keys[places, :, span], values[places, :, span] = key[rows, :, 0], value[rows, :, 0]
            products = _as_products(key)
            used = keys.shape[2] if products else used
            mask = None
            if products or shortest + 1 < used or (window and used > window) or bias is not None:
                mask = self._mask(start, span, used, window, query.dtype, bias)
            step = _products if products else F.scaled_dot_product_attention
            found = step(query[rows], keys[:count, :, :used], values[:count, :, :used], attn_mask=mask, scale=scaling)
            output[rows] = found.view(count, 1, H, D)
        return output

    def _size(self, index: int) -> int:
        """Slots of a tile."""
        return min(TILE, self.slots - TILE * index)

    def _columns(self, layer: int, index: int, used: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a tile with at least `used` columns; on a CPU less than twice as many, once all rows in it
        have had their prefill."""
        held = self._memory.get((layer, index))
        wanted = min(self.length, -(-used // COLUMNS) * COLUMNS) if like.device.type == "cpu" else self.length
        if held and self._filled:  # the rows beside those that come may be longer
            wanted = max(wanted, held[0].shape[2])
        if held is None or not wanted <= held[0].shape[2] < 2 * wanted:
            shape = self._size(index), like.shape[1], wanted, like.shape[3]
            made = like.new_zeros(shape), like.new_zeros(shape)  # zeros, because what is masked has to be finite
            for new, old in zip(made, held or (), strict=held is not None):
                new[:, :, :old.shape[2]] = old[:, :, :wanted]
            self._memory[layer, index] = held = made
        return held

    def _mask(self, start: int, span: Tensor, used: int, window: int | None, dtype: torch.dtype,
              bias: Tensor | None) -> Tensor:
        """(rows of the tile, 1 or H, 1, used): 0 or `bias` where a row may look, -inf elsewhere; the same for all
        layers of a step."""
        if (start, window) not in self._masks:
            columns, last = torch.arange(used, device=span.device), span[:, None, None, None]
            hidden = columns > last
            if window:
                hidden |= columns <= last - window
            seen = torch.zeros((), dtype=dtype, device=span.device) if bias is None else bias[..., :used]
            self._masks[start, window] = torch.where(hidden, float("-inf"), seen)
        return self._masks[start, window]


def _as_products(like: Tensor) -> bool:
    """Whether one query a row is computed as batched matrix products over whole memory. On CPUs without AMX that is
    3 to 5 times as fast as torch's attention kernel in bf16, and up to 1.5 times in fp32; with AMX the kernel is."""
    return like.device.type == "cpu" and not (like.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())


def _products(query: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """(rows, K, queries of one head, D): softmax(scale QK + mask)V, with scores rounded to the dtype of the keys, as
    transformers' eager attention does."""
    mask = attn_mask.expand(-1, keys.shape[1], -1, -1).flatten(0, 1)
    scores = torch.baddbmm(mask, query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(query.shape)


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
