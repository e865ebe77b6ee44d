"""The embedded dialogue world: its gold reward, its writer and its preferences."""

import math
import random
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat_kit.data import toy

FACTS = toy.all_facts()
seeds = st.integers(min_value=0, max_value=2**31)
questions = st.lists(st.sampled_from(FACTS), min_size=1, max_size=2, unique=True)


def perfect(facts):
    return " Good question. " + " ".join(toy.statement(fact) for fact in facts)


def mistake(fact):
    return toy.statement(fact, toy.ATTRIBUTES[fact[0]][2][fact[1]][1])


@pytest.fixture(scope="module")
def rows():
    return list(toy.toy_rows(4000, 11))


@given(seed=seeds, short=st.integers(0, 20), extra=st.integers(0, 20))
def test_rows_are_deterministic_and_a_longer_stream_starts_with_the_shorter(seed, short, extra):
    assert list(islice(toy.toy_rows(short + extra, seed), short)) == list(toy.toy_rows(short, seed))


def test_seeds_differ_and_rows_have_the_promised_form(rows):
    assert list(toy.toy_rows(20, 1)) != list(toy.toy_rows(20, 2))
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "split_key"}
        assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("?\n\nAssistant:")
        for name in ("chosen", "rejected"):
            assert row[name].startswith(" ") and not row[name].startswith("  ") and row[name].endswith(".")


def test_split_key_is_the_unordered_set_of_questions(rows):
    by_key = {}
    for row in rows:
        by_key.setdefault(row["split_key"], set()).add(frozenset(toy.asked_facts(row["prompt"])))
    assert all(len(sets) == 1 for sets in by_key.values())
    assert len({frozenset(value) for value in by_key.values()}) == len(by_key)


def test_every_prompt_is_answerable(rows):
    for row in rows:
        assert toy.gold_reward(row["prompt"], perfect(toy.asked_facts(row["prompt"]))) == pytest.approx(1.0)


@given(facts=questions, greeting=st.sampled_from(toy.GREETINGS), seed=seeds)
def test_gold_of_the_writer_is_bounded_and_well_formed(facts, greeting, seed):
    prompt, answer = toy.make_prompt(facts, greeting), toy.write_answer(facts, random.Random(seed))
    parts = toy.gold_parts(prompt, answer)
    assert toy.asked_facts(prompt) == facts
    assert parts["well_formed"] == 1.0 and all(0.0 <= value <= 1.0 for value in parts.values())
    assert toy.gold_reward(prompt, answer) == pytest.approx(sum(w * parts[k] for k, w in toy.WEIGHTS.items()))


@given(facts=questions)
def test_each_fault_lowers_gold(facts):
    prompt, good = toy.make_prompt(facts), perfect(facts)
    share = toy.WEIGHTS["correct"] / len(facts)
    wrong = mistake(facts[0])
    assert toy.gold_reward(prompt, good) == pytest.approx(1.0)
    assert toy.gold_reward(prompt, good.replace(toy.statement(facts[0]), wrong)) == pytest.approx(1.0 - share)
    contradiction = toy.gold_parts(prompt, f"{good} {wrong}")
    assert contradiction["correct"] == pytest.approx(1 - 1 / len(facts)) and contradiction["brief"] == 0.0
    for worse in (f" {toy.RUDE_OPENINGS[0]}{good}", f"{good} {toy.COURTEOUS_CLOSINGS[0]}"):
        assert toy.gold_reward(prompt, worse) == pytest.approx(1.0 - toy.WEIGHTS["polite"])
    for needless in (toy.FILLERS[0], toy.statement(facts[0])):
        assert toy.gold_reward(prompt, f"{good} {needless}") == pytest.approx(1.0 - toy.WEIGHTS["brief"])
    other = next(fact for fact in FACTS if fact not in facts)
    assert toy.gold_parts(prompt, f"{good} {toy.statement(other)}")["brief"] == 0.0


@given(facts=questions, text=st.text(max_size=60))
def test_unfinished_text_and_garbage_get_nothing(facts, text):
    prompt, good = toy.make_prompt(facts), perfect(facts)
    assert toy.gold_reward(prompt, good, finished=False) == 0.0
    assert set(toy.gold_parts(prompt, good, finished=False).values()) == {0.0}
    for bad in (f"{good} {text}#", good[:-1], good[::-1], "", " ", ".", text + "~"):
        assert toy.gold_reward(prompt, bad) == 0.0


def test_a_foreign_prompt_is_refused_with_an_example():
    with pytest.raises(ValueError, match=r"got the prompt .*expected .*change"):
        toy.gold_reward("\n\nHuman: Hello, what is love?\n\nAssistant:", " Good question.")


def test_the_writer_never_reads_gold(monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("the writer looked at gold")

    for name in ("gold_reward", "gold_parts"):
        monkeypatch.setattr(toy, name, forbidden)
    assert toy.write_answer(FACTS[:2], random.Random(0))


def test_gold_is_hardly_correlated_with_length(rows):
    answers = [(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]
    gold = [toy.gold_reward(*answer) for answer in answers]
    for length in (len, lambda text: len(text.split())):
        assert abs(np.corrcoef(gold, [length(text) for _, text in answers])[0, 1]) < 0.3


def test_preferences_follow_bradley_terry(rows):
    gold = np.array(
        [[toy.gold_reward(r["prompt"], r[name]) for name in ("chosen", "rejected")] for r in rows]
    )
    gaps = gold[:, 0] - gold[:, 1]
    for size in np.unique(np.abs(gaps).round(6)):
        pairs = gaps[np.isclose(np.abs(gaps), size)]
        if size == 0 or len(pairs) < 50:
            continue
        expected = 1 / (1 + math.exp(-toy.PREFERENCE_SCALE * size))
        tolerance = 4 * math.sqrt(expected * (1 - expected) / len(pairs)) + 1 / len(pairs)
        assert abs((pairs > 0).mean() - expected) < tolerance
    noise = 4 * math.sqrt(0.25 / len(gaps))
    won = np.where(gaps == 0, 0.5, gaps > 0).mean()
    assert abs(won - toy.bayes_accuracy(gaps)) < noise


def test_bayes_accuracy_is_the_mean_win_probability():
    assert toy.bayes_accuracy([0.0, 0.0]) == 0.5
    gap = math.log(3) / toy.PREFERENCE_SCALE
    assert toy.bayes_accuracy([gap, -gap]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least one pair"):
        toy.bayes_accuracy([])
