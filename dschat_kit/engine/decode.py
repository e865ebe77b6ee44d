"""The decode loop: prompts in, sampled tokens with their log-probabilities out.

Prompts are computed longest first, in groups of similar length; a row that has stopped gives its place to the next
prompt at once (continuous batching), and n samples of a prompt share its computation. Two ways to compute a step:
`Slots` for the families of engine/attention.py, `Plain` (transformers' own attention and cache) for every other model.

Shapes: B sequences, P prompt, A response tokens, V vocabulary, n active rows.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dschat_kit.engine.attention import KVSlots
from dschat_kit.engine.rollout_types import KitBatch, KitRequest, KitSampling
from dschat_kit.engine.sampling import NEVER, row_uniforms, sample_tokens
from dschat_kit.models.loading import accepts, model_inputs
from dschat_kit.runs import RunError

PREFILL_TOKENS = 4096
"""Tokens of prompts, padding included, that one forward pass computes."""


class Slots:
    """Steps through `KVSlots`: rows of any length beside each other, places refilled one by one."""

    def __init__(self, model: nn.Module, kv: KVSlots):
        self.model, self.kv = model, kv

    @property
    def rows(self) -> list[int]:
        """Active rows in the order of the logits that `step` returns."""
        return self.kv.rows

    def room(self) -> int:
        """Rows that can be admitted now; waiting for a few of them saves forward passes."""
        free = self.kv.slots - len(self.rows)
        return free if free >= self.kv.slots // 8 or not self.rows else 0

    def admit(self, ids: Tensor, mask: Tensor, rows: list[int]) -> Tensor:
        """(prompts, V) logits of the first response tokens to `ids`, prompts padded on the left to the longest; `rows`
        holds every sample of each."""
        self.kv.place(rows)
        first, last = mask.int().argmax(1, keepdim=True), ids.shape[1] - 1
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
        ids = ids.gather(1, (first + positions).clamp(max=last))
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last - first,
                          cache=self.kv).logits[:, 0]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(n, V) logits after feeding each active row its last token (n,), which stands at positions (n,)."""
        self.kv.advance(positions)
        return self.model(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False,
                          cache=self.kv).logits[:, 0]

    def retire(self, stopped: list[int], used: int) -> None:
        """Give the places of rows free; no row holds more than `used` tokens."""
        self.kv.retire(stopped, used)


