"""Splits and blends: disjoint, deterministic, by quota."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.data.datasets import rank_share
from dschat_kit.data.splits import PARTS, blend, epoch_order, part_of, resolve_weights

SHARES = (0.2, 0.4, 0.4)


@given(st.text(max_size=40), st.floats(0.01, 0.9))
def test_the_part_of_a_prompt_is_a_function_of_its_words(key, fraction):
    part = part_of(key, SHARES, fraction)
    assert part in PARTS
    assert part == part_of("  " + "  ".join(key.split()) + "\n", SHARES, fraction)


def test_parts_have_their_shares():
    parts = [part_of(f"question {i}", SHARES, 0.1) for i in range(20_000)]
    found = {part: parts.count(part) / len(parts) for part in PARTS}
    assert found == pytest.approx({"eval": 0.1, "sft": 0.18, "reward": 0.36, "ppo": 0.36}, abs=0.012)


def test_another_share_for_evaluation_moves_no_prompt_between_stages():
    for i in range(500):
        without, part = part_of(str(i), SHARES, 0.0), part_of(str(i), SHARES, 0.3)
        assert without != "eval" and part in ("eval", without)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), st.integers(0, 2_000))
def test_every_window_of_a_thousand_keeps_the_weights(weights, start):
    weights = np.asarray(weights) / np.sum(weights)
    order = blend(weights, [4_000] * len(weights))
    exhausted = [np.flatnonzero(order[:, 0] == i)[-1] for i in range(len(weights)) if (order[:, 0] == i).sum() == 4_000]
    last = min(exhausted, default=len(order))
    window = order[start:start + 1_000, 0]
    assert last >= 3_000 and start + len(window) <= last + 1
    found = np.bincount(window, minlength=len(weights)) / 1_000
    assert np.abs(found - weights).max() <= 0.01


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any))
def test_without_weights_every_row_comes_once(sizes):
    order = blend(resolve_weights([None] * len(sizes), sizes), sizes)
    assert sorted(map(tuple, order)) == [(source, row) for source, size in enumerate(sizes) for row in range(size)]


def test_a_blend_stops_when_a_source_runs_out():
    order = blend(resolve_weights([3.0, 1.0], [30, 1_000]), [30, 1_000])
    assert (np.bincount(order[:, 0]) == [30, 10]).all()


def test_a_missing_weight_among_weights_counts_one():
    assert resolve_weights([3.0, None], [10, 500]).tolist() == [0.75, 0.25]


@given(st.integers(0, 300), st.integers(0, 10**9), st.integers(0, 50))
def test_an_epoch_is_a_permutation_that_depends_on_its_arguments_alone(rows, seed, epoch):
    order = epoch_order(rows, seed, epoch)
    assert sorted(order) == list(range(rows)) and (order == epoch_order(rows, seed, epoch)).all()


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 99))
def test_any_number_of_ranks_sees_the_same_rows(ranks, per_rank, seed):
    batch = epoch_order(ranks * per_rank, seed, 0)
    shares = [rank_share(batch, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {per_rank}
    assert sorted(np.concatenate(shares)) == sorted(batch)
