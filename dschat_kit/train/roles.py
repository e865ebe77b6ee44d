"""The models that stage 3 begins with, and the engine that its policy answers with: what PPO and DPO share."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PreTrainedModel

from dschat_kit.engine.engines import freeze
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.shared import Reference
from dschat_kit.engine.zero import sharded_loading
from dschat_kit.models.loading import load_causal_lm
from dschat_kit.models.packed import pack
from dschat_kit.models.scalar_model import ScalarModel, load_scalar_model
from dschat_kit.runs import open_run
from dschat_kit.train.session import Session


def load_policy(session: Session, tokenizer, folder: Path | None = None) -> PreTrainedModel:
    """The model that SFT exported, or that of another folder; at ZeRO-3 sharded while it loads."""
    pipeline, folder = session.pipeline, folder or open_run(session.root, "sft").model_dir
    with sharded_loading(pipeline, folder):
        return load_causal_lm(folder, pipeline.model, tokenizer, pipeline.seed)


def load_reward(session: Session) -> ScalarModel:
    """The model that the reward stage exported; at ZeRO-3 sharded while it loads."""
    pipeline, folder = session.pipeline, open_run(session.root, "reward").model_dir
    with sharded_loading(pipeline, folder):
        return load_scalar_model(folder, pipeline.model, pipeline.seed, new_head=False)


def reference(session: Session, actor: DeepSpeedEngine, tokenizer):
    """What the SFT model says: the actor without its adapters, or where it has none a second, frozen model."""
    if session.pipeline.lora.rank:
        return Reference(actor)
    return scorer(session, load_policy(session, tokenizer))


def scorer(session: Session, model: nn.Module) -> nn.Module:
    """A frozen model that is only asked for what it says of rows: its weights lie as a CPU reads them best."""
    return pack(freeze(model, session.pipeline, session.device))


def rollout_engine(session: Session, actor: DeepSpeedEngine | PreTrainedModel) -> HybridEngine:
    """The hybrid engine of the configuration's `rollout`, for an engine or a frozen model; the watchdog sees its steps.
    """
    if isinstance(actor, PreTrainedModel):
        actor = SimpleNamespace(module=actor, device=session.device)
    settings = dataclasses.asdict(session.pipeline.rollout)
    del settings["reuse_logprobs"]  # the loop's
    hybrid = HybridEngine(actor, **settings)
    session.follow(hybrid.replica.model)
    return hybrid
