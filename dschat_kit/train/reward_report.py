"""How good a reward model is on held-out pairs: accuracy beside what guessing by length reaches, calibration, and where
it is right. Plain numpy; N pairs.
"""

import math

import numpy as np

from dschat_kit.data.datasets import TokenRows
from dschat_kit.data.sources import gold_of

Z = 1.959964
"""Of a 95 % interval."""


def accuracy_of(margins: np.ndarray) -> float:
    """Share of pairs whose chosen side is higher; ties count half."""
    return float(right(margins).mean())


def right(margins: np.ndarray) -> np.ndarray:
    """(N,) 1 where the chosen side is higher, 0 where it is lower, 1/2 for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def wilson(p: float, n: int) -> list[float]:
    """95 % interval of a share p of n (Wilson 1927)."""
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return [middle - half, middle + half]


def report(scores: np.ndarray, rows: TokenRows, scale: float) -> dict:
    """What result.json says about scores (N, 2) of chosen and rejected answers, whose differences divided by `scale`
    are log-odds. On the toy world also bayes_accuracy and the correlation of the true reward with length."""
    margins, table = scores[:, 0] - scores[:, 1], rows.take(range(len(scores)))
    tokens = np.array([[len(row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in table])
    longer = tokens[:, 0] - tokens[:, 1]
    edges = np.histogram_bin_edges(scores, bins=30)
    ahead = right(margins) - right(longer)
    half = Z * float(ahead.std()) / math.sqrt(len(ahead))
    found = {"accuracy": accuracy_of(margins), "accuracy_interval": wilson(accuracy_of(margins), len(margins)),
             "length_baseline_accuracy": accuracy_of(longer),
             "over_length_interval": [float(ahead.mean()) - half, float(ahead.mean()) + half],
             "margin": float(margins.mean()), "pairs": len(margins), **calibration(margins / scale),
             "by_length_difference": [{"tokens": float(longer[some].mean()), "accuracy": accuracy_of(margins[some]),
                                       "interval": wilson(accuracy_of(margins[some]), len(some)), "pairs": len(some)}
                                      for some in bins(longer, 7)],
             "score_histogram": {"edges": edges.tolist(), "chosen": np.histogram(scores[:, 0], edges)[0].tolist(),
                                 "rejected": np.histogram(scores[:, 1], edges)[0].tolist()}}
    gold = gold_of(table[0]["source"])
    if gold is not None and len({r["source"] for r in table}) == 1:
        true = np.array([[gold.gold_reward(r["prompt"], r[side]) for side in ("chosen", "rejected")] for r in table])
        found["bayes_accuracy"] = gold.bayes_accuracy(true[:, 0] - true[:, 1])
        found["gold_length_correlation"] = float(np.corrcoef(true.ravel(), tokens.ravel())[0, 1])
    return found


def calibration(log_odds: np.ndarray) -> dict:
    """Predicted against observed win rate of the answer that the model prefers, by bins of equally many pairs that
    `log_odds` (N,) of the chosen answer sort by size; and the expected calibration error (Guo et al. 2017, 1706.04599):
    the mean distance between the two."""
    sure, predicted = np.abs(log_odds), 1 / (1 + np.exp(-np.abs(log_odds)))
    rows = [{"margin": float(sure[some].mean()), "predicted": float(predicted[some].mean()),
             "observed": accuracy_of(log_odds[some]), "interval": wilson(accuracy_of(log_odds[some]), len(some)),
             "pairs": len(some)} for some in bins(sure, 10)]
    return {"by_margin": rows, "calibration_error":
            sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in rows) / len(log_odds)}


def bins(keys: np.ndarray, count: int) -> list[np.ndarray]:
    """Places of `keys` (N,) in at most `count` groups of rising keys and about equal size; equal keys stay together."""
    edges = np.unique(np.quantile(keys, np.arange(1, count) / count))
    group = np.searchsorted(edges, keys, side="right")
    return [np.flatnonzero(group == number) for number in np.unique(group)]
