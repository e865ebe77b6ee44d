"""Token rows -> batches: padding sides, masks, and a sampler that is a pure function."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import causal_lm

from dschat_kit.config import ConfigError
from dschat_kit.data.datasets import (
    StepSampler,
    TokenRows,
    by_length,
    chunks,
    packed_sft_batch,
    pad_prompts,
    preference_batch,
    ranked_batch,
    sft_batch,
)
from dschat_kit.data.store import table_writer
from dschat_kit.models.loading import can_pack
from dschat_kit.models.scalar_model import last_token
from dschat_kit.rlhf.logprobs import sequence_logprobs
from dschat_kit.rlhf.losses import preference_loss, sft_loss

PAD = 9  # also a token of the second response: masks, never ids, say what is padding
ROWS = [{"sample_id": "a", "prompt": "p", "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"sample_id": "b", "prompt": "q", "prompt_ids": [1], "chosen_ids": [7, PAD], "rejected_ids": [8, 8, 8, 8]}]


def test_sft_rows_are_padded_on_the_right():
    batch = sft_batch(ROWS, PAD)
    assert batch.sequences.tolist() == [[1, 2, 3, 4, 5], [1, 7, PAD, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.response_mask.tolist() == [[False] * 3 + [True] * 2, [False, True, True, False, False]]
    assert batch.to("cpu").sequences is batch.sequences


def test_pairs_are_two_halves_with_the_same_prompts():
    batch = preference_batch(ROWS, PAD)
    assert batch.sequences.tolist() == [[1, 2, 3, 4, 5], [1, 7, PAD, PAD, PAD], [1, 2, 3, 6, PAD], [1, 8, 8, 8, 8]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4, 5]
    assert batch.response_mask.sum(1).tolist() == [2, 2, 1, 4]


def test_prompts_are_padded_on_the_left_and_keep_who_they_are():
    batch = pad_prompts(ROWS, PAD)
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [PAD, PAD, 1]]
    assert batch.attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert (batch.sample_ids, batch.prompts) == (["a", "b"], ["p", "q"])


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@given(lengths)
def test_nothing_is_lost_in_padding(sizes):
    rows = [{"prompt_ids": list(range(10, 10 + p)), "chosen_ids": list(range(50, 50 + r))} for p, r in sizes]
    batch = sft_batch(rows, 0)
    for i, row in enumerate(rows):
        assert batch.sequences[i][batch.attention_mask[i]].tolist() == row["prompt_ids"] + row["chosen_ids"]
        assert batch.sequences[i][batch.response_mask[i]].tolist() == row["chosen_ids"]
        assert (batch.sequences[i][~batch.attention_mask[i]] == 0).all()


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 100))
def test_an_epoch_reads_each_row_at_most_once(batch_size, more, seed):
    sampler = StepSampler(rows=batch_size + more, batch_size=batch_size, seed=seed)
    steps = [sampler.indices(step) for step in range(sampler.steps_per_epoch)]
    seen = [i for step in steps for i in step]
    assert all(len(step) == batch_size for step in steps) and len(set(seen)) == len(seen) == batch_size * len(steps)
    again = StepSampler(rows=batch_size + more, batch_size=batch_size, seed=seed)  # after a resume: no state
    assert (again.indices(len(steps) - 1) == steps[-1]).all()


def ranked_rows() -> list[dict]:
    """Four ranked answers as six pairs, and two pairs that stand alone though they say the same."""
    answers = [[4, 5], [6], [7, 8, 9], [5]]
    rows = [{"sample_id": f"s-0000abcd+{number:016x}", "prompt_ids": [1, 2], "chosen_ids": better,
             "rejected_ids": worse}
            for number, (better, worse) in enumerate(itertools.combinations(answers, 2))]
    alone = {"prompt_ids": [1, 2], "chosen_ids": [4, 5], "rejected_ids": [6]}
    return [*rows, {"sample_id": "s-" + "1" * 16, **alone}, {"sample_id": "s-" + "2" * 16, **alone}]


def test_a_ranking_costs_one_forward_a_response_and_gives_the_gradient_of_all_pairs():
    """Ouyang et al. 2022, section 3.5."""
    torch.manual_seed(0)
    rows, table, found = ranked_rows(), torch.randn(10), []
    batch, places = ranked_batch(rows, PAD)
    assert len(batch.sequences) == 4 + 2 * 2 and len(places) == 2 * len(rows)
    pairs = preference_batch(rows, PAD)
    for some, index in ((batch, places), (pairs, torch.arange(2 * len(rows)))):
        weights = table.clone().requires_grad_()
        scores = last_token(weights[some.sequences].cumsum(1), some.attention_mask)[index]
        loss, _ = preference_loss(*scores.chunk(2), pairs=len(rows))
        loss.backward()
        found.append((scores.detach(), weights.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_the_pairs_of_a_ranking_stay_together_in_a_step_on_a_rank_and_in_a_micro_batch():
    rankings = np.array([0, 1, 2, 2, 3, 2, 4, 5, 5, 6, 5, 7])
    plain, ranked = (StepSampler(rows=12, batch_size=12, seed=3, rankings=some) for some in (None, rankings))
    order = ranked.indices(0)
    assert sorted(order) == list(range(12)) and (np.diff(rankings[order]) != 0).sum() == 7
    first = [rankings[i] for i in plain.indices(0)]
    assert list(dict.fromkeys(rankings[order])) == list(dict.fromkeys(first))
    shares = [ranked.share(0, rank, 2) for rank in range(2)]
    assert np.concatenate(shares).tolist() == order.tolist() and plain.share(0, 1, 2).tolist() == \
        plain.indices(0)[1::2].tolist()
    alone = StepSampler(rows=12, batch_size=12, seed=3, rankings=np.arange(12))
    assert alone.indices(1).tolist() == plain.indices(1).tolist()
    rows = ranked_rows()
    mixed = [rows[i] for i in (6, 0, 3, 7, 1, 5, 2, 4)]
    names = [row["sample_id"][:10] for row in by_length(mixed)]
    assert sum(a != b for a, b in itertools.pairwise(names)) == 2  # the two, then the ranking


def test_the_second_epoch_is_in_another_order():
    sampler = StepSampler(rows=64, batch_size=64, seed=0)
    assert sorted(sampler.indices(0)) == sorted(sampler.indices(1)) and (sampler.indices(0) != sampler.indices(1)).any()


def test_steps_are_bounded_by_epochs_and_by_max_steps():
    sampler = StepSampler(rows=100, batch_size=32, seed=0)
    assert [sampler.steps(2, bound) for bound in (0, 4, 99)] == [6, 4, 6]


def test_too_few_rows_for_one_batch_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size: got 32, with 31 rows\n.*expected(.|\n)*change"):
        StepSampler(rows=31, batch_size=32, seed=0)


def test_rows_come_from_disk_in_the_order_asked_for(tmp_path):
    (tmp_path / "rows").mkdir()
    stream, write = table_writer(tmp_path / "rows" / "table.arrow", with_tokens=True)
    with stream:
        write([["a", "b"], ["s", "s"], ["p", "q"], ["x", "y"], ["", ""],
               *([row[name] for row in ROWS] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))])
    np.save(tmp_path / "rows" / "sft.npy", [1, 0])
    rows = TokenRows(tmp_path, "sft")
    assert len(rows) == 2 and list(rows.table["prompt"]) == ["q", "p"]
    assert [row["chosen_ids"] for row in rows.take(torch.tensor([1, 0, 1]))] == [[4, 5], [7, PAD], [4, 5]]
    assert rows.rankings() is None
    rows.table = {"sample_id": [row["sample_id"] for row in ranked_rows()]}
    assert len(set(rows.rankings()[:6])) == 1 and len(set(rows.rankings())) == 3


def test_chunks_cover_everything():
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]


@given(lengths)
def test_nothing_is_lost_in_packing(sizes):
    rows = [{"prompt_ids": [100 * i + 1] * p, "chosen_ids": [100 * i + 2] * r} for i, (p, r) in enumerate(sizes)]
    batch = packed_sft_batch(rows, 0)
    assert batch.sequences.shape[1] == max(p + r for p, r in sizes) and len(batch.sequences) <= len(rows)
    assert sorted(batch.sequences[batch.attention_mask].tolist()) == sorted(
        token for row in rows for token in row["prompt_ids"] + row["chosen_ids"])
    assert sorted(batch.sequences[batch.response_mask].tolist()) == sorted(t for row in rows for t in row["chosen_ids"])
    starts = (batch.position_ids == 0) & batch.attention_mask
    assert starts.sum() == len(rows) and not (starts & batch.response_mask).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_loss_of_packed_rows_is_that_of_padded_ones_where_the_family_keeps_them_apart(family):
    model = causal_lm(family)
    rows = [{"prompt_ids": list(range(2, 2 + p)), "chosen_ids": list(range(50, 50 + r))}
            for p, r in ((9, 7), (3, 2), (4, 3), (2, 9), (0, 5))]
    apart = can_pack(model)
    assert apart == (family != "opt")  # it makes a mask of its own, in which all tokens see those before them
    losses = []
    for batch in (sft_batch(rows, 0), packed_sft_batch(rows, 0)):
        logprobs = sequence_logprobs(model, batch.sequences, batch.attention_mask, batch.response_mask,
                                     batch.position_ids)
        losses.append(sft_loss(logprobs, 25)[0].item())
    assert (abs(losses[0] - losses[1]) <= 1e-5) == apart
    assert len(packed_sft_batch(rows, 0).sequences) == 3
