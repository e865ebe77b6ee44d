"""`dschat verify`: PPO against the exact optimum of worlds that can be enumerated. This half plans, launches and
judges; dschat_kit/train/exact.py is launched and measures.

The gap alone is a weak detector, second order in the error; so beta_hat and the slope of the frontier (first order),
the exact gradient and the first ratio are judged as well.
"""

import math
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from statistics import median

from dschat_kit.config import Pipeline
from dschat_kit.machine import detect, dschat
from dschat_kit.notebook.tables import grid, named
from dschat_kit.runs import RunError, cannot, read_json, write_json
from dschat_kit.sections import error

BETAS = (0.1, 0.5, 1.0, 2.0)
METHODS = ("gae", "rloo", "grpo", "reinforce", "dpo", "grpo k3", "best of 2", "best of 4", "best of 16", "best of 64")
ANSWERS = 2 ** 17
"""More are not enumerated."""


def plan(kind: str = "bigram", vocab: int | None = None, length: int | None = None, betas: tuple[float, ...] = (0.5,),
         seed: int = 0, eos: bool = False, prompts: int = 1, steps: int = 100,
         methods: tuple[str, ...] = ("gae",)) -> list[dict]:
    """One case a beta and method. Raises ConfigError for a world that is none or cannot be enumerated."""
    vocab = (10 if kind == "bandit" else 4) if vocab is None else vocab
    length = (1 if kind == "bandit" else 3) if length is None else length
    for name, value, good, expected in (
            ("--vocab", vocab, 2 <= vocab <= (500 if kind == "bigram" else ANSWERS),
             "at least 2, and at most 500 for bigram: the model is as wide"),
            ("--prompts", prompts, 1 <= prompts <= 16, "1 to 16"),
            ("--length", length, length == 1 if kind == "bandit" else length >= 1, "1 for the bandit, else at least 1"),
            ("--beta", betas, all(0 < beta < 1e6 for beta in betas), "above 0, below a million"),
            ("--seed", seed, seed >= 0, "at least 0"), ("--steps", steps, steps >= 1, "at least 1"),
            ("--vocab and --length", (vocab, length), prompts * vocab ** length <= ANSWERS,
             f"at most {ANSWERS} answers (prompts * vocab ** length)")):
        if not good:
            raise error(name, str(value), expected, name)
    world = {"kind": kind, "vocab": vocab, "length": length, "seed": seed, "eos": eos, "prompts": prompts}
    return [{"world": world, "beta": beta, "steps": steps, "method": method} for beta in betas for method in methods]


def launch_cases(cases: list[dict], ranks: int = 1, zero: int = 0, export: Path | None = None) -> dict:
    """{"cases": what was reached in each, "kl_gradients": those of rlhf/worlds.py}, by one launched job; `export` gets
    the policy of the last one.

    The job's output goes to standard error. Raises RunError when it fails; its folder is then kept.
    """
    machine = detect()
    if ranks < 1 or 256 % ranks:
        raise error("--ranks", str(ranks), f"a divisor of 256, the batch, up to {machine.devices}",
                    f"--ranks {machine.default_ranks}")
    machine.check_ranks(ranks, "--ranks")
    if export:
        try:
            export.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise cannot(f"write {export}", problem) from problem
    folder = Path(tempfile.mkdtemp(prefix="dschat-verify-")) / "ppo"
    folder.mkdir()
    write_json(folder / "config.json", {"stage": "ppo", "preset": "verify", "config_hash": "", "seed": 0,
                                        "pipeline": Pipeline().to_dict()})
    write_json(folder / "cases.json", {"zero": zero, "cases": cases})
    program = ["deepspeed", "--num_gpus", str(ranks), "--module", "dschat_kit.train.exact", "--run", str(folder)]
    if code := dschat("launch", "--", *program):
        raise RunError(f"the launched job ended with {code}\n  change: see {folder / 'logs'}")
    found = {name: value for name, value in read_json(folder / "result.json").items() if name in
             ("cases", "kl_gradients")}
    if export:
        shutil.copytree(folder / "model", export, dirs_exist_ok=True)
    shutil.rmtree(folder.parent)
    return found


def failures(row: dict) -> list[str]:
    """The checks that one case does not pass, each with its number and what is wanted."""
    wanted = {"gap_closed": (0.98, 1 + 1e-5), "reached_value": (-math.inf, row["optimal_value"] + 1e-6),
              "reached_reward": (-math.inf, row.get("highest_reward", math.inf) + 1e-6)}  # of all at its own KL
    if row["beta"] >= 0.5 and row["steps"] >= 50:  # beta_hat is right in first order
        wanted["beta_hat"] = 0.95 * row["beta"], 1.06 * row["beta"]
    wanted |= {name: (0, most) for name, most in (("gradient_error", 1e-5), ("ratio_error", 1e-5),
                                                  ("sampler_ratio_error", 1e-4)) if name in row}  # those of gae
    return [f"{name} {row[name]:.6g} (wanted {f'{low:.6g} to' if low > -math.inf else 'at most'} {high:.6g})"
            for name, (low, high) in wanted.items() if not low <= row[name] <= high]


