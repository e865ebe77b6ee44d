"""`dschat study`: what stage 3 does over many seeds, from one SFT model and one reward model, on one rank each and two
runs at a time. Plans, launches and judges; what is finished is not run again.

    ROOT/base/{data,sft,reward}    ROOT/ARM-SEED/{data,sft,reward} links to these, and the trained stage
    ROOT/judged/ppo                the moving averages of the weights, and best-of-n
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist, fmean, stdev

from dschat_kit.config import Pipeline
from dschat_kit.machine import dschat, resolve
from dschat_kit.notebook.diagnosis import run_checks
from dschat_kit.notebook.stage import begin
from dschat_kit.notebook.tables import grid, named
from dschat_kit.presets import get_preset
from dschat_kit.rlhf.overoptimisation import best_of_n_kl
from dschat_kit.runs import RunError, link_stages, open_run, read_json, write_json
from dschat_kit.sections import error

ARMS = {
    "gae": ("ppo", ["ppo.ema_decay=0.95"], "PPO as the preset has it"),  # 0.992 is longer than the 96 optimiser steps
    "ptx": ("ppo", ["ppo.ptx_coef=0.5"], "PPO with mixture training"),
    "ptx 2x": ("ppo", ["ppo.ptx_coef=0.5", "ppo.max_steps=48"], "the same, twice as many steps: about PPO's reward"),
    "rloo": ("ppo", ["ppo.advantage=rloo", "ppo.samples_per_prompt=4"], "RLOO, 4 answers a prompt"),
    "grpo": ("ppo", ["ppo.advantage=grpo", "ppo.samples_per_prompt=4"], "GRPO, 4 answers a prompt, KL in the reward"),
    "reinforce": ("ppo", ["ppo.advantage=reinforce"], "REINFORCE, baseline the batch's mean"),
    "dpo": ("dpo", [], "DPO on the pairs of PPO's prompts"),
}
"""Name -> stage, settings, in words. The first has all seeds, the others the first few of them."""
SHARED = ("data", "sft", "reward")
"""Stages that all runs have in common."""
OTHER_SEEDS, BEST_OF = 5, (1, 2, 4, 8, 16, 32)
NUMBERS = ("gold_before", "gold_after", "score_before", "score_after", "kl", "lm_loss_before", "lm_loss_after",
           "response_length_after", "eos_rate_after")


def run_study(root: Path, out: Path, seeds: int, sets: list[str]) -> list[dict]:
    """Train what is missing under `root`, then write ppo.json, ppo.md and ppo.png into `out`; returns the rows.

    A run that fails is a result. Raises RunError where SFT, reward model or the last evaluation do."""
    if seeds < 1:
        raise error("--seeds", str(seeds), "at least 1", "--seeds 20")
    root, pipeline = root.absolute(), resolve(get_preset("tiny").with_overrides(sets))
    for stage in ("sft", "reward"):
        if not train(root / "base", stage, pipeline, ranks=2):
            raise RunError(f"the {stage} stage in {root / 'base'} failed\n  change: see {root / 'base' / stage}/logs")
    asked = [(arm, seed) for arm in ARMS for seed in range(seeds if arm == "gae" else min(seeds, OTHER_SEEDS))]
    asked.sort(key=lambda run: run[1])  # an unfinished study has something of every arm

    def one(arm: str, seed: int) -> dict:
        stage, settings, _ = ARMS[arm]
        place = link_stages(root / f"{arm}-{seed}", root / "base", *SHARED)
        train(place, stage, pipeline.with_overrides([*settings, f"{stage}.seed={seed}"]))
        row = {"arm": arm, "seed": seed, **read_row(place, stage)}
        print(f"{arm} {seed}: {row['state']}, gold {row.get('gold_after', math.nan):.3f}")
        return row

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda run: one(*run), asked))
    rows += judged(root, pipeline, [row["seed"] for row in rows if row["arm"] == "gae" and row["state"] == "finished"],
                   min(seeds, OTHER_SEEDS))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "ppo.json", rows)
    (out / "ppo.md").write_text(report(rows))
    figure(rows).savefig(out / "ppo.png", dpi=120)
    return rows


def train(place: Path, stage: str, pipeline: Pipeline, ranks: int = 1) -> bool:
    """Run a stage unless it is finished; whether it then is. Raises RunError for one of another configuration."""
    begun = begin(stage, "tiny", place, pipeline, resume="auto", num_gpus=ranks)
    if begun.action != "reuse":
        alone = [sys.executable, "-m", *begun.command[begun.command.index("--module") + 1:]]  # no launcher
        launch(alone if ranks == 1 else begun.command, begun.run.path)
    return begun.run.state == "finished"


def launch(command: list[str], place: Path) -> None:
    """A job under `dschat launch`, which logs it in its own folder."""
    with open(place / "study.log", "a") as log:
        dschat("launch", "--", *command, output=log)


def judged(root: Path, pipeline: Pipeline, averaged: list[int], seeds: int) -> list[dict]:
    """Rows of the moving averages of those seeds, and of best-of-n, by one job of one rank."""
    place, models = link_stages(root / "judged", root / "base", *SHARED) / "ppo", root / "base" / "sft" / "model"
    cases = [{"model": str(root / f"gae-{seed}" / "ppo" / "ema"), "seed": seed, "best_of": [1]} for seed in averaged]
    cases += [{"model": str(models), "seed": seed, "best_of": list(BEST_OF)} for seed in range(seeds)]
    done = place / "result.json"
    if not done.exists() or [{k: case[k] for k in cases[0]} for case in read_json(done)["cases"]] != cases:
        begun = begin("ppo", "tiny", place.parent, pipeline, fresh=True, num_gpus=1)
        write_json(place / "cases.json", cases)
        launch([sys.executable, "-m", "dschat_kit.train.judge", "--run", str(place)], place)
        if begun.run.state != "finished":
            raise RunError(f"the last evaluation failed\n  change: see {place / 'logs'}")
    rows = []
    for case in read_json(done)["cases"]:
        for n, means in case["means"].items():
            arm = "ema" if case["model"] != str(models) else f"best of {n}"
            kl = means["kl"] if arm == "ema" else best_of_n_kl(int(n))
            rows.append({"arm": arm, "seed": case["seed"], "state": "finished", "sick": [], "kl": kl,
                         "gold_after": means.get("gold", math.nan), "score_after": means["score"],
                         "lm_loss_after": case["lm_loss"], "response_length_after": means["tokens"],
                         "eos_rate_after": means["finished"]})
    return rows


def read_row(place: Path, stage: str) -> dict:
    """What a run reached: its state, what the doctor calls wrong, and NUMBERS where it has finished."""
    run = open_run(place, stage)
    sick = [check.name for check in run_checks(place) if check.state == "fail" and check.name.split()[0] == stage]
    result = run.result if run.state == "finished" else {}
    return {"state": run.state, "sick": sick} | {name: result[name] for name in NUMBERS if name in result}


def failed(row: dict) -> bool:
    """No end, an end that the doctor calls sick, or less gold than before."""
    return row["state"] != "finished" or bool(row["sick"]) or row.get("gold_after", 0) < row.get("gold_before", 0)


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half the width of its confidence interval) by Student's t; half is nan for a single value.

    The quantile is Abramowitz & Stegun 26.7.5 (1964), right to 1 % from 3 degrees of freedom on; 1 and 2 have closed
    forms."""
    if len(values) < 2:
        return fmean(values), math.nan
    z, df = NormalDist().inv_cdf(0.5 + level / 2), len(values) - 1
    t = (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))
    if df < 3:
        t = math.tan(math.pi * level / 2) if df == 1 else level * math.sqrt(2 / (1 - level**2))
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def said(values: list[float], digits: int = 3) -> str:
    """Mean and interval for a reader."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" +- {half:.{digits}f}")


def report(rows: list[dict]) -> str:
    """ppo.md: a table of the arms, and what mixture training and the moving average changed, seed by seed."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}
    before = said([row["gold_before"] for row in arms["gae"] if "gold_before" in row])
    lines = ["# Stage 3 over seeds", "",
             f"Written by `dschat study --seeds {len(arms['gae'])} --out docs/results`.", "",
             "The tiny chain, one SFT model and one reward model; every seed has its own order of prompts, sampling "
             "and minibatches, and its own answers to the held-out prompts. Gold is the toy world's true reward, which "
             f"nothing is trained on: {before} before. KL is to the SFT model, in nats an answer (best of n: the "
             "bound log n - (n - 1) / n). LM loss is on held-out text, in nats a token. A run has failed when it did "
             "not end, when `dschat doctor` finds it sick, or when gold fell. +- is the 95 % interval over seeds "
             "(Student's t); it says nothing about another SFT or reward model. PPO's settings were chosen on seed 0, "
             "the steps of `ptx 2x` on seed 100, DPO's learning rate on seeds 3 and 100 (twice as high, seed 3 ran "
             "away: gold 0.28 at a KL of 26 nats).", "",
             "| | seeds | gold after | KL | tokens an answer | ended by EOS | rise of the LM loss | failed |",
             "|---" * 8 + "|"]
    for arm, some in arms.items():
        words = ARMS[arm][2] if arm in ARMS else "moving average of `gae`'s weights" if arm == "ema" else arm
        cells = [said([row[name] for row in some if name in row], digits) for name, digits in
                 (("gold_after", 3), ("kl", 2), ("response_length_after", 1), ("eos_rate_after", 3))]
        rise = said([row["lm_loss_after"] - row["lm_loss_before"] for row in some if "lm_loss_before" in row])
        lines.append(f"| {words} | {len(some)} | " + " | ".join([*cells, rise or "-"])
                     + f" | {sum(map(failed, some))} |")
    lines += ["", *differences(arms), "", "![gold by arm, against KL, and the LM loss](ppo.png)", ""]
    return "\n".join(lines)


