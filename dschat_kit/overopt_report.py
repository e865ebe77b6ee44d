"""What the study of over-optimisation found: curves read from its run folders, the fits of Gao et al. with bootstrap
intervals, where to stop; a table and figures.

Rewards are in units of the true reward. Preferences follow Bradley-Terry with a known scale, so a score difference (in
log-odds) divided by that scale is the gain that a reward model promises.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dschat_kit.data.toy import PREFERENCE_SCALE
from dschat_kit.metrics import read_metrics
from dschat_kit.overopt import ANSWERS, PROMPTS, SEEDS, SIZES, Case, cases
from dschat_kit.rlhf.overoptimisation import best_of_n, best_of_n_kl, distinct_kl, fit, fitted, turning_point
from dschat_kit.runs import StageRun, open_run, write_json

__all__ = ["NS", "Sampled", "best_of_n_curves", "coefficient_figure", "curve_figure", "report", "summarise"]

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
