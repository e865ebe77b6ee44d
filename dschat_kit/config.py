"""The whole configuration of a pass through the chain, typed and frozen.

A `Pipeline` is a tree of small dataclasses, one a section. It travels as JSON in every stage's
`config.json`, complete and resolved, so that a run folder explains itself without this code.
Every field carries its bounds; every error is a `ConfigError` that says what was got, what is expected and what to
change. Left out on purpose: command-line flags. A value is set by its path, `ppo.kl_coef=0.05`.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import typing
from dataclasses import dataclass, field

from dschat_kit.data_section import Data
from dschat_kit.model_section import Lora, Model, Zero
from dschat_kit.sections import ConfigError, Section, bounded, build, error, parse, unknown

__all__ = ["ConfigError", "Data", "Pipeline", "REQUIRES", "STAGES"]

STAGES = ("data", "sft", "reward", "dpo", "ppo", "chat")
REQUIRES = {"data": (), "sft": ("data",), "reward": ("data", "sft"), "dpo": ("data", "sft", "reward"),
            "ppo": ("data", "sft", "reward"), "chat": ("sft", "ppo")}
"""Stages whose results a stage reads; data is built on the way where it is missing."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Section):
    max_new_tokens: int = bounded(64, least=1)
    temperature: float = bounded(1.0, above=0, why="PPO samples")
    top_p: float = bounded(1.0, one_of=(1.0,), why="filtered tokens have other probabilities than the trained policy's")
    top_k: int = bounded(0, one_of=(0,), why="as sampling.top_p")


