"""Best-of-n and the fits of over-optimisation, against brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.rlhf.overoptimisation import best_of_n, best_of_n_kl, distinct_kl, fit, fitted, turning_point


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(seed, n):
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    for row in range(2):
        best = [values[row][max(some, key=lambda i: scores[row][i])] for some in itertools.combinations(range(6), n)]
        assert best_of_n(scores, values, [n])[row, 0] == pytest.approx(np.mean(best))


def test_best_of_n_ends_at_the_mean_and_at_the_best():
    scores = np.array([[0.3, 0.1, 0.2]])
    assert best_of_n(scores, scores, [1, 3])[0] == pytest.approx([0.2, 0.3])
    for n in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            best_of_n(scores, scores, [n])


def test_best_of_n_of_uniform_scores_is_n_over_n_plus_1():
    """Also the published win rate against one sample."""
    scores = np.random.default_rng(0).random((200, 256))
    ns = (1, 4, 16)
    assert best_of_n(scores, scores, ns).mean(0) == pytest.approx([n / (n + 1) for n in ns], abs=5e-3)


def test_kl_of_best_of_n_in_numbers():
    assert [round(best_of_n_kl(n), 3) for n in (2, 4, 16, 64)] == [0.193, 0.636, 1.835, 3.175]


def test_kl_without_repeated_answers_is_the_formula_and_with_them_the_enumerated_one():
    rng = np.random.default_rng(0)
    scores, ns = rng.normal(size=(3, 512)), (1, 2, 8, 32)
    names = [[str(i) for i in range(512)]] * 3
    assert distinct_kl(scores, names, ns).mean(0) == pytest.approx([best_of_n_kl(n) for n in ns], abs=0.07)

    chances = np.array([0.5, 0.3, 0.2])  # scores rise with the name
    draws = rng.choice(3, size=(1, 200_000), p=chances)
    best = np.diff(np.cumsum(chances) ** 4, prepend=0)
    exact = (best * np.log(best / chances)).sum()
    assert distinct_kl(draws.astype(float), draws.astype(str), [4])[0, 0] == pytest.approx(exact, abs=5e-3)
    assert exact < best_of_n_kl(4)


@pytest.mark.parametrize("method", ["best-of-n", "ppo"])
def test_fits_find_the_coefficients_and_each_curve_s_own_start(method):
    rng, d = np.random.default_rng(0), np.linspace(0, 4, 60)
    curves = [(d, start + fitted(method, 0.8, 0.25, d) + rng.normal(0, 0.01, 60)) for start in (0.3, 0.7)]
    alpha, beta, starts = fit(method, curves)
    assert (alpha, beta) == pytest.approx((0.8, 0.25), abs=0.02) and starts == pytest.approx([0.3, 0.7], abs=0.02)


@pytest.mark.parametrize("method, alpha, beta", [("best-of-n", 0.8, 0.25), ("ppo", 0.5, 0.4)])
def test_the_turning_point_is_the_top_of_the_curve(method, alpha, beta):
    d = np.linspace(0.01, 6, 60_000)
    assert turning_point(method, alpha, beta) == pytest.approx(d[fitted(method, alpha, beta, d).argmax()], abs=1e-3)
    assert turning_point(method, alpha, -0.1) == math.inf