class Plain:
    """Steps through transformers' own attention and DynamicCache, left-padded: as many rows as one group has. Rows
    that have stopped leave; new ones are admitted when all have."""

    def __init__(self, model: nn.Module, slots: int):
        self.model, self.slots, self.rows = model, slots, []

    def room(self) -> int:
        """Rows that can be admitted now."""
        return 0 if self.rows else self.slots

    def admit(self, ids: Tensor, mask: Tensor, rows: list[int]) -> Tensor:
        """As Slots.admit."""
        self.rows, copies = list(rows), len(rows) // len(ids)
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask)
        self.cache.batch_repeat_interleave(copies)
        self.mask = mask.repeat_interleave(copies, 0)
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002  the mask says where a row is
        """As Slots.step."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return self._forward(tokens[:, None], self.mask)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs = model_inputs(self.model, ids, mask)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -ids.shape[1]:]
        keep_last = {"logits_to_keep": 1} if accepts(self.model, "logits_to_keep") else {}
        return self.model(**inputs, past_key_values=self.cache, use_cache=True, **keep_last).logits[:, -1]

    def retire(self, stopped: list[int], used: int) -> None:  # noqa: ARG002
        """As Slots.retire."""
        keep = [place for place, row in enumerate(self.rows) if row not in set(stopped)]
        if stopped and keep:
            index = torch.tensor(keep, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]
        self.rows = [self.rows[place] for place in keep]


class _Responses:
    """What has been sampled so far, by row."""

    def __init__(self, request: KitRequest, sampling: KitSampling):
        B, A, device = request.prompt_ids.shape[0], sampling.max_new_tokens, request.prompt_ids.device
        self.sampling, self.lengths, n = sampling, request.row_lengths, sampling.n_samples_per_prompt
        self.uniforms = row_uniforms(request.row_seeds, A, n).to(device) if sampling.temperature > 0 else None
        self.stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        self.tokens = torch.full((B * n, A), sampling.pad_token_id, dtype=torch.long, device=device)
        self.logprobs, self.entropy = torch.zeros(2, B * n, A, device=device)
        self.count = torch.zeros(B * n, dtype=torch.long, device=device)
        self.finished = torch.zeros(B * n, dtype=torch.bool, device=device)

    def take(self, rows: list[int], logits: Tensor) -> list[int]:
        """Sample the next token of each row from logits (n, V); the rows that have stopped or are full."""
        index = torch.tensor(rows, device=logits.device)
        place, forced = self.count[index], None
        if self.lengths is not None:
            ends = place + 1 == self.lengths.to(index.device)[index]
            forced = torch.where(ends, self.stops[0], -1)
            never = max(NEVER, torch.finfo(logits.dtype).min)
            logits[:, self.stops] = logits[:, self.stops].masked_fill(~ends[:, None], never)
        uniforms = None if self.uniforms is None else self.uniforms[index, place]
        tokens, logprobs, entropy = sample_tokens(logits, uniforms, self.sampling, forced)
        bad = ~torch.isfinite(logprobs)
        if bad.any():
            row, token = min(zip(index[bad].tolist(), place[bad].tolist(), strict=True))
            raise RunError(f"the model gives no finite logits: row {row}, response token {token}\n"
                           "  change: a lower learning rate, or model.dtype=fp32")
        self.tokens[index, place], self.logprobs[index, place], self.entropy[index, place] = tokens, logprobs, entropy
        self.count[index] += 1
        stopped = torch.isin(tokens, self.stops)
        if self.sampling.stop_strings:
            said = (self.tokens[row, :count].tolist() for row, count in zip(rows, self.count[index], strict=True))
            stopped |= torch.tensor([self.sampling.text_stops(text) for text in said], device=index.device)
        self.finished[index] = stopped
        ended = stopped | (self.count[index] == self.tokens.shape[1])
        return index[ended].tolist()

    def batch(self, request: KitRequest) -> KitBatch:
        """All rows, in the order of the request, padded on the right to the longest response."""
        used, n = int(self.count.max()), self.sampling.n_samples_per_prompt
        mask = torch.arange(used, device=self.count.device) < self.count[:, None]
        ids, prompt_mask = (tensor.repeat_interleave(n, 0) for tensor in
                            (request.prompt_ids, request.prompt_attention_mask.bool()))
        return KitBatch(input_ids=torch.cat([ids, self.tokens[:, :used]], 1),
                        attention_mask=torch.cat([prompt_mask, mask], 1),
                        response_start_idx=torch.full_like(self.count, ids.shape[1]), response_mask=mask,
                        logprobs=self.logprobs[:, :used], entropy=self.entropy[:, :used], finished=self.finished)


@torch.no_grad()
def decode(steps: Slots | Plain, request: KitRequest, sampling: KitSampling) -> KitBatch:
    """Sample n_samples_per_prompt responses to each prompt; every one ends with a stop or max_new_tokens.

    Raises RunError naming row and token when the model gives no finite logits.
    """
    mask, n, said = request.prompt_attention_mask.bool(), sampling.n_samples_per_prompt, _Responses(request, sampling)
    lengths = mask.sum(1)
    waiting = lengths.argsort(descending=True, stable=True).tolist()
    while waiting or steps.rows:
        group = _group(waiting, lengths, steps.room() // n)
        if group:
            rows = [i * n + sample for i in group for sample in range(n)]
            index = torch.tensor(rows, device=lengths.device)
            columns = slice(mask.shape[1] - int(lengths[group[0]]), None)
            logits = steps.admit(request.prompt_ids[group, columns], mask[group, columns], rows).repeat_interleave(n, 0)
        else:
            rows = steps.rows
            index = torch.tensor(rows, device=lengths.device)
            place = said.count[index] - 1
            logits = steps.step(said.tokens[index, place], lengths[index // n] + place)
        stopped = said.take(rows, logits)
        if stopped:
            steps.retire(stopped, int((lengths[index // n] + said.count[index]).max()))
    return said.batch(request)


def _group(waiting: list[int], lengths: Tensor, room: int) -> list[int]:
    """Take the next prompts of similar length off the waiting list: at most `room`, PREFILL_TOKENS in all."""
    if not waiting or room == 0:
        return []
    count = min(room, max(1, PREFILL_TOKENS // int(lengths[waiting[0]])))
    group, waiting[:] = waiting[:count], waiting[count:]
    return group