@dataclass(frozen=True, kw_only=True)
class Training(Section):
    """What SFT and reward modelling have in common."""
    epochs: int = bounded(1, least=1)
    max_steps: int = bounded(0, least=0)
    """Optimiser steps at most; 0 leaves it to epochs."""
    batch_size: int = bounded(32, least=1)
    """Rows of one optimiser step, over all ranks."""
    micro_batch_size: int = bounded(8, least=1)
    """Rows of one forward pass on one rank; the rest is gradient accumulation."""
    lr: float = bounded(1e-3, above=0)
    warmup: float = bounded(0.05, least=0, most=1)
    """Share of the steps in which the learning rate rises; it then falls as a cosine."""
    min_lr: float = bounded(0.05, least=0, most=1)
    """Where the cosine ends, as a share of lr."""
    weight_decay: float = bounded(0.0, least=0)
    grad_clip: float = bounded(1.0, above=0)
    eval_every: int = bounded(50, least=1)
    """Steps between evaluations on held-out rows."""
    eval_rows: int = bounded(256, least=1)
    """Held-out rows of each of these; the reward model's last evaluation takes all."""

    def __post_init__(self):
        super().__post_init__()
        self.divides("micro_batch_size", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    packing: bool = False
    """Pack the rows of a micro batch into few sequences, where the model keeps them apart; the loss is the same."""


@dataclass(frozen=True, kw_only=True)
class Reward(Training):
    model: str = ""
    """Folder or Hub name of another base for reward model and critic (same tokenizer); empty takes the SFT model."""
    scale: bool = False
    """Also divide the scores by their standard deviation on reference responses (the shift to mean 0
    is always made)."""


@dataclass(frozen=True, kw_only=True)
class Dpo(Training):
    beta: float = bounded(0.1, above=0)
    """Weight of the KL penalty in the objective whose optimum the loss aims at."""
    eval_prompts: int = bounded(256, least=1)
    """Held-out prompts answered before and after."""
    seed: int = bounded(0, least=0)
    """As ppo.seed."""


@dataclass(frozen=True, kw_only=True)
class Ppo(Section):
    max_steps: int = bounded(24, least=1)
    """PPO iterations: one rollout and its updates each."""
    rollout_batch_size: int = bounded(128, least=1)
    """Responses sampled an iteration, over all ranks."""
    mini_batch_size: int = bounded(32, least=1)
    """Responses of one optimiser step, over all ranks."""
    micro_batch_size: int = bounded(16, least=1)
    """Responses of one forward pass on one rank; the rest is gradient accumulation."""
    ppo_epochs: int = bounded(1, least=1)
    """Passes over each rollout, reshuffled each time."""
    lr_actor: float = bounded(4e-4, above=0)
    lr_critic: float = bounded(1e-3, above=0)
    warmup: float = bounded(0.0, least=0, most=1)
    """Share of the iterations in which both learning rates rise; they then fall linearly to min_lr."""
    min_lr: float = bounded(0.0, least=0, most=1)
    """Where they end, as a share of the highest."""
    kl_coef: float = bounded(0.1, least=0)
    """Weight of the per-token KL penalty against the SFT policy (beta)."""
    kl_target: float = bounded(0.0, least=0)
    """Nats an answer that kl_coef is steered to, by at most a fifth in kl_horizon responses; 0 keeps it fixed."""
    kl_horizon: int = bounded(10_000, least=1)
    advantage: str = bounded("gae", one_of=("gae", "rloo", "grpo", "reinforce"))
    """gae needs a critic; reinforce compares with the batch, rloo and grpo with other answers to the same prompt."""
    samples_per_prompt: int = bounded(1, least=1)  # 2 or more for rloo and grpo
    ptx_coef: float = bounded(0.0, least=0)
    """Weight of the language-model loss on SFT rows in each optimiser step of the actor; 0 is off."""
    gamma: float = bounded(1.0, least=0, most=1)
    gae_lambda: float = bounded(0.95, least=0, most=1)
    clip_range: float = bounded(0.2, above=0)
    clip_range_high: float = bounded(0.0, least=0)
    """How far the ratio may rise, where that is not as far as it may fall; 0 is clip_range."""
    dual_clip: float = bounded(0.0, least=0)
    """A bad token whose ratio has risen counts at most so many times (3 in the paper); 0 is off."""
    whiten_rewards: bool = False  # without a shift of their mean, which would pay for length
    value_clip_range: float = bounded(0.2, above=0)
    score_clip: float = bounded(5.0, least=0)
    """Scores of the reward model are clipped to +- this value; 0 is off."""
    missing_eos_score: float | None = None
    """Score of a response that did not end within max_new_tokens; null keeps the reward model's."""
    grad_clip: float = bounded(1.0, above=0)
    ema_decay: float = bounded(0.0, least=0, below=1)
    """Of the moving average of the actor's weights over optimiser steps, exported to `ema/`; DeepSpeed-Chat's value is
    0.992, 0 keeps none."""
    eval_prompts: int = bounded(256, least=1)
    """Held-out prompts answered before and after."""
    seed: int = bounded(0, least=0)
    """Added to the pipeline's: prompts, sampling and minibatches differ, the stages before stay the same."""

    def __post_init__(self):
        super().__post_init__()
        self.divides("mini_batch_size", "rollout_batch_size")
        self.divides("micro_batch_size", "mini_batch_size")
        self.divides("samples_per_prompt", "rollout_batch_size")
        if 0 < self.dual_clip <= 1 + (self.clip_range_high or self.clip_range):
            raise error("ppo.dual_clip", repr(self.dual_clip), "above 1 + the clip range, or 0",
                        "--set ppo.dual_clip=3")
        if self.advantage in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise error("ppo.samples_per_prompt", repr(self.samples_per_prompt), f"at least 2 for {self.advantage}")


@dataclass(frozen=True, kw_only=True)
class Rollout(Section):
    micro_batch_size: int = bounded(64, least=1)
    """Responses that one rank generates or scores at a time; one that ends gives its place to the next prompt."""
    reuse_logprobs: str = bounded("auto", one_of=("auto", "always", "never"))
    """Whether PPO takes the log-probabilities that the sampler has seen instead of computing them again. auto does so
    in fp32, where they agree to 1e-5; in bf16 they differ visibly (`first_ratio_max` says how much)."""
    release_inference_cache: bool = True
    """Free the weights and the key-value memory of generation before training goes on."""
    max_out_tokens: int = bounded(0, least=0)
    """Prompt and response together have at most so many tokens; 0 leaves it to the model's positions."""
    cuda_graphs: bool = False
    """Start all kernels of a decode step by one call (CUDA only): worth it where a step is short. Not run so far."""
    inference_tp_size: int = bounded(1, least=1)
    """So many consecutive ranks split the weights of every layer while they generate, and answer their prompts
    together: for a model whose whole weights do not fit into one device."""
    gather: str = bounded("auto", one_of=("auto", "rollout", "step"))
    """When the weights that ZeRO-3 has sharded are gathered for generation: once a rollout, or layer by layer in every
    step, which is slow and needs memory for one layer. auto does the first where the whole weights fit; say which where
    a resumed run has to go on bit for bit on another machine."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    every_steps: int = bounded(0, least=0)
    """Steps between resumable checkpoints; 0 counts no steps. A stage that is asked to end always saves one."""
    every_minutes: float = bounded(0.0, least=0)
    """Minutes between them; 0 looks at no clock. Both may be set."""
    keep: int = bounded(2, least=1)
    """So many of the newest stay."""


@dataclass(frozen=True, kw_only=True)
class Telemetry(Section):
    samples: int = bounded(64, least=0)
    """Generations written to samples.jsonl at each look (before, after)."""
    rollout_samples: int = bounded(4, least=0)
    """Generations written to samples.jsonl from each PPO rollout."""
    hang_minutes: float = bounded(30.0, above=0)
    """A rank without progress for so long writes its stack to its log and ends the job."""
    tensorboard: bool = False
    """Write the metrics to the stage's tensorboard/ as well, through DeepSpeed's monitor."""
    csv: bool = False
    """Likewise one file a metric in csv/."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Section):
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    zero: Zero = field(default_factory=Zero)
    sampling: Sampling = field(default_factory=Sampling)
    sft: Sft = field(default_factory=Sft)
    reward: Reward = field(default_factory=Reward)
    dpo: Dpo = field(default_factory=Dpo)
    ppo: Ppo = field(default_factory=Ppo)
    rollout: Rollout = field(default_factory=Rollout)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    telemetry: Telemetry = field(default_factory=Telemetry)
    seed: int = bounded(0, least=0)

    def __post_init__(self):
        super().__post_init__()
        self.zero.check_user_json(self.model.dtype)
        if self.lora.share_base and self.zero.offloads("offload_optimizer"):
            raise error("zero.offload_optimizer", "offloading with lora.share_base", "none: the roles' backward passes "
                        "take turns, which offloading does not follow; adapters have small states",
                        "--set zero.offload_optimizer=false")
        if self.lora.share_base and self.ppo.advantage != "gae":
            raise error("ppo.advantage", repr(self.ppo.advantage), "gae with lora.share_base",
                        "--set lora.share_base=false")
        if self.lora.share_base and self.reward.model:
            raise error("reward.model", repr(self.reward.model), "none with lora.share_base: the roles share one model",
                        "--set lora.share_base=false")

    @classmethod
    def from_dict(cls, tree: dict) -> "Pipeline":
        """Build from nested dictionaries. Raises ConfigError on unknown names and wrong types."""
        return build(cls, tree)

    def to_dict(self) -> dict:
        """Nested dictionaries of plain JSON values, nothing left out."""
        return dataclasses.asdict(self)

    def with_overrides(self, overrides: typing.Iterable[str]) -> "Pipeline":
        """A copy with `section.field=value` texts applied in order. Raises ConfigError."""
        tree = self.to_dict()
        for text in overrides:
            path, equals, value = (part.strip() for part in text.partition("="))
            if not equals:
                raise error("--set", repr(text), "section.field=value", "--set ppo.kl_coef=0.05")
            section, _, name = path.rpartition(".")
            hints = typing.get_type_hints(_sections().get(section, object))
            if name not in hints or dataclasses.is_dataclass(hints[name]):
                inside = path if path in _sections() else section if section in _sections() else ""
                raise unknown(path, _sections()[inside], inside and f"{inside}.")
            (tree[section] if section else tree)[name] = parse(value, hints[name])
        return self.from_dict(tree)

    def check_ranks(self, stage: str, ranks: int) -> None:
        """Raises ConfigError when a global batch of the stage does not divide into micro batches on so many ranks."""
        settings = getattr(self, stage, None)
        if stage in ("dpo", "ppo") and ranks % self.rollout.inference_tp_size:
            raise error("rollout.inference_tp_size", repr(self.rollout.inference_tp_size),
                        f"a divisor of {ranks} ranks", "--set rollout.inference_tp_size=1")
        if self.rollout.inference_tp_size > 1 and self.rollout.gather == "step":
            raise error("rollout.gather", "step with split weights", "one of the two", "--set rollout.gather=auto")
        if stage in ("dpo", "ppo") and self.rollout.gather == "step" and self.zero.stage < 3:
            raise error("rollout.gather", f"step with zero.stage {self.zero.stage}", "zero.stage 3: below it every "
                        "rank holds the whole weights", "--set rollout.gather=auto")
        if stage == "ppo" and self.ppo.rollout_batch_size // self.ppo.samples_per_prompt % ranks:
            raise error("ppo.samples_per_prompt", repr(self.ppo.samples_per_prompt),
                        f"a multiple of {ranks} prompts a rollout: all answers to one stay on one rank")
        for name in ("batch_size", "mini_batch_size"):
            size, multiple = getattr(settings, name, 0), ranks * getattr(settings, "micro_batch_size", 1)
            if size % multiple:
                raise error(f"{stage}.{name}", repr(size),
                            f"a multiple of {multiple}: whole micro batches on {ranks} ranks",
                            f"--set {stage}.{name}={-(-size // multiple) * multiple}, or --num-gpus")

    def config_hash(self, stage: str) -> str:
        """Hash of every setting that the results of `stage` depend on, those of earlier stages included."""
        names, due = set(), {stage}
        while due:
            names |= set(_READS[stage := due.pop()])
            due |= set(REQUIRES[stage])
        seen = {name: functools.reduce(operator.getitem, name.split("."), self.to_dict()) for name in sorted(names)}
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


_READS = {"data": ("data", "model.name", "model.vocab_size", "seed"), "chat": (), "reward": ("reward",),
          "sft": ("model", "lora.rank", "lora.alpha", "lora.targets", "zero", "sft"),
          "dpo": ("dpo", "sampling", "rollout"), "ppo": ("ppo", "sampling", "rollout", "lora.share_base")}
"""What a stage reads beside what the stages before it read."""


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(Pipeline)
    return {"": Pipeline} | {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