def side_by_side(cases: list[dict], **how) -> dict:
    """`launch_cases` in two jobs at a time: ranks wait for one another long enough for those of another job."""
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda half: launch_cases(half, **how), (cases[0::2], cases[1::2])))
    rows = [row for pair in zip_longest(*(half["cases"] for half in halves)) for row in pair if row]
    return {**halves[0], "cases": rows}


def compare(folder: Path, betas: tuple[float, ...] = (0.1, 0.5, 2.0), steps: int = 100) -> list[dict]:
    """METHODS on the bigram world, side by side: writes methods.json and methods.png into `folder`. What they converge
    to is judged by eye; that some do not reach the optimum is the point."""
    cases = [case for beta in betas for case in plan(betas=(beta,), steps=steps, methods=METHODS)
             if beta == betas[0] or not case["method"].startswith("best")]  # which knows no beta
    found = side_by_side(cases)
    for row in found["cases"][1:]:  # the world is the same
        del row["frontier"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "methods.json", found)
    figure(found["cases"]).savefig(folder / "methods.png", dpi=120)
    return found["cases"]


def slope_errors(rows: list[dict]) -> list[float]:
    """Relative errors of dE[r] / dKL between neighbouring betas of at least 0.5, against the exact optima's.

    `rows` are cases of one world that differ in beta alone.
    """
    rows = sorted((row for row in rows if row["beta"] >= 0.5), key=lambda row: row["beta"])

    def slope(low: dict, high: dict, which: str) -> float:
        return (low[f"{which}_reward"] - high[f"{which}_reward"]) / (low[f"{which}_kl"] - high[f"{which}_kl"])

    return [slope(*pair, "reached") / slope(*pair, "optimal") - 1 for pair in zip(rows, rows[1:], strict=False)]


