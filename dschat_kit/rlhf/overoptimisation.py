"""Reward over-optimisation (Gao et al. 2022, 2210.10760): what best-of-n reaches for every n, from one set of answers,
and how the true ("gold") reward depends on the distance d = sqrt(KL) from the first policy. Plain numpy.

Shapes: P prompts, N answers to each, M values of n.
"""

import math
from collections.abc import Sequence

import numpy as np

SHAPES = {"best-of-n": lambda d: d, "ppo": lambda d: np.log(np.maximum(d, 1e-9))}
"""gold = d (alpha - beta shape(d)), section 3.1; 0 at d = 0."""


def best_of_n(scores: np.ndarray, values: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """(P, M) expected `values` (P, N) of the answer with the highest of n `scores` (P, N), for each n in `ns`.

    Unbiased: the mean over all subsets of n answers (Nakano et al. 2021, 2112.09332, appendix I). ValueError for n
    outside 1..N.
    """
    N = scores.shape[1]
    if not all(1 <= n <= N for n in ns):
        raise ValueError(f"n: got {list(ns)}, expected 1 to {N}, the answers a prompt")
    ordered = np.take_along_axis(values, scores.argsort(1, kind="stable"), 1)
    # P(the best of n is the i-th lowest) = C(i - 1, n - 1) / C(N, n)
    chance = np.array([[math.comb(i, n - 1) / math.comb(N, n) for i in range(N)] for n in ns])
    return ordered @ chance.T


def best_of_n_kl(n: int) -> float:
    """Nats between best-of-n and the policy it draws from, where no two answers are alike; otherwise a bound."""
    return math.log(n) - (n - 1) / n


def distinct_kl(scores: np.ndarray, answers: Sequence[Sequence[str]], ns: Sequence[int]) -> np.ndarray:
    """(P, M) KL of best-of-n in nats where answers repeat: an answer y of frequency p is the best of n with probability
    F(y)^n - F(before y)^n, F counting answers up to its score. Frequencies are those among the N answers, so n should
    be well below N."""
    found = np.zeros((len(scores), len(ns)))
    for row, (line, texts) in enumerate(zip(scores, answers, strict=True)):
        highest: dict[str, list[float]] = {}
        for score, text in zip(line, texts, strict=True):
            highest.setdefault(text, []).append(score)
        counts = np.array([len(own) for _, own in sorted(highest.items(), key=lambda item: max(item[1]))])
        share, upto = counts / len(line), np.cumsum(counts) / len(line)
        for column, n in enumerate(ns):
            best = np.diff(upto ** n, prepend=0.0)
            kept = best > 0
            found[row, column] = (best[kept] * np.log(best[kept] / share[kept])).sum()
    return found


def fit(method: str, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, list[float]]:
    """(alpha, beta, gold at d = 0 of each curve) of least squares for curves of (d, gold), each (K,), that share alpha
    and beta. The start is fitted too: the mean of one batch of answers is too noisy to be subtracted."""
    bases = [np.stack([d, -d * SHAPES[method](d)], axis=1) for d, _ in curves]
    centred = [np.concatenate([part - part.mean(0) for part in parts]) for parts in (bases, [g for _, g in curves])]
    weights = np.linalg.lstsq(*centred, rcond=None)[0]
    starts = [float((gold - basis @ weights).mean()) for basis, (_, gold) in zip(bases, curves, strict=True)]
    return float(weights[0]), float(weights[1]), starts


def fitted(method: str, alpha: float, beta: float, d: np.ndarray) -> np.ndarray:
    """The curve's gold gain at distances d."""
    return d * (alpha - beta * SHAPES[method](d))


def turning_point(method: str, alpha: float, beta: float) -> float:
    """The distance at which the curve is highest, infinity where it never turns: alpha / (2 beta) for best-of-n,
    exp(alpha / beta - 1) for ppo."""
    if beta <= 0:
        return math.inf
    return max(alpha, 0.0) / (2 * beta) if method == "best-of-n" else math.exp(min(alpha / beta - 1, 700.0))
