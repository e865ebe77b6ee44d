"""The model card: what an exported folder was made of, in words and in the YAML that the Hub reads."""

import json
from pathlib import Path

from dschat_kit.runs import StageRun

__all__ = ["model_card"]

TITLES = {"sft": "supervised fine-tuning", "reward": "a reward model", "ppo": "PPO"}
USE = {"reward": "Score of a response: `(logit - config.score_shift) * config.score_scale` of "
                 "AutoModelForSequenceClassification at the last token."}


def model_card(run: StageRun, result: dict, what: str = "") -> str:
    """README.md of a finished stage's model: data, configuration that is not the default, metrics and versions."""
    pipeline = run.pipeline
    changed = [f"| `{section}.{name}` | {json.dumps(_public(value) if isinstance(value, str) else value)} |" for section, values in pipeline.to_dict().items()
               if isinstance(values, dict) for name, value in values.items()
               if value != getattr(type(getattr(pipeline, section))(), name)]
    numbers = [f"| {name} | {value:.6g} |" for name, value in result.items()
               if isinstance(value, (int, float)) and not isinstance(value, bool)]
    shares = ", ".join(_public(source) + ("" if weight is None else f" ({weight:g})")
                       for source, weight in pipeline.data.weighted_sources())
    base = "random weights" if pipeline.model.name == "scratch" else _public(pipeline.model.name)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {_task(run.stage)}",
             "tags: [rlhf, deepspeed, dschat_kit]", "---", f"# {run.root.name}: {TITLES[run.stage]}{what}", "",
             f"Made by dschat_kit from {base}, configuration {result['config_hash']}, seed {result['seed']}, "
             f"{result['world_size']} ranks, ZeRO-{pipeline.zero.stage}, {pipeline.model.dtype}.", USE.get(run.stage, ""), "", "## Data", "", f"{shares}; stages split {pipeline.data.stage_split}, by prompt.", "",
             "## Metrics", "", "| metric | value |", "|---|---|", *numbers, "",
             "## Configuration", "", "What differs from the defaults; the whole of it is the run's config.json.", "",
             "| setting | value |", "|---|---|", *changed, "",
             "## Versions", "", ", ".join(f"{name} {version}" for name, version in result["versions"].items()), ""]
    return "\n".join(lines)


def _public(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name  # where it lies here is nobody's business


def _task(stage: str) -> str:
    return "text-classification" if stage == "reward" else "text-generation"
