"""Checks of a run folder: did every stage end, are its numbers believable, and if not, what to do.

The limits are for finding mistakes (masks, templates, learning rates), not for judging results.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dschat_kit.config import STAGES
from dschat_kit.metrics import read_metrics
from dschat_kit.runs import RunError, StageRun, open_run, read_json

QUIET_MINUTES = 15
"""A running stage that wrote nothing for so long has probably stopped working."""
OTHER_LOGPROBS = ("the log-probabilities of rollout and training differ: check padding and position ids, the "
                  "temperature, and that dropout is off; where only later rollouts differ, they have old weights")


@dataclass(frozen=True)
class Check:
    """One finding. `state` is ok, warn (it runs, but read this) or fail (it cannot run, or its numbers are wrong)."""

    name: str
    found: str
    state: str = "ok"
    cure: str = ""
    """What to do, as a sentence or a command; told only where there is something to mend."""

    def __post_init__(self):
        assert self.state in ("ok", "warn", "fail") and (self.state == "ok" or self.cure), self
        object.__setattr__(self, "cure", self.cure if self.state != "ok" else "")


def render(checks: list[Check]) -> str:
    """The findings as text: a line each, the cure under it, a closing line that counts them."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':<{width + 6}}  -> {check.cure}"] * bool(check.cure)
    states = [check.state for check in checks]
    count = [f"{states.count(state)} {state}" for state in ("ok", "warn", "fail") if state in states]
    return "\n".join([*lines, "doctor: " + ", ".join(count)])