def differences(arms: dict[str, list[dict]]) -> list[str]:
    """Gold, LM loss and KL with the same seed: of every other arm against `gae`, and of `ptx 2x` against those arms
    without mixture training that come out at its gold."""
    lines = []
    against = [(arm, "gae") for arm in arms if arm != "gae" and arm.split()[0] != "best"]
    for arm, other in [*against, *(("ptx 2x", same) for same in ("ema", "rloo", "reinforce") if "ptx 2x" in arms)]:
        theirs = {row["seed"]: row for row in arms.get(other, ()) if "gold_after" in row}
        pairs = [(row, theirs[row["seed"]]) for row in arms[arm] if "gold_after" in row and row["seed"] in theirs]
        if pairs:
            gold, loss, kl = (said([row[name] - one[name] for row, one in pairs])
                              for name in ("gold_after", "lm_loss_after", "kl"))
            lines.append(f"- {arm} less {other}, same {len(pairs)} seeds: gold {gold}, LM loss {loss}, KL {kl}.")
    return lines


def figure(rows: list[dict]):
    """Gold of every run by arm; gold against KL with best-of-n; the LM loss against gold; the EMA against the end."""
    made, ((by_arm, by_kl, by_loss),) = grid(1, 3, (13, 4))
    trained = [arm for arm in (*ARMS, "ema") if any(row["arm"] == arm and "gold_after" in row for row in rows)]
    for place, arm in enumerate(trained):
        some = [row for row in rows if row["arm"] == arm and "gold_after" in row]
        gold, kl, loss = ([row[name] for row in some] for name in ("gold_after", "kl", "lm_loss_after"))
        spread = [place + 0.3 * (i / max(len(gold) - 1, 1) - 0.5) for i in range(len(gold))]
        by_arm.plot(spread, gold, "o", color=f"C{place}", alpha=0.5, markersize=4)
        mean, half = interval(gold)
        by_arm.errorbar(place + 0.3, mean, half, fmt="_", color="black", capsize=3)
        by_kl.plot(kl, gold, "o", color=f"C{place}", alpha=0.6, markersize=4, label=arm)
        by_loss.plot(loss, gold, "o", color=f"C{place}", alpha=0.6, markersize=4, label=arm)
    if begun := [row for row in rows if "gold_before" in row]:  # no run may have ended
        gold, loss = (fmean(row[name] for row in begun) for name in ("gold_before", "lm_loss_before"))
        by_arm.axhline(gold, color="0.5", linestyle=":")
        by_arm.annotate("SFT model", (len(trained) - 0.5, gold), ha="right", va="bottom", color="0.4")
        by_loss.axvline(loss, color="0.5", linestyle=":")
    by_arm.set_xticks(range(len(trained)), trained, rotation=30)
    best = {n: [row for row in rows if row["arm"] == f"best of {n}"] for n in BEST_OF}
    points = [(some[0]["kl"], *interval([row["gold_after"] for row in some])) for some in best.values() if some]
    if points:
        by_kl.errorbar(*zip(*points, strict=True), fmt="k.--", capsize=2, label="best of n (bound of its KL)")
    for axes, x, y in ((by_arm, "", "gold after (mean, 95 %)"), (by_kl, "KL to the SFT model (nats)", "gold after"),
                       (by_loss, "LM loss on held-out text (nats; dotted: before)", "gold after")):
        axes.set(xlabel=x, ylabel=y)
    if points or trained:
        by_kl.legend(frameon=False, fontsize=8)
    return named(made, "Stage 3 over seeds: " + "; ".join(
        f"{arm} gold {said([row['gold_after'] for row in rows if row['arm'] == arm and 'gold_after' in row])}"
        for arm in trained))
