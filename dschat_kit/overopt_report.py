"""What the study of over-optimisation found: curves read from its run folders, the fits of Gao et al. with bootstrap
intervals, where to stop; a table and figures.

Rewards are in units of the true reward. Preferences follow Bradley-Terry with a known scale, so a score difference (in
log-odds) divided by that scale is the gain that a reward model promises.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dschat_kit.data.toy import PREFERENCE_SCALE
from dschat_kit.metrics import read_metrics
from dschat_kit.notebook.plots import BLUE, GREEN, GREY, ORANGE
from dschat_kit.overopt import ANSWERS, PAIRS, PPO, PROMPTS, SIZES, cases
from dschat_kit.rlhf.overoptimisation import best_of_n, best_of_n_kl, distinct_kl, fit, fitted, turning_point
from dschat_kit.runs import StageRun, open_run, write_json

__all__ = ["NS", "Sampled", "best_of_n_curves", "coefficient_figure", "curve_figure", "report", "size_figure", "study",
           "summarise"]

NS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Up to a quarter of the answers: KL is taken from their frequencies."""
DRAWS, GRID = 300, 60
"""Bootstrap samples, and points of a fitted curve."""


@dataclass(frozen=True)
class Sampled:
    """One seed's curve, before means are taken: U units (prompts, or answers of a rollout) x K points (values of n, or
    rollouts)."""
    kl: np.ndarray
    """(U, K) nats"""
    score: np.ndarray
    """(U, K) of the reward model, as its folder gives them"""
    gold: np.ndarray
    """(U, K) true reward"""
    promise: float
    """true reward that one unit of score stands for"""

    def points(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(d, gold), each (K,): means over the units `rows`."""
        return np.sqrt(np.maximum(self.kl[rows].mean(0), 0.0)), self.gold[rows].mean(0)


def best_of_n_curves(run: StageRun) -> dict[str, Sampled]:
    """Best-of-n under each reward model of a folder of `overopt.best_of_n`; a unit is a prompt, a point one of NS."""
    lines, found = read_metrics(run.samples_path), {}
    gold = np.array([line["gold"] for line in lines])
    for name, folder in run.result["models"].items():
        scores = penalised(np.array([line["scores"][name] for line in lines]),
                           np.array([line["finished"] for line in lines]), run)
        ns = [n for n in NS if 4 * n <= gold.shape[1]]
        found[name] = Sampled(distinct_kl(scores, [line["answer"] for line in lines], ns),
                              best_of_n(scores, scores, ns), best_of_n(scores, gold, ns),
                              promise(StageRun(Path(folder).parent)))
    return found


def ppo_curve(run: StageRun) -> Sampled:
    """PPO as it trained; a unit is an answer, a point a rollout."""
    rows = [row for row in read_metrics(run.samples_path) if row["phase"] == "rollout"]
    steps = max(row["step"] for row in rows)
    column = {name: np.array([float(row[name]) for row in rows]).reshape(steps, -1).T
              for name in ("kl", "score", "gold", "finished")}
    return Sampled(column["kl"], penalised(column["score"], column["finished"] > 0, run), column["gold"],
                   promise(open_run(run.root, "reward")))


def penalised(scores: np.ndarray, finished: np.ndarray, run: StageRun) -> np.ndarray:
    """Scores as PPO sees them: clipped, and the penalty where an answer did not end."""
    settings = run.config["pipeline"]["ppo"]
    clip, penalty = settings["score_clip"] or math.inf, settings["missing_eos_score"]
    return np.where(finished | (penalty is None), scores.clip(-clip, clip), penalty)


def promise(reward: StageRun) -> float:
    """True reward that one unit of a reward model's score stands for."""
    return (reward.result["reference_std"] if reward.config["pipeline"]["reward"]["scale"] else 1.0) / PREFERENCE_SCALE


def summarise(method: str, seeds: list[Sampled]) -> dict:
    """Points, fit and turning point with 95 % intervals of one curve, the seeds together. The bootstrap draws seeds,
    then units."""
    rng = np.random.default_rng(0)
    every = [seed.points(np.arange(len(seed.kl))) for seed in seeds]
    grid = np.linspace(0, max(d.max() for d, _ in every), GRID)

    def fit_of(points) -> tuple:
        alpha, beta, starts = fit(method, points)
        return alpha, beta, turning_point(method, alpha, beta), fitted(method, alpha, beta, grid), starts

    alpha, beta, turn, curve, starts = fit_of(every)
    drawn = [fit_of([seeds[s].points(rng.integers(0, len(seeds[s].kl), len(seeds[s].kl)))
                     for s in rng.integers(0, len(seeds), len(seeds))]) for _ in range(DRAWS)]
    alphas, betas, turns, curves, _ = (np.array(part) for part in zip(*drawn, strict=True))

    def interval(values) -> list:
        return [None if not math.isfinite(value) else float(value)
                for value in np.quantile(values, (0.025, 0.975), axis=0, method="nearest")]

    at_stop = fitted(method, alpha, beta, np.array([min(turn, grid[-1])]))[0]
    gains = [gold - start for (_, gold), start in zip(every, starts, strict=True)]
    misfit = np.concatenate([gain - fitted(method, alpha, beta, d) for gain, (d, _) in zip(gains, every, strict=True)])
    return {"alpha": alpha, "alpha_interval": interval(alphas), "beta": beta, "beta_interval": interval(betas),
            "turn": turn if math.isfinite(turn) else None, "turn_interval": interval(turns),
            "gain_at_stop": float(at_stop), "gain_at_end": float(curve[-1]), "misfit": float(misfit.std()),
            "share_turned": float(np.mean(turns < grid[-1])), "grid": grid.tolist(), "curve": curve.tolist(),
            "band": [np.quantile(curves, q, axis=0).tolist() for q in (0.025, 0.975)],
            "points": [{"d": d.tolist(), "gold": gain.tolist(),
                        "promise": ((seed.score.mean(0) - seed.score[:, 0].mean()) * seed.promise).tolist()}
                       for seed, (d, _), gain in zip(seeds, every, gains, strict=True)]}


def study(root: Path) -> dict:
    """Every curve of the study in `root`, as overoptimisation.json holds it. Raises RunError where one is missing."""
    curves: dict[tuple, list[Sampled]] = {}
    accuracy: dict[tuple, list[float]] = {}
    for case in cases():
        reward = open_run(case.folder(root), "reward").result
        accuracy.setdefault((case.width, case.pairs), []).append(reward["accuracy"])
        sampled = best_of_n_curves(open_run(root / f"seed{case.seed}" / "best-of-n", "ppo"))[case.name]
        curves.setdefault(("best-of-n", case.width, case.pairs), []).append(sampled)
        if case.width == next(iter(SIZES)):
            curves.setdefault(("ppo", case.width, case.pairs), []).append(ppo_curve(open_run(case.folder(root), "ppo")))
    rows = [{"method": method, "width": width, "pairs": pairs, "accuracy": accuracy[width, pairs],
             **summarise(method, seeds)} for (method, width, pairs), seeds in curves.items()]
    ns = [n for n in NS if 4 * n <= ANSWERS]
    return {"prompts": PROMPTS, "answers": ANSWERS, "ns": ns, "bound": [best_of_n_kl(n) for n in ns], "ppo": PPO,
            "curves": rows}


def report(root: Path, results: Path, figures: Path) -> dict:
    """Write overoptimisation.json and .md into `results` and the figures into `figures`; returns what was found."""
    found = study(root)
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(results / "overoptimisation.json", found)
    for name, draw in FIGURES.items():
        draw(found).savefig(figures / f"{name}.png", dpi=120)
    (results / "overoptimisation.md").write_text(in_words(found), encoding="utf-8")
    return found


def in_words(found: dict) -> str:
    """The table for a reader."""
    first = found["curves"][0]
    head = ("method", "reward model", "pairs", "accuracy", "alpha", "beta", "stop at KL (nats)", "gain there",
            "gain at the last point", "promised there", "largest KL")
    lines = ["# Reward over-optimisation", "", "Written by `dschat overopt`.", "",
             f"The true (gold) reward of the toy world lies in [0, 1]. {len(first['points'])} seeds, each its own SFT "
             f"model; best-of-n from {found['answers']} answers to {found['prompts']} held-out prompts a seed, n up to "
             f"{found['ns'][-1]}; PPO with `{' '.join(found['ppo'][:2])}`. Gains are over the SFT model; `promised` is "
             "what the reward model says, in units of the true reward. Intervals are 95 %, by bootstrap over seeds "
             "and prompts (for PPO: answers). Answers repeat, so best-of-n is nearer to the SFT model than "
             f"log n - (n - 1) / n: at n = {found['ns'][-1]} {_largest(found):.2f} nats at most, where that says "
             f"{found['bound'][-1]:.2f}.", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found["curves"]:
        (low, high), last = row["turn_interval"], [points["promise"][-1] for points in row["points"]]
        d = row["grid"][-1]
        stop = f"{row['turn'] ** 2:.2f}" if row["turn"] is not None and row["turn"] < d else f"none up to {d * d:.1f}"
        lines.append(
            f"| {row['method']} | {row['width']} wide | {row['pairs']} | {mean(row['accuracy']):.3f} | "
            + " | ".join(f"{row[name]:.3f} ({row[f'{name}_interval'][0]:.3f} to {row[f'{name}_interval'][1]:.3f})"
                         for name in ("alpha", "beta"))
            + f" | {stop} ({_squared(low)} to {_squared(high)}) | {row['gain_at_stop']:+.3f} | "
            f"{row['gain_at_end']:+.3f} | {mean(last):+.3f} | {d * d:.2f} |")
    return "\n".join([*lines, "", *(f"![{name}](../figures/{name}.png)" for name in FIGURES), ""])


def _largest(found: dict) -> float:
    return max(points["d"][-1] ** 2 for row in found["curves"] if row["method"] == "best-of-n"
               for points in row["points"])


def mean(values: list[float]) -> float:
    """Of a list."""
    return sum(values) / len(values)


def _squared(d: float | None) -> str:
    return "never" if d is None or d > 30 else f"{d * d:.2f}"


COLOURS = {"best-of-n": BLUE, "ppo": ORANGE}
STYLES = (("-", "o", BLUE), ("--", "s", GREEN), (":", "^", ORANGE))


def curve_figure(found: dict) -> Figure:
    """Best-of-n and PPO under the reward models of the policy's size, one column for each amount of data: above what
    the reward model promises, below what is true."""
    figure, axes = _grid(2, len(PAIRS), (9, 5.2))
    width = next(iter(SIZES))
    for column, pairs in enumerate(PAIRS):
        promised, true = axes[:, column]
        rows = [row for row in found["curves"] if (row["width"], row["pairs"]) == (width, pairs)]
        for row in rows:
            colour, mark = COLOURS[row["method"]], "o" if row["method"] == "ppo" else "s"
            for points in row["points"]:
                promised.plot(points["d"], points["promise"], mark, color=colour, markersize=3, alpha=0.6, linewidth=0)
                true.plot(points["d"], points["gold"], mark, color=colour, markersize=3, alpha=0.6, linewidth=0)
            _draw(true, row, colour, "-" if row["method"] == "ppo" else "--", row["method"].replace("ppo", "PPO"))
        promised.set_title(f"{pairs} pairs, accuracy {mean(rows[0]['accuracy']):.0%}", fontsize=10)
        true.set_xlabel("d = sqrt(KL to the SFT model)")
    axes[0, 0].set_ylabel("gain promised by\nthe reward model")
    axes[1, 0].set_ylabel("gain in true reward")
    axes[1, 0].legend(frameon=False, fontsize=9)
    return _named(figure, "Promised and true reward against distance, for best-of-n and PPO: " + _stops(found, width))


def size_figure(found: dict) -> Figure:
    """Best-of-n under reward models of three sizes, taught by more or fewer pairs."""
    figure, axes = _grid(1, len(SIZES), (9, 3.2))
    for place, width in zip(axes[0], SIZES, strict=True):
        rows = [row for row in found["curves"] if (row["width"], row["method"]) == (width, "best-of-n")]
        for row, (style, mark, colour) in zip(rows, STYLES, strict=True):
            for points in row["points"]:
                place.plot(points["d"], points["gold"], mark, color=colour, markersize=3, alpha=0.6)
            _draw(place, row, colour, style, f"{row['pairs']} pairs")
        place.set_title(f"reward model {width} wide", fontsize=10)
        place.set_xlabel("d = sqrt(KL)")
    axes[0, 0].set_ylabel("gain in true reward")
    axes[0, 0].legend(frameon=False, fontsize=9)
    return _named(figure, "True reward of best-of-n by size of the reward model and number of pairs")


def coefficient_figure(found: dict) -> Figure:
    """The fitted coefficients against the number of pairs, with 95 % intervals."""
    figure, axes = _grid(1, 2, (9, 3.2), same=False)
    kinds = list(dict.fromkeys((row["method"], row["width"]) for row in found["curves"]))
    for place, name in zip(axes[0], ("alpha", "beta"), strict=True):
        for number, (method, width) in enumerate(kinds):
            rows = [row for row in found["curves"] if (row["method"], row["width"]) == (method, width)]
            middle = np.array([row[name] for row in rows])
            spread = np.abs(np.array([row[f"{name}_interval"] for row in rows]).T - middle)
            style, mark, colour = (*STYLES, ("-.", "D", GREY))[number if method == "best-of-n" else 3]
            place.errorbar(np.array([row["pairs"] for row in rows]) * 1.06 ** number, middle, spread, color=colour,
                           linestyle=style, marker=mark, markersize=4, capsize=3,
                           label=f"{method.replace('ppo', 'PPO')}, {width} wide")
        place.set_xscale("log", base=2)
        place.set_xticks(PAIRS, PAIRS)
        place.set_xlabel("pairs that the reward model learned from")
        place.set_ylabel(f"{name}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return _named(figure, "Coefficients alpha and beta by number of pairs")


FIGURES = {"overoptimisation": curve_figure, "overoptimisation-sizes": size_figure,
           "overoptimisation-coefficients": coefficient_figure}


def _grid(lines: int, columns: int, size: tuple[float, float], same: bool = True):
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=same, sharey="row" if same else False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#E5E5E5", linewidth=0.8)
        one.axhline(0, color="black", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _draw(axes, row: dict, colour: str, style: str, label: str) -> None:
    """The fitted curve with its band, and a line where it turns."""
    axes.fill_between(row["grid"], *row["band"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(row["grid"], row["curve"], style, color=colour, linewidth=1.8, label=label)
    if row["turn"] is not None and 0 < row["turn"] < row["grid"][-1]:
        axes.axvline(row["turn"], color=colour, linestyle=":", linewidth=1.2)


def _stops(found: dict, width: int) -> str:
    return ", ".join(f"{row['method']} with {row['pairs']} pairs turns at KL {_squared(row['turn'])}"
                     for row in found["curves"] if row["width"] == width)


def _named(figure: Figure, text: str) -> Figure:
    figure.set_label(text)
    return figure