RULES = {
    "sft": (
        ("loss", "warn", lambda n: n["eval_loss_after"] >= n["eval_loss_before"],
         "held-out loss {eval_loss_before:.3f} before, {eval_loss_after:.3f} after",
         "nothing was learned: more steps or another sft.lr; rising means too many epochs"),
    ),
    "reward": (
        ("accuracy", "warn", lambda n: n["accuracy_interval"][0] <= 0.5,
         "accuracy {accuracy:.3f}, interval {accuracy_interval[0]:.3f} to {accuracy_interval[1]:.3f}: maybe chance",
         "PPO would climb noise: more rows or steps (data.rows, reward.max_steps), another reward.lr"),
        ("against length", "warn", lambda n: n["accuracy"] <= n["length_baseline_accuracy"],
         "accuracy {accuracy:.3f}; 'the longer answer wins' has {length_baseline_accuracy:.3f}",
         "the model may have learned length alone: more rows, and watch response_length in PPO"),
    ),
    "dpo": (
        ("first loss", "fail", lambda n: abs(n["first"]["loss"] - math.log(2)) > n["slack"],
         "loss {first[loss]:.4f} at the first step instead of log 2: the policy does not begin as its reference",
         "actor and ref have to be the SFT model of this run, in one dtype: --fresh where the SFT stage was made anew"),
        ("pairs", "warn", lambda n: n["last"]["accuracy"] < 0.5,
         "{last[accuracy]:.0%} of the training pairs are ranked right", "chosen and rejected may be swapped; else more "
         "dpo.max_steps or a higher dpo.lr"),
        ("distance", "warn", lambda n: n["kl"] > n["response_length_after"],
         "KL {kl:.1f} nats in answers of {response_length_after:.1f} tokens: more than a nat a token",
         "pairs that the policy ranks right say nothing about what else it says: a lower dpo.lr, a larger dpo.beta"),
    ),
    "ppo": (  # before its first update the actor is the SFT model: ratio 1, KL 0, whatever the data
        ("first ratio", "fail", lambda n: abs(n["first"]["first_ratio_max"] - 1) > n["slack"]
         or n["most"]["first_ratio_max"] - 1 > 10 * n["slack"],  # the largest of all tokens and rollouts
         "ratio {first[first_ratio_max]:.4f} before the updates of the first rollout, {most[first_ratio_max]:.4f} of "
         "the worst; 1 is right", OTHER_LOGPROBS),
        ("first approx_kl", "fail", lambda n: max(abs(n["first"]["first_approx_kl"]), n["most"]["first_approx_kl"])
         > n["slack"], "approx_kl up to {most[first_approx_kl]:.2g} before the updates of a rollout; 0 is right",
         OTHER_LOGPROBS),
        ("first KL", "fail", lambda n: abs(n["first"]["kl"]) > 20 * n["slack"],
         "KL {first[kl]:.3f} in the first rollout; 0 is right",
         "actor and ref are not the same model at the start: make ppo anew with --fresh after sft"),
        ("sampler", "fail", lambda n: n["first"]["sampler_gap"] > max(10 * n["slack"], 0.01),
         "a sampled token's log-probability is {first[sampler_gap]:.2g} off when it is computed again",
         "sampling was greedy, filtered or at another temperature than sampling.temperature, or dropout is on"),
        ("sampled tokens", "fail",
         lambda n: abs(n["last"]["surprisal"] - n["last"]["entropy"]) > 0.05 + 0.3 * n["last"]["entropy"],
         "sampled tokens have {last[surprisal]:.3f} nats, where the policy's entropy says {last[entropy]:.3f}",
         "sampling was greedy, filtered or at another temperature than sampling.temperature"),
        ("reference scores", "fail", lambda n: n["first"]["reference_gap"] > 4 * n["slack"],
         "rows that the reward stage scored get other scores in PPO, {first[reference_gap]:.3f} away",
         "the score is read at another token than the last real one: check padding side, EOS = pad and the mask"),
        ("first scores", "warn", lambda n: abs(n["first"]["score_mean"]) > 3 * n["first"]["score_std"],
         "mean score {first[score_mean]:.2f} of the SFT model's answers, where the reward model's answers have 0",
         "if 'reference scores' is silent, the SFT model says other things than it was taught: look at samples"),
        ("KL", "fail", lambda n: n["last"]["kl"] < -0.5, "KL {last[kl]:.2f}, clearly negative",
         "the samples do not come from the policy that is measured: sampling has to be temperature alone (top_p 1, "
         "top_k 0), and the mask has to end after EOS"),
        ("distance", "warn", lambda n: n["last"]["kl"] > n["last"]["response_length"],
         "KL {last[kl]:.1f} nats in answers of {last[response_length]:.1f} tokens: more than a nat a token",
         "the policy has run away from the SFT model: a larger ppo.kl_coef, a lower ppo.lr_actor, fewer steps"),
        ("pad = EOS", "fail", lambda n: n["pad_is_eos"] and n["first"]["eos_rate"] < 0.1,
         "{first[eos_rate]:.0%} of the SFT model's responses end, and its tokenizer pads with EOS",
         "EOS was masked as if it were padding: a tokenizer with a pad token of its own, and sft anew with --fresh"),
        ("ends", "warn", lambda n: n["last"]["eos_rate"] < 0.5,
         "only {last[eos_rate]:.0%} of the responses end by themselves",
         "a larger sampling.max_new_tokens; or an SFT stage whose rows end in EOS; or ppo.missing_eos_score below the "
         "usual score"),
        ("EOS rate", "warn", lambda n: n["last"]["eos_rate"] < n["first"]["eos_rate"] - 0.3,
         "EOS rate {first[eos_rate]:.0%} at first, {last[eos_rate]:.0%} now: it forgets to end",
         "ppo.missing_eos_score below the usual score; a larger ppo.kl_coef"),
        ("length", "warn", lambda n: not 0.5 < n["last"]["response_length"] / n["first"]["response_length"] < 1.5,
         "{first[response_length]:.0f} tokens an answer at first, {last[response_length]:.0f} now",
         "the reward may pay for length: see 'reward against length', read samples, a larger ppo.kl_coef"),
        ("entropy", "warn", lambda n: n["last"]["entropy"] < 0.2 * n["first"]["entropy"],
         "entropy {first[entropy]:.3f} nats a token at first, {last[entropy]:.3f} now: it repeats itself",
         "a larger ppo.kl_coef, a lower ppo.lr_actor"),
        ("values", "warn", lambda n: n["last"]["explained_variance"] < 0,
         "explained variance {last[explained_variance]:.2f}: the critic is worse than a constant",
         "a higher ppo.lr_critic, a larger ppo.value_clip_range, or ppo.advantage=rloo, which needs no critic"),
        ("advantages", "fail", lambda n: abs(n["last"]["advantage_std"] - 1) > 0.1,
         "deviation {last[advantage_std]:.3f} of whitened advantages; 1 is right",
         "all rewards are the same, or whitening does not see the batch of all ranks"),
        ("gradients", "warn", lambda n: n["least"]["grad_norm_actor"] > n["pipeline"]["ppo"]["grad_clip"],
         "every update of the actor is clipped: gradient norm at least {least[grad_norm_actor]:.2f} of late",
         "a lower ppo.lr_actor or a larger batch; ppo.grad_clip shortens every step"),
        ("score scale", "warn", lambda n: not 1 / 3 < n["last"]["score_std"] / n["first"]["score_std"] < 3,
         "deviation of the scores {first[score_std]:.2f} at first, {last[score_std]:.2f} now",
         "the answers have left what the reward model has seen: a larger ppo.kl_coef, or stop earlier"),
        ("scores", "fail", lambda n: n["last"]["score_std"] < 1e-6, "all responses have the same score",
         "no advantage, no learning: look at reward accuracy, at ppo.score_clip and at the samples"),
        ("clipping", "warn", lambda n: n["last"]["clip_fraction"] > 0.4, "clip_fraction {last[clip_fraction]:.2f}",
         "the updates are too large: a lower ppo.lr_actor or fewer ppo.ppo_epochs"),
        ("score", "warn", lambda n: n["score_after"] < n["score_before"],
         "score {score_before:.3f} before, {score_after:.3f} after",
         "PPO made it worse: a lower ppo.lr_actor, a lower ppo.kl_coef, or more ppo.max_steps"),
    ),
}
"""Stage -> faults in its numbers: (name, state, recognised by, found, cure). The numbers are those of result.json,
`first`, `last`, `least` and `most` of the metrics (the first step; means and minima over the last quarter, which speaks
for how things stand now; maxima over all steps), `pipeline`, `pad_is_eos` and `slack`, what rounding may do to a ratio.
A rule whose numbers are missing is passed over."""


