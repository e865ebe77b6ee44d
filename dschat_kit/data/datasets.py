"""Token rows -> typed, padded batches. Which rows a step reads is a pure function of (seed, step): the data cursor
of a resumed run needs nothing but the step.

Shapes: B sequences, T prompt + response, P prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dschat_kit.data.splits import epoch_order
from dschat_kit.data.store import open_rows
from dschat_kit.sections import error


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Prompt + response, padded on the right."""
    sequences: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool: a real token
    response_mask: Tensor  # (B, T) bool: a real token of the response, its EOS included
    position_ids: Tensor | None = None
    """(B, T) int64 for packed rows: begins again at 0 with every row, which is how attention knows where one ends"""

    def to(self, device) -> "SequenceBatch":
        """The same batch on another device."""
        return SequenceBatch(**{name: value if value is None else value.to(device)
                                for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, padded on the left, with what is needed to follow and to seed each row."""
    prompt_ids: Tensor  # (B, P) int64
    attention_mask: Tensor  # (B, P) bool: a real token
    sample_ids: list[str]
    prompts: list[str]


class TokenRows:
    """One part (sft | reward | ppo | eval | ptx | ptx_eval) of the mapped table. Raises RunError when it is damaged."""

    def __init__(self, data_dir: Path, part: str):
        self.table = open_rows(data_dir, part)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, indices) -> list[dict]:
        """Rows as dictionaries, in the order of `indices`."""
        columns = self.table[[int(i) for i in indices]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def rankings(self) -> np.ndarray | None:
        """(N,) a number a row, the same for all pairs of one ranking; None where every pair stands alone."""
        names = [_ranking(sample_id, row) for row, sample_id in enumerate(self.table["sample_id"])]
        return np.unique(names, return_inverse=True)[1] if any(isinstance(name, str) for name in names) else None


def _ranking(sample_id: str, alone):
    """What the pairs of one ranking share; `alone` for a pair that is none of them."""
    return sample_id[:-16] if sample_id[-17:-16] == "+" else alone


@dataclass(frozen=True, kw_only=True)
class StepSampler:
    """Which rows an optimiser step reads: full batches of a reshuffled order an epoch, the remainder left out. Rows
    with the same number in `rankings` follow one another."""
    rows: int
    batch_size: int
    seed: int
    rankings: np.ndarray | None = None

    def __post_init__(self):
        if self.rows < self.batch_size:
            raise error("batch_size", f"{self.batch_size}, with {self.rows} rows", "at least one full batch",
                        "a smaller batch_size or more rows in data.sources")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches that the rows make."""
        return self.rows // self.batch_size

    def steps(self, epochs: int, max_steps: int) -> int:
        """Optimiser steps of a stage; max_steps 0 is no bound."""
        return min(epochs * self.steps_per_epoch, max_steps or epochs * self.steps_per_epoch)

    def indices(self, step: int) -> np.ndarray:
        """(batch_size,) rows of step 0, 1, ...; the same on every rank and after a resume."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.rows, self.seed, epoch)
        if self.rankings is not None:  # each ranking stands where its first pair does
            _, first, ranking = np.unique(self.rankings[order], return_index=True, return_inverse=True)
            order = order[np.argsort(first[ranking], kind="stable")]
        return order[position * self.batch_size:][: self.batch_size]

    def share(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Those rows of a step that one rank computes; with rankings, rows that follow one another."""
        if self.rankings is None:
            return rank_share(self.indices(step), rank, world_size)
        return np.split(self.indices(step), world_size)[rank]


def rank_share(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of a global batch that one rank computes: every world_size-th, so that lengths spread evenly."""
    return indices[rank::world_size]


def by_length(rows: list[dict]) -> list[dict]:
    """The same rows with similar lengths side by side, so that little of a micro batch is padding; a ranking's pairs
    stay together."""
    places: dict = {}  # of each ranking: its greatest length, and its first row
    names = [_ranking(row["sample_id"], place) for place, row in enumerate(rows)]
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        longest, first = places.get(name, (0, place))
        places[name] = max(longest, length), first
    return [rows[i] for i in sorted(range(len(rows)), key=lambda place: places[names[place]])]


def _sequences(lines: list[list[tuple[list[int], list[int]]]], pad_id: int, packed: bool = False) -> SequenceBatch:
    """A sequence of each line's (prompt, response) rows. The first token of a row is not predicted: no response has it.
    """
    def padded(value, fill=0) -> Tensor:
        """(B, T) of value(prompt, response), a tensor as long as the row."""
        return pad_sequence([torch.cat([value(*row) for row in line]) for line in lines], True, fill)
    return SequenceBatch(
        sequences=padded(lambda p, r: torch.tensor(p + r), pad_id),
        attention_mask=padded(lambda p, r: torch.ones(len(p) + len(r), dtype=torch.bool)),
        response_mask=padded(lambda p, r: torch.arange(len(p) + len(r)) >= max(1, len(p))),
        position_ids=padded(lambda p, r: torch.arange(len(p) + len(r))) if packed else None)


def sft_batch(rows: list[dict], pad_id: int) -> SequenceBatch:
    """Prompts with their chosen responses."""
    return _sequences([[(r["prompt_ids"], r["chosen_ids"])] for r in rows], pad_id)


def packed_sft_batch(rows: list[dict], pad_id: int) -> SequenceBatch:
    """`sft_batch` with several short rows in one sequence, none longer than the longest row (first fit decreasing).

    For models that keep packed rows apart (models.loading.can_pack).
    """
    pairs = sorted(((r["prompt_ids"], r["chosen_ids"]) for r in rows), key=lambda pair: -len(pair[0] + pair[1]))
    lines, free = [], []
    for prompt, response in pairs:
        length = len(prompt) + len(response)
        fit = next((i for i, room in enumerate(free) if room >= length), len(lines))
        if fit == len(lines):
            lines.append([])
            free.append(len(pairs[0][0]) + len(pairs[0][1]))
        lines[fit].append((prompt, response))
        free[fit] -= length
    return _sequences(lines, pad_id, packed=True)


def preference_batch(rows: list[dict], pad_id: int) -> SequenceBatch:
    """2B sequences: the chosen responses in the first half, the rejected ones of the same prompts in the second."""
    return _sequences([[(r["prompt_ids"], r[side])] for side in ("chosen_ids", "rejected_ids") for r in rows], pad_id)


def ranked_batch(rows: list[dict], pad_id: int) -> tuple[SequenceBatch, Tensor]:
    """(each response once, (2B,) places in it: of the chosen responses, then of the rejected ones). Ouyang et al. 2022,
    section 3.5: all pairs of a ranking in one batch, with one forward pass a response."""
    found: dict = {}
    places = [found.setdefault((_ranking(row["sample_id"], (side, number)), *row["prompt_ids"], None, *row[side]),
                               (len(found), row, side))[0]
              for side in ("chosen_ids", "rejected_ids") for number, row in enumerate(rows)]
    return (_sequences([[(row["prompt_ids"], row[side])] for _, row, side in found.values()], pad_id),
            torch.tensor(places))


def pad_prompts(rows: list[dict], pad_id: int) -> PromptBatch:
    """Prompts padded on the left, so that every response begins in the same column."""
    ids = [torch.tensor(row["prompt_ids"]) for row in rows]
    return PromptBatch(
        prompt_ids=pad_sequence(ids, True, pad_id, "left"),
        attention_mask=pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in ids], True, False, "left"),
        sample_ids=[r["sample_id"] for r in rows], prompts=[r["prompt"] for r in rows])


def chunks(items, size: int) -> Iterator:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start:start + size]
