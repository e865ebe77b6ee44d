"""Which rows go where: disjoint by prompt, nothing lost without being counted; filters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.config import Data
from dschat_kit.data.selection import ALL, LEFT_OUT, account_of, blend_rows, filter_rows, place_rows
from dschat_kit.data.sources import DataError
from dschat_kit.data.splits import key_words, part_of

ROW = st.tuples(st.integers(0, 2), st.integers(0, 25), st.sampled_from(["pair", "response", "text"]), st.booleans())


def numbers_of(rows):
    """Columns of (source, prompt number, kind, held out by the source) rows."""
    held, stage = zip(*(key_words(f"prompt {key}") for _, key, _, _ in rows), strict=True)
    n = len(rows)
    found = {"source": [r[0] for r in rows], "paired": [r[2] == "pair" for r in rows],
             "text": [r[2] == "text" for r in rows], "eval": [r[3] for r in rows], "content": list(range(n)),
             "margin": [float(i) for i in range(n)], "prompt": [4] * n, "chosen": [5] * n, "rejected": [5] * n}
    found |= {f"cut_{side}": [0] * n for side in ("prompt", "chosen", "rejected")}
    return {k: np.array(v) for k, v in found.items()} | {"held": np.array(held, dtype=np.uint64),
                                                         "stage": np.array(stage, dtype=np.uint64)}


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=60))
def test_no_prompt_stands_in_two_parts_and_every_row_is_counted(rows):
    numbers, data = numbers_of(rows), Data(stage_split="1,1,1", eval_fraction=0.2)
    part, left_out = place_rows(numbers, data, 3)
    keys = {name: set(numbers["held"][(part == i) & ~numbers["text"]]) for i, name in enumerate(ALL)}
    for i, a in enumerate(ALL):
        assert not any(keys[a] & keys[b] for b in ALL[i + 1:])
    assert not set(numbers["held"][part == ALL.index("ptx")]) & set(numbers["held"][numbers["eval"] & (part >= 0)])
    assert sum(counts.sum() for counts in left_out.values()) == (part == LEFT_OUT).sum()
    assert numbers["paired"][part == ALL.index("reward")].all()
    for i in np.flatnonzero(numbers["paired"] & (part != LEFT_OUT) & (part != ALL.index("eval"))):
        assert ALL[part[i]] == part_of(f"prompt {rows[i][1]}", data.split_shares(), 0.0)  # by the hash alone


def test_rows_without_a_rejected_response_are_shared_by_sft_and_ppo():
    rows = [(0, key, "response", False) for key in range(4000)]
    part, left_out = place_rows(numbers_of(rows), Data(stage_split="1,2,1", eval_fraction=0.1), 1)
    shares = np.bincount(part, minlength=len(ALL)) / 4000
    assert shares == pytest.approx([0.45, 0, 0.45, 0.1, 0, 0], abs=0.03) and not any(map(sum, left_out.values()))
    paired = [(0, key, "pair", False) for key in range(4000)]
    both, left_out = place_rows(numbers_of(rows + paired), Data(stage_split="1,2,1", eval_fraction=0.1), 1)
    assert left_out["the reward stage has the prompt"].sum() == (both[4000:] == 1).sum() > 1000


def test_text_is_for_pretraining_and_needs_no_part_elsewhere():
    rows = [(0, key, "pair", False) for key in range(300)] + [(1, key, "text", False) for key in range(300, 600)]
    numbers, data = numbers_of(rows), Data(stage_split="1,1,1", eval_fraction=0.2)
    part, _ = place_rows(numbers, data, 2)
    orders = blend_rows(numbers, part, ["pairs", "book"], [2.0, 1.0], data, 0)
    assert len(orders["ptx"]) + len(orders["ptx_eval"]) == 300 and min(map(len, orders.values())) > 20
    assert all((numbers["source"][orders[name]] == name.startswith("ptx")).all() for name in orders)
    assert list(blend_rows(numbers_of(rows[:300]), part[:300], ["pairs"], [None], data, 0)) == list(ALL[:4])


@pytest.mark.parametrize("setting, reason, gone", [
    ({"drop_duplicates": True}, "duplicate", [3]), ({"min_margin": 2.5}, "margin below min_margin", [0, 1, 2]),
    ({"drop_longer": True}, "longer than the limits", [5]),
    ({"min_response_tokens": 5}, "shorter than min_response_tokens", [4])])
def test_a_filter_leaves_out_what_it_says(setting, reason, gone):
    numbers = numbers_of([(0, key, "pair", False) for key in range(6)])
    numbers["content"][3], numbers["rejected"][4], numbers["cut_chosen"][5] = numbers["content"][1], 2, 1
    part = np.zeros(6, dtype=int)
    assert filter_rows(numbers, part, Data(), ["a"]) == {} and (part == 0).all()
    assert filter_rows(numbers, part, Data(**setting), ["a"]) == {reason: len(gone)}
    assert np.flatnonzero(part == LEFT_OUT).tolist() == gone


def test_a_margin_that_nobody_knows_is_refused():
    numbers = numbers_of([(0, 1, "pair", False)])
    numbers["margin"][0] = np.nan
    with pytest.raises(DataError, match="mine has rows without a margin(.|\n)*change"):
        filter_rows(numbers, np.zeros(1, dtype=int), Data(min_margin=1.0), ["mine"])


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=50))
def test_balanced_by_length_the_longer_one_wins_half_the_time(differences):
    numbers = numbers_of([(0, key, "pair", False) for key in range(len(differences))])
    numbers["chosen"] = 5 + np.array(differences)
    part = np.full(len(differences), ALL.index("reward"))
    counts = filter_rows(numbers, part, Data(balance_length=True), ["a"])
    left = np.sign(numbers["chosen"] - numbers["rejected"])[part != LEFT_OUT]
    assert left.sum() == 0 and (left == 0).sum() == differences.count(0)
    assert sum(counts.values()) == (part == LEFT_OUT).sum() == abs(np.sign(differences).sum())


def test_the_account_counts_overlaps():
    numbers = numbers_of([(0, 1, "pair", False), (0, 1, "pair", False), (1, 2, "pair", False)])
    account = account_of(numbers, {"sft": np.array([0, 2]), "reward": np.array([1])}, ["a", "b"])
    assert account["overlaps"] == {"sft and reward": 1}
    assert account["rows"] == {"a": {"sft": 1, "reward": 1}, "b": {"sft": 1, "reward": 0}}
    histogram = account["tokens"]["sft"]["chosen"]["histogram"]
    assert sum(histogram["counts"]) == 2 and len(histogram["edges"]) == len(histogram["counts"]) + 1
