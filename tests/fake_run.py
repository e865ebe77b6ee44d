"""A run folder written by hand, with the files that a finished pass leaves behind."""
import json
import math
import random
import time
from pathlib import Path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(root: Path, steps: int = 120, rollouts: int = 24) -> Path:
    """Fill ROOT with data, sft, reward and ppo folders of a toy run; returns ROOT."""
    noise = random.Random(0)
    sft = [{"step": s, "loss": 1.2 + 4 * math.exp(-s / 30) + noise.gauss(0, .1), "lr": 1e-3, "seconds": .2}
           | ({"eval_loss": 1.3 + 4 * math.exp(-s / 30)} if s % 30 == 0 else {}) for s in range(1, steps + 1)]
    reward = [{"step": s, "loss": .3 + .4 * math.exp(-s / 40) + noise.gauss(0, .03), "margin": s / 60,
               "accuracy": min(1.0, .5 + .35 * (1 - math.exp(-s / 30)) + noise.gauss(0, .05))}
              | ({"eval_accuracy": .5 + .33 * (1 - math.exp(-s / 30))} if s % 30 == 0 else {})
              for s in range(1, steps + 1)]
    ppo = [{"step": s, "score_mean": -.5 + s / 10, "score_std": 1 - s / 60, "kl": s / 30, "response_length": 12 + s / 4,
            "clip_fraction": .1 + noise.random() / 10, "seconds_generation": 2 + noise.random(), "seconds_scoring": .8,
            "seconds_training": 3.0, "seconds_other": .2} for s in range(1, rollouts + 1)]
    parts = {"answers": (.4, .8), "polite": (.2, .9), "short": (.3, .25), "repetition": (-.2, -.05)}
    edges = [x / 4 for x in range(-12, 13)]
    long = "/a/very/long/path/to/some/preferences.jsonl"
    toy = {"sft": 2000, "reward": 2500, "ppo": 3000, "eval": 600}
    tokens = {name: {"median": 9.0, "p95": 20.0} for name in ("prompt", "chosen", "rejected")}
    bell = {name: [round(100 * math.exp(-(x - mean) ** 2)) for x in edges[1:]]
            for name, mean in (("chosen", .8), ("rejected", -.6))}
    results = {
        "data": {"rows": {"toy": toy, long: {"sft": 700, "reward": 900, "eval": 9}}, "tokens": {"reward": tokens},
                 "overlaps": {}, "truncated": {}},
        "sft": {"eval_loss_before": 5.3, "eval_loss_after": 1.3, "eval_perplexity": 3.7, "steps": steps},
        "reward": {"accuracy": .83, "accuracy_interval": [.81, .85], "bayes_accuracy": .87, "steps": steps,
                   "length_baseline_accuracy": .45, "calibration_error": .021,
                   "by_margin": [{"predicted": x, "observed": x - .02, "interval": [x - .06, x + .02]}
                                 for x in (.55, .7, .9)],
                   "by_length_difference": [{"tokens": n, "accuracy": .8, "interval": [.75, .84]} for n in (-4, 0, 5)],
                   "score_histogram": {"edges": edges, **bell}},
        "ppo": {"score_before": -.5, "score_after": 1.9, "kl": .8,
                "gold_before": .7, "gold_std_before": .6, "gold_after": 1.9,
                "gold_parts_before": {name: pair[0] for name, pair in parts.items()},
                "gold_parts_after": {name: pair[1] for name, pair in parts.items()}},
    }
    for stage, rows in (("data", []), ("sft", sft), ("reward", reward), ("ppo", ppo)):
        write_lines(root / stage / "metrics.jsonl", rows)
        (root / stage / "result.json").write_text(json.dumps(results[stage]))
        status = {"state": "finished", "step": len(rows), "total": len(rows), "started": 0, "updated": time.time()}
        (root / stage / "status.json").write_text(json.dumps(status))
    write_lines(root / "ppo/samples.jsonl", [
        {"sample_id": f"p{i}", "phase": phase, "step": 0, "score": i + .5, "gold": .25,
         "prompt": f"Human: What is {i} < {i + 1} & <b>why</b>?",
         "response": "<script>alert(1)</script>" if i == 0 else f"Because {phase}, {'very ' * 12}clearly.\nThank you."}
        for phase in ("before", "rollout", "after") for i in range(8)])
    return root
