"""Is the fast path the model? The first prompts, greedily, against plain transformers: tokens and log-probabilities."""

from functools import partial

import torch
from torch import Tensor, nn

from dschat_kit.engine.attention import ATTENTION, KVSlots
from dschat_kit.engine.decode import Slots, decode
from dschat_kit.engine.rollout_types import KitRequest, KitSampling

PROMPTS, TOKENS = 4, 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference that rounding explains: of a log-probability in nats, of a layer relative to its largest entry."""


@torch.no_grad()
def first_difference(model: nn.Module, request: KitRequest) -> str | None:
    """None when the fast path says what `model.generate` says, or differs by no more than rounding; otherwise the
    first layer that differs and by how much. Leaves the model's attention implementation changed."""
    width = int(request.prompt_attention_mask[:PROMPTS].sum(1).max())
    some = KitRequest(prompt_ids=request.prompt_ids[:PROMPTS, -width:],
                      prompt_attention_mask=request.prompt_attention_mask[:PROMPTS, -width:])
    limit = getattr(model.config, "max_position_embeddings", width + TOKENS)
    sampling = KitSampling(max_new_tokens=max(1, min(TOKENS, limit - width)), temperature=0.0)
    model.set_attn_implementation("sdpa")
    said = model.generate(input_ids=some.prompt_ids, attention_mask=some.prompt_attention_mask.long(), use_cache=True,
                          do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=None, pad_token_id=0,
                          output_logits=True, return_dict_in_generate=True)
    plain, best = said.sequences, torch.stack(said.logits, 1).float().log_softmax(-1).amax(-1)
    model.set_attn_implementation(ATTENTION)
    batch = decode(Slots(model, KVSlots(len(some.prompt_ids), width + sampling.max_new_tokens)), some, sampling)
    close = float((batch.logprobs - best).abs().max()) <= TOLERANCE[next(model.parameters()).dtype]
    return None if close and torch.equal(batch.input_ids, plain) else _locate(model, plain, some)


def _locate(model: nn.Module, plain: Tensor, request: KitRequest) -> str | None:
    """The first layer whose output differs when both ways are fed the plain tokens."""
    width, tolerance, worst = request.prompt_ids.shape[1], TOLERANCE[next(model.parameters()).dtype], None
    for row, mask in zip(plain, request.prompt_attention_mask.bool(), strict=True):
        tokens = torch.cat([row[:width][mask], row[width:]])
        model.set_attn_implementation("sdpa")
        expected = _layers(model, partial(model, input_ids=tokens[None], use_cache=False))
        model.set_attn_implementation(ATTENTION)
        found = _layers(model, partial(_feed, model, tokens, int(mask.sum())))
        for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= tolerance and (worst is None or layer < worst[0]):
                worst = layer, difference
    return worst and f"layer {worst[0]} differs from plain transformers by {worst[1]:.2g} of its largest entry"


def _feed(model: nn.Module, tokens: Tensor, first: int) -> None:
    """One row through the fast path: its `first` tokens as a prompt, the others one by one."""
    steps = Slots(model, KVSlots(1, len(tokens)))
    steps.admit(tokens[None, :first], torch.ones_like(tokens[None, :first]), [0])
    for place in torch.arange(first, len(tokens), device=tokens.device):
        steps.step(tokens[place, None], place[None])


def _layers(model: nn.Module, forward) -> list[Tensor]:
    """The outputs (tokens, width) of every decoder layer while `forward` feeds one row."""
    count = model.config.num_hidden_layers
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def keep(place: int):
        return lambda _module, _inputs, output: outputs[place].append(
            (output[0] if isinstance(output, tuple) else output)[0].float())
    handles = [layer.register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs]