def run_checks(run_root: Path) -> list[Check]:
    """Checks of every stage in a run folder, in the order of the chain; reads files only."""
    root = Path(run_root).absolute()
    if not any((root / stage / "config.json").exists() for stage in STAGES):
        return [Check("run", f"{root} holds no stage of a run", "fail",
                      "name a run folder, such as runs/tiny, or make one with `dschat run --preset tiny`")]
    checks = []
    for stage in STAGES:
        run = open_run(root, stage)
        if stage == "dpo" and not run.path.exists():  # an alternative to PPO, no part of the chain
            continue
        try:
            checks.append(_status(run))
            rows = read_metrics(run.metrics_path)
            checks += [*_missing_numbers(run, rows), *_wrong_numbers(run, rows), *_rollout(run)]
        except (RunError, json.JSONDecodeError, UnicodeDecodeError) as error:
            checks.append(Check(stage, f"unreadable file in {run.path}: {error}", "fail",
                                f"make the stage anew with `dschat {stage} --fresh --run-root '{root}'`"))
    return checks


def _status(run: StageRun) -> Check:
    """How the stage stands. Raises RunError for a damaged status.json."""
    state, status = run.state, run.status
    at = f"step {status.get('step', 0)} of {status.get('total', 0)}"
    quiet = (time.time() - status.get("updated", 0)) / 60
    error = (status.get("error") or "no message").strip().splitlines()[0]
    here = f"--run-root '{run.root}'"
    again = f"`dschat {run.stage} --resume auto {here}` goes on, --fresh begins again; logs: {run.logs}"
    if state == "running" and quiet >= QUIET_MINUTES:
        state = "silent"
    return Check(run.stage, *{
        "finished": (f"finished, {at}",),
        "missing": ("not run yet", "warn", f"`dschat {run.stage} {here}`, or its notebook"),
        "running": (f"running, {at}",),
        "silent": (f"running, {at}, but silent for {quiet:.0f} minutes", "warn",
                   f"look at {run.logs}; if it hangs, interrupt it and go on with --resume auto"),
        "interrupted": (f"interrupted at {at}", "warn", again),
        "failed": (f"failed at {at}: {error}", "fail", again),
    }[state])


