"""Checks of a run folder: did every stage end, are its numbers believable, and if not, what to do.

The limits are for finding mistakes (masks, templates, learning rates), not for judging results.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from dschat_kit.config import STAGES
from dschat_kit.metrics import read_metrics
from dschat_kit.notebook.checks import Check
from dschat_kit.runs import RunError, StageRun, open_run

__all__ = ["run_checks"]

QUIET_MINUTES = 15
"""A running stage that wrote nothing for so long has probably stopped working."""


def run_checks(run_root: Path) -> list[Check]:
    """Checks of every stage in a run folder, in the order of the chain; reads files only."""
    root = Path(run_root).absolute()
    if not any((root / stage / "config.json").exists() for stage in STAGES):
        return [Check(name="run", state="fail", found=f"{root} holds no stage of a run",
                      cure="name a run folder, such as runs/tiny, or make one with `dschat run --preset tiny`")]
    checks = []
    for stage in STAGES:
        run = open_run(root, stage)
        try:
            checks.append(_status(run))
            rows = read_metrics(run.metrics_path)
            result = run.result if run.state == "finished" else {}
            checks += _missing_numbers(run, rows)
            checks += LOOK.get(stage, lambda *_: ())(run, rows, result)
        except (RunError, json.JSONDecodeError, UnicodeDecodeError) as error:
            checks.append(Check(name=stage, state="fail", found=f"unreadable file in {run.path}: {error}",
                                cure=f"make the stage anew with `dschat {stage} --fresh {_place(run)}`"))
    return checks


def _place(run: StageRun) -> str:
    return f"--run-root '{run.root}'"


def _status(run: StageRun) -> Check:
    """How the stage stands. Raises RunError for a damaged status.json."""
    state, status = run.state, run.status
    at = f"step {status.get('step', 0)} of {status.get('total', 0)}"
    quiet = (time.time() - status.get("updated", 0)) / 60
    if state == "finished":
        return Check(name=run.stage, state="ok", found=f"finished, {at}")
    if state == "missing":
        return Check(name=run.stage, state="warn", found="not run yet",
                     cure=f"`dschat {run.stage} {_place(run)}`, or its notebook")
    if state == "running" and quiet < QUIET_MINUTES:
        return Check(name=run.stage, state="ok", found=f"running, {at}")
    if state == "running":
        return Check(name=run.stage, state="warn", found=f"running, {at}, but silent for {quiet:.0f} minutes",
                     cure=f"look at {run.logs}; if it hangs, interrupt it and go on with --resume auto")
    error = (status.get("error") or "no message").strip().splitlines()[0]
    again = f"`dschat {run.stage} --resume auto {_place(run)}` goes on, --fresh begins again; logs: {run.logs}"
    if state == "interrupted":
        return Check(name=run.stage, state="warn", found=f"interrupted at {at}", cure=again)
    return Check(name=run.stage, state="fail", found=f"failed at {at}: {error}", cure=again)


def _missing_numbers(run: StageRun, rows: list[dict]) -> Iterator[Check]:
    """NaN and infinity are written as null; steps have to rise."""
    for row in rows:
        lost = [name for name, value in row.items() if value is None]
        if lost:
            yield Check(name=f"{run.stage} numbers", state="fail",
                        found=f"{', '.join(lost[:3])} not finite at step {row.get('step')}",
                        cure=f"training has diverged: a lower learning rate, `--set {_rate(run)}=...` and --fresh")
            break
    steps = [row.get("step", 0) for row in rows]
    if steps != sorted(steps):
        yield Check(name=f"{run.stage} metrics", state="warn", found="steps do not rise in metrics.jsonl",
                    cure="two jobs wrote into one folder: make the stage anew with --fresh")


def _rate(run: StageRun) -> str:
    return "ppo.lr_actor" if run.stage == "ppo" else f"{run.stage}.lr"


def _look_at_sft(run: StageRun, rows: list[dict], result: dict) -> Iterator[Check]:
    before, after = result.get("eval_loss_before"), result.get("eval_loss_after")
    if before is not None and after is not None and after >= before:
        yield Check(name="sft loss", state="warn", found=f"held-out loss {before:.3f} before, {after:.3f} after",
                    cure="nothing was learned: more steps or another sft.lr; rising means too many epochs")


def _look_at_reward(run: StageRun, rows: list[dict], result: dict) -> Iterator[Check]:
    accuracy, interval = result.get("accuracy"), result.get("accuracy_interval")
    if accuracy is None or not interval:
        return
    found = f"accuracy {accuracy:.3f}, interval {interval[0]:.3f} to {interval[1]:.3f}"
    if interval[0] <= 0.5:
        yield Check(name="reward accuracy", state="warn", found=f"{found}: chance is not ruled out",
                    cure="PPO would climb noise: more rows or steps (data.rows, reward.max_steps), another reward.lr")
    length = result.get("length_baseline_accuracy")
    if length is not None and accuracy <= length:
        yield Check(name="reward against length", state="warn",
                    found=f"accuracy {accuracy:.3f}; 'the longer answer wins' has {length:.3f}",
                    cure="the model may have learned length alone: more rows, and watch response_length in PPO")


def _look_at_ppo(run: StageRun, rows: list[dict], result: dict) -> Iterator[Check]:
    if rows:
        yield from _first_step(run, rows[0])
        yield from _scores_and_ends(run, rows)
    if result.get("score_after", 0) < result.get("score_before", 0):
        yield Check(name="ppo score", state="warn",
                    found=f"score {result['score_before']:.3f} before, {result['score_after']:.3f} after",
                    cure="PPO made it worse: a lower ppo.lr_actor, a lower ppo.kl_coef, or more ppo.max_steps")


def _first_step(run: StageRun, row: dict) -> Iterator[Check]:
    """Before its first update the actor is the SFT model: ratio 1, KL 0, whatever the data."""
    if row.get("step") != 1:
        return
    slack = 1e-3 if run.config["pipeline"]["model"]["dtype"] == "fp32" else 5e-2
    ratio, approx_kl = row.get("first_ratio_max", 1.0), row.get("first_approx_kl", 0.0)
    if abs(ratio - 1) > slack or abs(approx_kl) > slack:
        yield Check(name="ppo first ratio", state="fail",
                    found=f"ratio {ratio:.4f} and approx_kl {approx_kl:.2g} before any update; 1 and 0 are right",
                    cure="the log-probabilities of rollout and training differ: check padding and position ids, the "
                         "temperature, and that dropout is off")
    kl = row.get("kl", 0.0)
    if abs(kl) > 20 * slack:
        yield Check(name="ppo first KL", state="fail", found=f"KL {kl:.3f} in the first rollout; 0 is right",
                    cure="actor and ref are not the same model at the start: make ppo anew with --fresh after sft")


def _scores_and_ends(run: StageRun, rows: list[dict]) -> Iterator[Check]:
    last = rows[-max(1, len(rows) // 4):]  # the last quarter speaks for how it stands now
    mean = {name: math.fsum(values) / len(values) for name in ("kl", "eos_rate", "score_std", "clip_fraction")
            if (values := [row[name] for row in last if row.get(name) is not None])}
    if mean.get("kl", 0) < -0.5:
        yield Check(name="ppo KL", state="fail", found=f"KL {mean['kl']:.2f}, clearly negative",
                    cure="the samples do not come from the policy that is measured: sampling has to be temperature "
                         "alone (top_p 1, top_k 0), and the mask has to end after EOS")
    if mean.get("eos_rate", 1) < 0.5:
        yield Check(name="ppo ends", state="warn",
                    found=f"only {mean['eos_rate']:.0%} of the responses end by themselves",
                    cure="a larger sampling.max_new_tokens; or an SFT stage whose rows end in EOS; or "
                         "ppo.missing_eos_score below the usual score")
    if mean.get("score_std", 1) < 1e-6:
        yield Check(name="ppo scores", state="fail", found="all responses have the same score",
                    cure="no advantage, no learning: look at reward accuracy, at ppo.score_clip and at the samples")
    if mean.get("clip_fraction", 0) > 0.4:
        yield Check(name="ppo clipping", state="warn", found=f"clip_fraction {mean['clip_fraction']:.2f}",
                    cure="the updates are too large: a lower ppo.lr_actor or fewer ppo.ppo_epochs")


LOOK = {"sft": _look_at_sft, "reward": _look_at_reward, "ppo": _look_at_ppo}
