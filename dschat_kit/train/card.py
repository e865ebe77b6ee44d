"""The model card: what an exported folder was made of, in words and in the YAML that the Hub reads."""

import json
from pathlib import Path

from dschat_kit.config import Pipeline
from dschat_kit.runs import StageRun

TITLES = {"sft": "supervised fine-tuning", "reward": "a reward model", "dpo": "direct preference optimisation",
          "ppo": "PPO"}
USE = {"reward": "Score of a response: `(logit - config.score_shift) * config.score_scale` of "
                 "AutoModelForSequenceClassification at the last token."}


def model_card(run: StageRun, result: dict, what: str = "") -> str:
    """README.md of a finished stage's model: data, configuration that is not the default, metrics and versions."""
    pipeline, default = run.pipeline, Pipeline().to_dict()
    settings = {f"`{section}.{name}`": value for section, values in pipeline.to_dict().items()
                if isinstance(values, dict) for name, value in values.items() if value != default[section][name]}
    numbers = {name: f"{value:.6g}" for name, value in result.items() if type(value) in (int, float)}
    shares = [_public(source) + ("" if weight is None else f" ({weight:g})")
              for source, weight in pipeline.data.weighted_sources()]
    base = "random weights" if pipeline.model.name == "scratch" else _public(pipeline.model.name)
    task = "text-classification" if run.stage == "reward" else "text-generation"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [rlhf, deepspeed, dschat_kit]
---
# {run.root.name}: {TITLES[run.stage]}{what}

Made by dschat_kit from {base}: configuration {result["config_hash"]}, seed {result["seed"]}, \
{result["world_size"]} ranks, ZeRO-{pipeline.zero.stage}, {pipeline.model.dtype}. {USE.get(run.stage, "")}

## Data
{", ".join(shares)}; shares of the stages {pipeline.data.stage_split}, split by prompt.

## Metrics
{_table("metric", numbers)}

## Configuration
What differs from the defaults; the whole of it is the run's config.json.

{_table("setting", {name: json.dumps(_public(value)) for name, value in settings.items()})}

## Versions
{", ".join(f"{name} {version}" for name, version in result["versions"].items())}
"""


def _table(head: str, rows: dict[str, str]) -> str:
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _public(value):
    """A path without the folders above it: where a file lies here is nobody's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
