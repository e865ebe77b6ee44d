"""Which rows go to which part, which are left out, in which order, and the account of it. Arithmetic on numbers of the
rows (pipeline.Numbers), never on their text, so a million rows cost seconds.
"""

from collections import Counter

import numpy as np

from dschat_kit.config import Data
from dschat_kit.data.sources import DataError
from dschat_kit.data.splits import PARTS, blend, epoch_order, parts_of, resolve_weights

Numbers = dict[str, np.ndarray]
"""(N,) each: source, held and stage (words of the key), paired, text, eval, margin, content; with the tokens also
prompt, chosen, rejected (their counts) and cut_prompt, cut_chosen, cut_rejected."""
ALL = (*PARTS, "ptx", "ptx_eval")
"""Plain text has parts of its own, and only where a source has any."""
LEFT_OUT = -1
SIDES = ("prompt", "chosen", "rejected")


def place_rows(numbers: Numbers, data: Data, sources: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """((N,) index into ALL or LEFT_OUT, {reason: (sources,) rows left out}).

    A prompt that any source holds out is left out of training in all of them. Held-out rows without a rejected response
    are of use only where no row has one.
    """
    source, paired, text = numbers["source"], numbers["paired"].astype(bool), numbers["text"].astype(bool)
    given = numbers["eval"].astype(bool)
    own = np.bincount(source, given, minlength=sources) > 0
    fraction = np.where(own[source], 0.0, data.eval_fraction)
    part = parts_of(numbers["held"], numbers["stage"], data.split_shares(), fraction, paired)
    part[given] = ALL.index("eval")
    held = part == ALL.index("eval")
    leaked = ~held & np.isin(numbers["held"], numbers["held"][held])
    # a prompt that another source has pairs of is the reward stage's
    borrowed = ~held & ~paired & ~text & np.isin(numbers["held"], numbers["held"][paired & (part == 1)])
    useless = held & ~paired & ~text & bool((held & paired).any())
    part[text] = np.where(held[text], ALL.index("ptx_eval"), ALL.index("ptx"))
    part[leaked | borrowed | useless] = LEFT_OUT
    reasons = {"held out": leaked, "the reward stage has the prompt": borrowed & ~leaked,
               "held out without a rejected response": useless}
    return part, {reason: np.bincount(source[which], minlength=sources) for reason, which in reasons.items()}


def filter_rows(numbers: Numbers, part: np.ndarray, data: Data, labels: list[str]) -> Counter[str]:
    """Set `part` of the rows that data.drop_*, min_* and balance_length leave out to LEFT_OUT; rows by reason."""
    paired = numbers["paired"].astype(bool)
    unknown = numbers["source"][paired & np.isnan(numbers["margin"])]
    if data.min_margin and len(unknown):
        raise DataError(f"data.min_margin: got {data.min_margin}, but {labels[unknown[0]]} has rows without a margin\n"
                        "  expected: a column margin, or score_chosen and score_rejected\n"
                        "  change:   --set data.min_margin=0, or another source")
    again = np.ones(len(part), dtype=bool)
    again[np.unique(numbers["content"], return_index=True)[1]] = False
    shortest = np.where(paired, np.minimum(numbers["chosen"], numbers["rejected"]), numbers["chosen"])
    reasons = {"duplicate": again & data.drop_duplicates,
               "longer than the limits": (sum(numbers[f"cut_{s}"] for s in SIDES) > 0) & data.drop_longer,
               "shorter than min_response_tokens": shortest < data.min_response_tokens,
               "margin below min_margin": paired & (numbers["margin"] < data.min_margin) & (data.min_margin > 0)}
    counts = Counter()
    for reason, which in reasons.items():
        counts[reason] = int((which & (part != LEFT_OUT)).sum())
        part[which] = LEFT_OUT
    if data.balance_length:
        counts["balance by length"] = _balance(numbers, part, len(labels))
    return +counts


def _balance(numbers: Numbers, part: np.ndarray, sources: int) -> int:
    dropped, longer = 0, np.sign(numbers["chosen"] - numbers["rejected"])
    for source in range(sources):
        here = (part == ALL.index("reward")) & (numbers["source"] == source)
        fewer, more = sorted((np.flatnonzero(here & (longer == sign)) for sign in (1, -1)), key=len)
        surplus = more[epoch_order(len(more), 0, 0)[len(fewer):]]
        part[surplus] = LEFT_OUT
        dropped += len(surplus)
    return dropped


def blend_rows(numbers: Numbers, part: np.ndarray, labels: list[str], given: list, data: Data,
               seed: int) -> dict[str, np.ndarray]:
    """The rows of each part in their order, at most data.eval_rows of the held-out ones."""
    orders, has_pairs = {}, np.bincount(numbers["source"], numbers["paired"], minlength=len(labels)) > 0
    is_text = np.bincount(numbers["source"], numbers["text"], minlength=len(labels)) > 0
    for index, name in enumerate(ALL):
        pools = [np.flatnonzero((part == index) & (numbers["source"] == s)) for s in range(len(labels))]
        due = is_text if name.startswith("ptx") else has_pairs if name == "reward" else ~is_text
        if name.startswith("ptx") and not due.any():
            continue
        empty = [label for label, pool, is_due in zip(labels, pools, due, strict=True) if is_due and not len(pool)]
        weighted = any(weight is not None for weight in given) and not name.endswith("eval")
        if empty and (weighted or len(empty) == sum(due)) and name != "ptx_eval":
            raise DataError(f"data.sources: no rows of {', '.join(empty)} are left for {name}\n"
                            f"  expected: at least one row for each of {', '.join(PARTS)}\n"
                            "  change:   more rows in data.sources, data.stage_split or data.eval_fraction")
        chosen = [(pool, weight) for pool, weight in zip(pools, given, strict=True) if len(pool)]
        shuffled, sizes = [pool[epoch_order(len(pool), seed, 0)] for pool, _ in chosen], [len(p) for p, _ in chosen]
        order = blend(resolve_weights([weight for _, weight in chosen], sizes), sizes) if chosen else []
        orders[name] = np.array([shuffled[source][row] for source, row in order], dtype=np.int64)
    orders["eval"] = orders["eval"][:data.eval_rows]
    return orders


def account_of(numbers: Numbers, orders: dict[str, np.ndarray], labels: list[str]) -> dict:
    """What a reader wants to know: rows and weights by source and part, texts cut, overlaps of prompts, lengths."""
    by_source = {part: np.bincount(numbers["source"][rows], minlength=len(labels)) for part, rows in orders.items()}
    keys = {part: np.unique(numbers["held"][rows]) for part, rows in orders.items()}
    parts = list(orders)
    return {
        "rows": {label: {part: int(counts[i]) for part, counts in by_source.items()} for i, label in enumerate(labels)},
        "realised_weights": {part: {label: float(n / counts.sum()) for label, n in zip(labels, counts, strict=True)}
                             for part, counts in by_source.items()},
        "truncated": {part: {side: int(numbers[f"cut_{side}"][rows].sum()) for side in SIDES}
                      for part, rows in orders.items()},
        "overlaps": {f"{a} and {b}": len(np.intersect1d(keys[a], keys[b])) for i, a in enumerate(parts)
                     for b in parts[i + 1:]},
        "tokens": {part: {side: _lengths(lengths) for side in SIDES
                          if len(lengths := numbers[side][rows[numbers[side][rows] > 0]])}
                   for part, rows in orders.items()}}


def _lengths(lengths: np.ndarray) -> dict:
    counts, edges = np.histogram(lengths, bins=min(32, int(lengths.max())), range=(0, lengths.max()))
    return {name: float(np.quantile(lengths, p)) for name, p in (("median", 0.5), ("p95", 0.95), ("max", 1.0))} | {
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}
