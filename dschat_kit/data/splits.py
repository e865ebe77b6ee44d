"""Which record goes to which stage, and in which order sources are mixed. Index arithmetic only, deterministic."""

import hashlib

import numpy as np

__all__ = ["PARTS", "blend", "epoch_order", "part_of", "resolve_weights"]

PARTS = ("sft", "reward", "ppo", "eval")


def part_of(key: str, shares: tuple[float, float, float], eval_fraction: float) -> str:
    """sft | reward | ppo | eval by the hash of `key` alone.

    Neither row number, source nor seed matter, so the same prompt lands in the same part in every source and run.
    """
    text = " ".join(key.split()).encode("utf-8", "surrogatepass")
    held, stage = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64) / 2.0**64
    if held < eval_fraction:
        return "eval"
    return PARTS[int(np.searchsorted(np.cumsum(shares)[:-1], stage, side="right"))]


def resolve_weights(given: list[float | None], sizes: list[int]) -> np.ndarray:
    """Weights summing to 1: by size when none is given, otherwise a missing one counts as 1."""
    raw = sizes if all(w is None for w in given) else [1.0 if w is None else w for w in given]
    return np.asarray(raw, dtype=float) / float(np.sum(raw))


def blend(weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(N, 2) pairs (source, row) in an order whose every prefix follows `weights`; stops when a source runs out.

    Quota method (largest remainder): the next sample comes from the source that is furthest behind its share,
    so any 1,000 samples in a row are within one percentage point of the weights.
    """
    active = [i for i, weight in enumerate(weights) if weight > 0]
    taken, order = np.zeros(len(weights), dtype=int), []
    for position in range(1, sum(sizes) + 1):
        source = max(active, key=lambda i: weights[i] * position - taken[i])
        if taken[source] >= sizes[source]:
            break
        order.append((source, taken[source]))
        taken[source] += 1
    return np.asarray(order, dtype=np.int64).reshape(-1, 2)


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(rows): a pure function of its arguments, the same on every rank."""
    return np.random.default_rng([seed, epoch, rows]).permutation(rows)