def _missing_numbers(run: StageRun, rows: list[dict]) -> Iterator[Check]:
    """NaN and infinity are written as null; steps have to rise, and to reach the end where the stage has."""
    stage = run.stage
    lost = [(name, row.get("step")) for row in rows for name, value in row.items() if value is None]
    if lost:
        rate = "ppo.lr_actor" if stage == "ppo" else f"{stage}.lr"
        yield Check(f"{stage} numbers", f"{lost[0][0]} not finite at step {lost[0][1]}", "fail",
                    f"training has diverged: a lower learning rate, `--set {rate}=...` and --fresh")
    steps = [row.get("step", 0) for row in rows]
    if steps != sorted(steps):
        yield Check(f"{stage} metrics", "steps do not rise in metrics.jsonl", "warn",
                    "two jobs wrote into one folder: make the stage anew with --fresh")
    elif steps and run.state == "finished" and steps[-1] != run.status.get("step"):
        yield Check(f"{stage} stale metrics", f"metrics.jsonl ends at step {steps[-1]}, the stage at "
                    f"{run.status.get('step')}", "fail", "figures and checks speak of an earlier time: was the file "
                    "edited, or put there from another run? make the stage anew with --fresh")


def _pads_with_eos(model: Path) -> bool:
    """Whether a model folder's tokenizer has no pad token but EOS."""
    path = model / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {"pad_token": "unknown"}
    return said.get("pad_token") in (None, said.get("eos_token"))


def _rollout(run: StageRun) -> Iterator[Check]:
    """How PPO generated, and what the comparison with plain transformers said."""
    said = read_json(run.path / "result.json").get("rollout") if (run.path / "result.json").exists() else None
    if said:
        yield Check(f"{run.stage} rollout", f"path {said['path']}: {said['reason']}",
                    "ok" if said["path"] == "slots" else "warn",
                    "nothing is wrong, but generation is slower than it could be: report the model's family")


def _wrong_numbers(run: StageRun, rows: list[dict]) -> Iterator[Check]:
    """The RULES that the numbers of a stage break, and how many hold. Raises RunError for a finished stage without its
    result.json."""
    numbers = {**(run.result if run.state == "finished" else {}), "first": {}, "last": {}, "least": {},
               "most": {}}
    if rows:
        last = rows[-max(1, len(rows) // 4):]
        for name in rows[0]:
            if values := [row[name] for row in last if isinstance(row.get(name), int | float)]:
                numbers["last"][name], numbers["least"][name] = math.fsum(values) / len(values), min(values)
                numbers["most"][name] = max(row[name] for row in rows if isinstance(row.get(name), int | float))
        numbers["first"] = rows[0] if rows[0].get("step") == 1 else {}
        numbers["pipeline"] = run.config["pipeline"]
        numbers["pad_is_eos"] = run.stage == "ppo" and _pads_with_eos(open_run(run.root, "sft").model_dir)
        numbers["slack"] = 1e-3 if numbers["pipeline"]["model"]["dtype"] == "fp32" else 5e-2
    held = seen = 0
    for name, state, wrong, found, cure in RULES.get(run.stage, ()):
        with suppress(KeyError, TypeError, ZeroDivisionError):  # a number that is missing, null or 0
            broken, seen = wrong(numbers), seen + 1
            held += not broken
            if broken:
                yield Check(f"{run.stage} {name}", found.format(**numbers), state, cure)
    if held:
        yield Check(f"{run.stage} checks", f"{held} of {seen} checks of its numbers hold")
