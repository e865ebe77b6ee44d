"""What the study of over-optimisation found: curves read from its run folders, the fits of Gao et al. with bootstrap
intervals, where to stop; a table and figures.

Rewards are in units of the true reward. Preferences follow Bradley-Terry with a known scale, so a score difference (in
log-odds) divided by that scale is the gain that a reward model promises.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from dschat_kit.data.toy import PREFERENCE_SCALE
from dschat_kit.metrics import read_metrics
from dschat_kit.notebook.reward_plots import FIGURES, METHODS, squared
from dschat_kit.overopt import ANSWERS, PPO, PROMPTS, cases
from dschat_kit.rlhf.overoptimisation import best_of_n, best_of_n_kl, distinct_kl, fit, fitted, turning_point
from dschat_kit.runs import StageRun, open_run, write_json

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
    rows = [line(row) for row in found["curves"]]
    largest = max(points["d"][-1] ** 2 for row in found["curves"] if row["method"] == "best-of-n"
                  for points in row["points"])
    lines = ["# Reward over-optimisation", "", "Written by `dschat overopt --out docs`.", "",
             f"The true (gold) reward of the toy world lies in [0, 1]. Seeds: {len(found['curves'][0]['points'])}, "
             f"each with its own SFT model; best-of-n from {found['answers']} answers to {found['prompts']} held-out "
             f"prompts a seed, n up to {found['ns'][-1]}; PPO with `{' '.join(found['ppo'][:2])}`. Gains are over the "
             "SFT model; what the reward model promises is in units of the true reward. Intervals are 95 %, by "
             "bootstrap over seeds and prompts (for PPO: answers). Answers repeat, so best-of-n is nearer to the SFT "
             f"model than log n - (n - 1) / n: at n = {found['ns'][-1]} {largest:.2f} nats at most, where that says "
             f"{found['bound'][-1]:.2f}.", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|",
             *("| " + " | ".join(row.values()) + " |" for row in rows), "",
             *(f"![{name}](../figures/{name}.png)" for name in FIGURES)]
    return "\n".join([*lines, ""])


def line(row: dict) -> dict[str, str]:
    """One curve for a reader: its coefficients and where it turns."""
    d, (low, high) = row["grid"][-1], row["turn_interval"]
    inside = row["turn"] is not None and row["turn"] < d
    coefficients = {name: f"{row[name]:.3f} ({row[f'{name}_interval'][0]:.3f} to {row[f'{name}_interval'][1]:.3f})"
                    for name in ("alpha", "beta")}
    return {"method": METHODS[row["method"]][3], "reward model": f"{row['width']} wide", "pairs": str(row["pairs"]),
            "accuracy": f"{fmean(row['accuracy']):.3f}", **coefficients,
            "stop at KL (nats)": f"{squared(row['turn']) if inside else f'not up to {d * d:.1f}'} "
                                 f"({squared(low)} to {squared(high)})",
            "gain there": f"{row['gain_at_stop']:+.3f}", "gain at the last point": f"{row['gain_at_end']:+.3f}",
            "promised there": f"{fmean([points['promise'][-1] for points in row['points']]):+.3f}"}
