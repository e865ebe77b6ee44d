"""Is the fast path the model? The first prompts, greedily, against plain transformers."""

import torch
from torch import Tensor, nn

from dschat_kit.engine.attention import ATTENTION, KVSlots
from dschat_kit.engine.decode import Slots, decode
from dschat_kit.engine.rollout_types import KitRequest, KitSampling

__all__ = ["first_difference"]

PROMPTS, TOKENS = 4, 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference of a layer's output, relative to its largest entry, that rounding explains."""


@torch.no_grad()
def first_difference(model: nn.Module, request: KitRequest) -> str | None:
    """None when the fast path says what `model.generate` says, or differs by no more than rounding; otherwise the
    first layer that differs and by how much. Leaves the model's attention implementation changed."""
    lengths = request.prompt_attention_mask.sum(1)
    shortest = lengths.argsort()[:PROMPTS]
    width = int(lengths[shortest].max())
    some = KitRequest(prompt_ids=request.prompt_ids[shortest, -width:],
                      prompt_attention_mask=request.prompt_attention_mask[shortest, -width:])
    limit = getattr(model.config, "max_position_embeddings", width + TOKENS)
    sampling = KitSampling(max_new_tokens=max(1, min(TOKENS, limit - width)), temperature=0.0)
    model.set_attn_implementation("sdpa")
    plain = model.generate(input_ids=some.prompt_ids, attention_mask=some.prompt_attention_mask.long(), use_cache=True,
                           do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=None, pad_token_id=0)
    expected = [_layers(model, lambda row=row, real=real: model(input_ids=row[real][None], use_cache=False))
                for row, real in _real(plain, some)]
    model.set_attn_implementation(ATTENTION)
    batch = decode(Slots(model, KVSlots(len(shortest), width + sampling.max_new_tokens)), some, sampling)
    if torch.equal(batch.input_ids[:, width:], plain[:, width:]):
        return None
    return _locate(model, plain, some, sampling.max_new_tokens, expected)


def _real(plain: Tensor, request: KitRequest) -> list[tuple[Tensor, Tensor]]:
    width = request.prompt_ids.shape[1]
    masks = torch.ones_like(plain, dtype=torch.bool)
    masks[:, :width] = request.prompt_attention_mask.bool()
    return list(zip(plain, masks, strict=True))


def _locate(model: nn.Module, plain: Tensor, request: KitRequest, new: int, expected: list) -> str | None:
    """Feed the fast path the plain tokens and compare every layer's output at the positions of the new tokens."""
    worst, tolerance = None, TOLERANCE[next(model.parameters()).dtype]
    for (row, real), layers in zip(_real(plain, request), expected, strict=True):
        tokens = row[real]
        length, steps = len(tokens) - new, Slots(model, KVSlots(1, len(tokens)))
        found = [_layers(model, lambda steps=steps, tokens=tokens, length=length: steps.admit([tokens[:length]], [0]))]
        for place in range(length, len(tokens)):
            position = torch.tensor([place], device=tokens.device)
            found.append(_layers(model, lambda steps=steps, tokens=tokens, position=position:
                                 steps.step(tokens[position], position)))
        for layer, outputs in enumerate(zip(*found, strict=True)):
            ours, theirs = torch.cat(outputs), layers[layer]
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= tolerance and (worst is None or layer < worst[0]):
                worst = layer, difference
    return worst and f"layer {worst[0]} differs from plain transformers by {worst[1]:.2g} of its largest entry"


def _layers(model: nn.Module, forward) -> list[Tensor]:
    """The output (tokens, width) of every decoder layer in a forward pass over one row."""
    outputs: list[Tensor] = []
    count = model.config.num_hidden_layers
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)

    def keep(_module, _inputs, output) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0].float())
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return outputs
