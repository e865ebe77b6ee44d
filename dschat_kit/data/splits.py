"""Which record goes to which stage, and in which order sources are mixed. Index arithmetic only, deterministic."""

import hashlib

import numpy as np

PARTS = ("sft", "reward", "ppo", "eval")


def key_words(key: str) -> tuple[int, int]:
    """Two 64-bit words of a key's hash: one decides whether it is held out (and stands for the key), one its stage."""
    digest = hashlib.blake2b(" ".join(key.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def part_of(key: str, shares: tuple[float, float, float], eval_fraction: float) -> str:
    """sft | reward | ppo | eval by the hash of `key` alone.

    Neither row number, source nor seed matter, so the same prompt lands in the same part in every source and run.
    """
    held, stage = np.asarray(key_words(key), dtype=np.uint64)[:, None]
    return PARTS[parts_of(held, stage, shares, eval_fraction, np.array([True]))[0]]


def parts_of(held: np.ndarray, stage: np.ndarray, shares: tuple[float, float, float], eval_fraction,
             pairs: np.ndarray) -> np.ndarray:
    """(N,) index into PARTS for (N,) words of `key_words`; `eval_fraction` a number or one a row.

    A row without a rejected response (`pairs` False) is of no use to the reward stage: the interval of the hash that is
    the reward stage's is then divided between sft and ppo.
    """
    place, limits = stage / 2.0**64, np.cumsum(shares)[:-1]
    part = np.searchsorted(limits, place, side="right")
    inside = (place - limits[0]) / (limits[1] - limits[0])
    part[(part == 1) & ~pairs & (inside < shares[0] / (shares[0] + shares[2]))] = 0
    part[(part == 1) & ~pairs] = 2
    part[held / 2.0**64 < eval_fraction] = 3
    return part


def resolve_weights(given: list[float | None], sizes: list[int]) -> np.ndarray:
    """Weights summing to 1: by size when none is given, otherwise a missing one counts as 1."""
    raw = sizes if all(w is None for w in given) else [1.0 if w is None else w for w in given]
    return np.asarray(raw, dtype=float) / float(np.sum(raw))


def blend(weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(N, 2) pairs (source, row) in an order whose every prefix follows `weights`; stops when a source runs out.

    Quota method (largest remainder): the next sample comes from the source that is furthest behind its share,
    so any 1,000 samples in a row are within one percentage point of the weights.
    """
    share = [float(weight) for weight in weights]
    taken, order = [0] * len(share), []
    for position in range(1, int(sum(sizes)) + 1):
        source = max(range(len(share)), key=lambda i: share[i] * position - taken[i])
        if taken[source] >= sizes[source]:
            break
        order.append((source, taken[source]))
        taken[source] += 1
    return np.asarray(order, dtype=np.int64).reshape(-1, 2)


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(rows): a pure function of its arguments, the same on every rank."""
    return np.random.default_rng([seed, epoch, rows]).permutation(rows)
