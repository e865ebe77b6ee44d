"""The decode loop: left-padded prompts in, sampled tokens with their log-probabilities out.

Shapes: B sequences, P prompt, A response tokens, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling
from dschat_kit.models.loading import accepts, model_inputs
from dschat_kit.runs import RunError

__all__ = ["decode", "row_uniforms", "sample_tokens"]


def row_uniforms(seeds: Tensor, length: int) -> Tensor:
    """(B, length) uniform numbers in [0, 1), each row a function of its own seed alone."""
    rows = [np.random.Generator(np.random.Philox(key=int(seed))).random(length) for seed in seeds.tolist()]
    return torch.from_numpy(np.stack(rows))


def sample_tokens(logits: Tensor, uniforms: Tensor | None, sampling: KitSampling) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs), both (B,), from (B, V) logits by inverting the distribution function at `uniforms` (B,).

    Log-probabilities are those of the distribution that was sampled, temperature and filters included.
    """
    if sampling.temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        best, tokens = logprobs.max(-1)
        return tokens, best
    logprobs = _filtered(logits.float() / sampling.temperature, sampling).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    targets = (uniforms.to(logits.device) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _filtered(logits: Tensor, sampling: KitSampling) -> Tensor:
    if sampling.top_k > 0:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


@torch.no_grad()
def decode(model: nn.Module, request: KitRequest, sampling: KitSampling,
           keep_going: Callable[[bool], bool]) -> KitBatch:
    """Sample until every row has stopped or max_new_tokens are there.

    `keep_going(unfinished)` decides after each step: under ZeRO-3 every rank has to make the same number of forward
    passes, so it asks all of them. Raises RunError naming row and step when the model gives no finite logits.
    """
    mask, device = request.prompt_attention_mask.bool(), request.prompt_ids.device
    B, A = request.prompt_ids.shape[0], sampling.max_new_tokens
    uniforms = row_uniforms(request.row_seeds, A).to(device) if sampling.temperature > 0 else None
    stops = torch.tensor(sampling.stop_token_ids, device=device)
    tokens = torch.full((B, A), sampling.pad_token_id, dtype=torch.long, device=device)
    logprobs, kept = torch.zeros(B, A, device=device), torch.zeros(B, A, dtype=torch.bool, device=device)
    running, cache, fed = torch.ones(B, dtype=torch.bool, device=device), None, request.prompt_ids
    keep_last = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    for step in range(A):
        inputs = model_inputs(model, fed, mask)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -fed.shape[1]:]
        output = model(**inputs, past_key_values=cache, use_cache=True, **keep_last)
        cache, logits = output.past_key_values, output.logits[:, -1]
        chosen, chosen_logprobs = sample_tokens(logits, None if uniforms is None else uniforms[:, step], sampling)
        _check_finite(chosen_logprobs, running, step)
        tokens[:, step] = torch.where(running, chosen, tokens[:, step])
        logprobs[:, step] = chosen_logprobs.masked_fill(~running, 0)
        kept[:, step] = running
        running = running & ~torch.isin(chosen, stops)
        if not keep_going(bool(running.any())):
            break
        fed, mask = tokens[:, step:step + 1], torch.cat([mask, kept[:, step:step + 1]], dim=1)
    used = step + 1
    return KitBatch(input_ids=torch.cat([request.prompt_ids, tokens[:, :used]], dim=1),
                    attention_mask=torch.cat([request.prompt_attention_mask.bool(), kept[:, :used]], dim=1),
                    response_start_idx=torch.full((B,), request.prompt_ids.shape[1], device=device),
                    response_mask=kept[:, :used], logprobs=logprobs[:, :used], finished=~running)


def _check_finite(logprobs: Tensor, running: Tensor, step: int) -> None:
    bad = ~torch.isfinite(logprobs) & running
    if bad.any():
        raise RunError(f"the model gives no finite logits: row {int(bad.nonzero()[0])}, response token {step}\n"
                       "  change: a lower learning rate, or model.dtype=fp32")