def table(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), steps: int = 50) -> list[str]:
    """Four worlds x BETAS x seeds x 1 and 2 ranks: writes verify.json, verify.md and verify.png into `folder` and
    returns what failed. Less than ten minutes on two cores."""
    started = time.time()
    worlds = ({"kind": "bandit"}, {"kind": "bigram"}, {"kind": "bigram", "eos": True},
              {"kind": "bigram", "eos": True, "prompts": 3})
    cases = [case for world in worlds for seed in seeds for case in plan(**world, betas=BETAS, seed=seed, steps=steps)]
    rows = side_by_side(cases)["cases"] + side_by_side(cases, ranks=2, zero=2)["cases"]
    failed = [f"{name_of(row)}, beta {row['beta']}, seed {row['seed']}, {row['ranks']} ranks: {text}"
              for row in rows for text in failures(row)]
    slopes = {}
    for start in range(0, len(rows), len(BETAS)):
        some = rows[start:start + len(BETAS)]
        slopes[start] = max(map(abs, slope_errors(some)))
        if slopes[start] > 0.03:
            failed.append(f"{name_of(some[0])}, seed {some[0]['seed']}: slope off by {slopes[start]:.3f}")
    middle = median(row["gap_closed"] for row in rows)
    if middle < 0.995:
        failed.append(f"median gap {middle:.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "verify.json", [{k: v for k, v in row.items() if k != "frontier"} for row in rows])
    figure(rows).savefig(folder / "verify.png", dpi=120)
    head = ("world", "beta", "ranks", "least gap", "beta_hat / beta", "gradient error", "ratio error", "seconds")
    lines = ["# PPO against the exact optimum", "", "Written by `dschat verify --table docs/results`.", "",
             f"{len(rows)} runs of {steps} iterations, {len(seeds)} seeds. Median gap closed: {middle:.4f}. Largest "
             f"error of the frontier's slope, beta >= 0.5: {max(slopes.values()):.3f}. Failed checks: {len(failed)}. "
             f"{(time.time() - started) / 60:.1f} minutes on {detect().cores} cores.",
             "", *(f"- {text}" for text in failed), "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, beta, ranks in dict.fromkeys((name_of(row), row["beta"], row["ranks"]) for row in rows):
        some = [row for row in rows if (name_of(row), row["beta"], row["ranks"]) == (name, beta, ranks)]
        least, most = (f(row["beta_hat"] / beta for row in some) for f in (min, max))
        lines.append(f"| {name} | {beta} | {ranks} | {min(row['gap_closed'] for row in some):.4f} | "
                     f"{least:.3f} to {most:.3f} | {max(row['gradient_error'] for row in some):.1e} | "
                     f"{max(row['ratio_error'] for row in some):.1e} | {max(row['seconds'] for row in some):.0f} |")
    (folder / "verify.md").write_text("\n".join([*lines, "", "![runs landing on the frontier](verify.png)", ""]))
    return failed


def line(row: dict) -> str:
    """One case for a reader."""
    method = "" if row["method"] == "gae" else f", {row['method']}"
    reached = (f"{name_of(row)}, seed {row['seed']}, beta {row['beta']:g}{method}: value {row['reached_value']:.6f} of "
               f"{row['optimal_value']:.6f}, gap closed {row['gap_closed']:.4f}, beta_hat {row['beta_hat']:.4f}")
    if method:  # compared, not judged
        return reached
    return f"{reached}, gradient error {row['gradient_error']:.1e}; " + (
        "failed: " + ", ".join(failures(row)) if failures(row) else "all checks passed")


def name_of(row: dict) -> str:
    """A world in words."""
    return (f"{row['kind']} {row['vocab']}" + (f" x {row['length']}" if row["kind"] == "bigram" else "")
            + (", EOS" if row["eos"] else "") + (f", {row['prompts']} prompts" if row["prompts"] > 1 else ""))


def figure(rows: list[dict]):
    """Runs landing on the frontier: for each world the highest E[r] at a KL (theory), and what was reached. Colours are
    betas, or methods where there are several."""
    worlds, several = list(dict.fromkeys((name_of(row), row["seed"]) for row in rows)), len(methods_of(rows)) > 1
    across, sort = min(4, len(worlds)), "method" if several else "beta"
    lines = -(-len(worlds) // across)
    made, places = grid(lines, across, (2.6 + 4.4 * across, 4.4) if several else (1.6 + 3.4 * across, 3.2 * lines))
    kinds = methods_of(rows) if several else sorted({row["beta"] for row in rows})
    for axes, world in zip(places.flat, worlds, strict=False):
        some = [row for row in rows if (name_of(row), row["seed"]) == world]
        axes.plot(*zip(*some[0]["frontier"], strict=True), color="0.6", label="exact optimum")
        for row in some:
            place, free = kinds.index(family(row[sort])), several and row["method"].startswith("best")
            if not free:
                axes.plot(row["optimal_kl"], row["optimal_reward"], "+", color="black", markersize=10)
            axes.plot(row["reached_kl"], row["reached_reward"], "osD^vX*P"[place % 8] if several else "o", alpha=0.7,
                      label=kinds[place] if several else f"beta {row['beta']:g}", color=f"C{place}")
        axes.set(title=f"{world[0]}, seed {world[1]}", xlabel="KL to the reference (nats)", ylabel="E[reward]")
        marks = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
        axes.legend(marks.values(), marks.keys(), fontsize=8, frameon=False)
    return named(made, "Runs on the frontier of reward and KL: " + "; ".join(
        f"{name_of(row)}, {row['method']}, beta {row['beta']:g}, gap closed {row['gap_closed']:.4f}"
        for row in rows[:12]))


def family(kind):
    """Best of 2, 4, ... are one method."""
    return "best of n" if isinstance(kind, str) and kind.startswith("best") else kind


def methods_of(rows: list[dict]) -> list[str]:
    """The methods in the order of their first case."""
    return list(dict.fromkeys(family(row["method"]) for row in rows))


def gradient_figure(gradients: dict[str, list[float]]):
    """Which KL estimates may be used, and how: the expected gradient by each logit against that of the true KL. On the
    diagonal is right."""
    true, names = gradients["true KL"], ("k1 in the reward", "k2 as a loss", "k1 as a loss", "k3 as a loss")
    made, (places,) = grid(1, len(names), (13, 3.4), sharex=True, sharey=True)
    ends = [min(true + gradients["k3 as a loss"]), max(true + gradients["k3 as a loss"])]
    for axes, name in zip(places, names, strict=True):
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.plot(true, gradients[name], "o", color="C0" if name in names[:2] else "C3")
        if name == "k3 as a loss":
            axes.plot(true, gradients["KL(ref || policy)"], "k+", markersize=10, label="gradient of KL(ref || policy)")
            axes.legend(frameon=False, fontsize=8)
        axes.set(title=name, xlabel="gradient of KL(policy || ref)")
    places[0].set_ylabel("expected gradient of the estimate")
    return named(made, "Expected gradients of KL estimates: " + "; ".join(
        f"{name}, largest difference {max(abs(a - b) for a, b in zip(gradients[name], true, strict=True)):.3g}"
        for name in names))
