"""The whole configuration of a pass through the chain, typed and frozen.

A `Pipeline` is a tree of small dataclasses, one a section. It travels as JSON in every stage's
`config.json`, complete and resolved, so that a run folder explains itself without this code.
Every error is a `ConfigError` that says what was got, what is expected and what to change.
Left out on purpose: command-line flags. A value is set by its path, `ppo.kl_coef=0.05`.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field

__all__ = ["ConfigError", "Pipeline", "STAGES"]

STAGES = ("data", "sft", "reward", "ppo", "chat")
_ARCHITECTURES = ("llama", "qwen3")


class ConfigError(ValueError):
    """A setting that cannot work. The message is meant for the user and is shown without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this: a cell shows the message alone
        return [f"error: {self}"]


def _error(path: str, got, expected: str, change: str) -> ConfigError:
    return ConfigError(f"{path}: got {got!r}\n  expected: {expected}\n  change:   {change}")


def _positive(section: str, obj, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(obj, name)
        if value < 0 or (value == 0 and not zero):
            bound = "zero or more" if zero else "more than zero"
            raise _error(f"{section}.{name}", value, bound, f"--set {section}.{name}=...")


def _one_of(section: str, obj, name: str, allowed: tuple) -> None:
    if getattr(obj, name) not in allowed:
        raise _error(f"{section}.{name}", getattr(obj, name), " | ".join(map(str, allowed)),
                     f"--set {section}.{name}={allowed[0]}")


@dataclass(frozen=True, kw_only=True)
class Data:
    sources: str = "toy"
    """`toy`, or PATH[:weight][,PATH[:weight]...] where PATH is a JSON-lines file, a folder with
    train.jsonl (and eval.jsonl), or a data set of the Hugging Face Hub."""
    columns: str = "prompt,chosen,rejected"
    """Names of the three columns, in this order."""
    rows: int = 0
    """At most so many rows are taken in all (toy: generated); 0 takes every row that there is."""
    stage_split: str = "2,4,4"
    """Shares of the training rows that go to sft, reward and ppo; a prompt is in one of them only."""
    eval_fraction: float = 0.08
    """Share of the prompts held out from all three trainings (sources without an own eval part)."""
    eval_rows: int = 512
    """At most so many held-out rows are evaluated on."""
    max_prompt_tokens: int = 256
    """A longer prompt keeps its end."""
    max_response_tokens: int = 256
    """A longer response keeps its start (and loses its EOS)."""

    def __post_init__(self):
        _positive("data", self, "max_prompt_tokens", "max_response_tokens", "eval_rows")
        _positive("data", self, "rows", zero=True)
        if not 0 < self.eval_fraction < 1:
            raise _error("data.eval_fraction", self.eval_fraction, "between 0 and 1", "--set data.eval_fraction=0.08")
        if len([c for c in self.columns.split(",") if c.strip()]) != 3:
            raise _error("data.columns", self.columns, "three names: prompt, chosen and rejected",
                         "--set data.columns=prompt,chosen,rejected")
        self.split_shares()

    def split_shares(self) -> tuple[float, float, float]:
        """Shares of sft, reward and ppo, summing to 1."""
        try:
            shares = [float(part) for part in self.stage_split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or min(shares) <= 0:
            raise _error("data.stage_split", self.stage_split, "three positive numbers: sft,reward,ppo",
                         "--set data.stage_split=2,4,4")
        return tuple(share / sum(shares) for share in shares)


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "scratch"
    """A local folder or Hub name of a causal language model, or `scratch`: random weights of the shape below."""
    architecture: str = "llama"
    """For `scratch`: llama | qwen3."""
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 384
    initializer_range: float = 0.08
    vocab_size: int = 512
    """For `scratch`: size of the byte-level BPE that is trained on the SFT rows."""
    dtype: str = "auto"
    """auto | fp32 | bf16: auto is bf16 where the hardware multiplies it, else fp32."""
    gradient_checkpointing: bool = False

    def __post_init__(self):
        _one_of("model", self, "dtype", ("auto", "fp32", "bf16"))
        _one_of("model", self, "architecture", _ARCHITECTURES)
        _positive("model", self, "hidden_size", "layers", "heads", "intermediate_size", "initializer_range")
        if self.vocab_size < 260:
            raise _error("model.vocab_size", self.vocab_size, "260 or more (256 bytes and the special tokens)",
                         "--set model.vocab_size=512")
        if self.hidden_size % self.heads:
            raise _error("model.heads", self.heads, f"a divisor of model.hidden_size ({self.hidden_size})",
                         "--set model.heads=4")


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 0
    """Rank of the adapters on every linear layer; 0 trains all weights."""
    alpha: float = 32.0

    def __post_init__(self):
        _positive("lora", self, "rank", zero=True)
        _positive("lora", self, "alpha")


@dataclass(frozen=True, kw_only=True)
class Zero:
    stage: int = 2
    """ZeRO stage: 0 replicates, 1 shards optimiser states, 2 gradients as well, 3 parameters as well."""

    def __post_init__(self):
        _one_of("zero", self, "stage", (0, 1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    """Only for chat: PPO needs the undistorted policy and refuses it."""
    top_k: int = 0
    """Only for chat, as top_p; 0 is off."""

    def __post_init__(self):
        _positive("sampling", self, "max_new_tokens")
        _positive("sampling", self, "temperature", "top_k", zero=True)
        if not 0 < self.top_p <= 1:
            raise _error("sampling.top_p", self.top_p, "above 0 and at most 1", "--set sampling.top_p=1.0")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What SFT and reward modelling have in common."""
    epochs: int = 1
    max_steps: int = 0
    """Optimiser steps at most; 0 leaves it to epochs."""
    batch_size: int = 32
    """Rows of one optimiser step, over all ranks."""
    micro_batch_size: int = 8
    """Rows of one forward pass on one rank; the rest is gradient accumulation."""
    lr: float = 1e-3
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it then falls as a cosine."""
    min_lr: float = 0.05
    """Where the cosine ends, as a share of lr."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    eval_every: int = 50
    """Steps between evaluations on held-out rows."""
    eval_rows: int = 256
    """Held-out rows of each of these; the reward model's last evaluation takes all."""

    def __post_init__(self):
        name = type(self).__name__.lower()
        _positive(name, self, "epochs", "batch_size", "micro_batch_size", "lr", "grad_clip", "eval_every",
                  "eval_rows")
        _positive(name, self, "max_steps", "warmup", "min_lr", "weight_decay", zero=True)
        if self.batch_size % self.micro_batch_size:
            raise _error(f"{name}.micro_batch_size", self.micro_batch_size,
                         f"a divisor of {name}.batch_size ({self.batch_size})", f"--set {name}.micro_batch_size=...")


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    pass


@dataclass(frozen=True, kw_only=True)
class Reward(Training):
    scale: bool = False
    """Also divide the scores by their standard deviation on reference responses (the shift to mean 0
    is always made)."""


@dataclass(frozen=True, kw_only=True)
class Ppo:
    max_steps: int = 24
    """PPO iterations: one rollout and its updates each."""
    rollout_batch_size: int = 128
    """Responses sampled an iteration, over all ranks."""
    mini_batch_size: int = 32
    """Responses of one optimiser step, over all ranks."""
    micro_batch_size: int = 16
    """Responses of one forward pass on one rank; the rest is gradient accumulation."""
    ppo_epochs: int = 1
    """Passes over each rollout, reshuffled each time."""
    lr_actor: float = 4e-4
    lr_critic: float = 1e-3
    warmup: float = 0.0
    """Share of the iterations in which both learning rates rise; they then fall linearly to min_lr."""
    min_lr: float = 0.0
    kl_coef: float = 0.1
    """Weight of the per-token KL penalty against the SFT policy (beta)."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    score_clip: float = 5.0
    """Scores of the reward model are clipped to +- this value; 0 is off."""
    missing_eos_score: float | None = None
    """Score of a response that did not end within max_new_tokens; null keeps the reward model's."""
    grad_clip: float = 1.0
    eval_prompts: int = 256
    """Held-out prompts answered before and after."""

    def __post_init__(self):
        _positive("ppo", self, "max_steps", "rollout_batch_size", "mini_batch_size", "micro_batch_size", "ppo_epochs",
                  "lr_actor", "lr_critic", "clip_range", "value_clip_range", "grad_clip", "eval_prompts")
        _positive("ppo", self, "warmup", "min_lr", "kl_coef", "score_clip", zero=True)
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise _error(f"ppo.{name}", getattr(self, name), "between 0 and 1", f"--set ppo.{name}=1.0")
        if self.rollout_batch_size % self.mini_batch_size:
            raise _error("ppo.mini_batch_size", self.mini_batch_size,
                         f"a divisor of ppo.rollout_batch_size ({self.rollout_batch_size})",
                         "--set ppo.mini_batch_size=...")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    micro_batch_size: int = 64
    """Responses that one rank generates or scores at a time."""

    def __post_init__(self):
        _positive("rollout", self, "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int = 0
    """Steps between resumable checkpoints; 0 keeps none: an interrupted stage then starts again."""
    keep: int = 2

    def __post_init__(self):
        _positive("checkpoint", self, "every_steps", zero=True)
        _positive("checkpoint", self, "keep")


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    samples: int = 64
    """Generations written to samples.jsonl at each look (before, after)."""
    rollout_samples: int = 4
    """Generations written to samples.jsonl from each PPO rollout."""

    def __post_init__(self):
        _positive("telemetry", self, "samples", "rollout_samples", zero=True)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    zero: Zero = field(default_factory=Zero)
    sampling: Sampling = field(default_factory=Sampling)
    sft: Sft = field(default_factory=Sft)
    reward: Reward = field(default_factory=Reward)
    ppo: Ppo = field(default_factory=Ppo)
    rollout: Rollout = field(default_factory=Rollout)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    telemetry: Telemetry = field(default_factory=Telemetry)
    seed: int = 0

    @classmethod
    def from_dict(cls, tree: dict) -> "Pipeline":
        """Build from nested dictionaries. Raises ConfigError on unknown names and wrong types."""
        return _build(cls, tree, "")

    def to_dict(self) -> dict:
        """Nested dictionaries of plain JSON values, nothing left out."""
        return dataclasses.asdict(self)

    def with_overrides(self, overrides: typing.Iterable[str]) -> "Pipeline":
        """A copy with `section.field=value` texts applied in order."""
        tree = self.to_dict()
        for text in overrides:
            path, equals, value = text.partition("=")
            keys = path.strip().split(".")
            if not equals or not 1 <= len(keys) <= 2:
                raise _error("--set", text, "section.field=value", "--set ppo.kl_coef=0.05")
            node = tree if len(keys) == 1 else tree.get(keys[0], {})
            if not isinstance(node, dict) or keys[-1] not in node or isinstance(node[keys[-1]], dict):
                raise _unknown(type(self), path.strip())
            node[keys[-1]] = _parse(value.strip())
        return self.from_dict(tree)

    def check_ranks(self, stage: str, ranks: int) -> None:
        """Raises ConfigError when a global batch of the stage does not divide into micro batches on so many ranks."""
        settings = getattr(self, stage, None)
        for name in ("batch_size", "mini_batch_size", "rollout_batch_size"):
            size, unit = getattr(settings, name, 0), getattr(settings, "micro_batch_size", 1) * ranks
            if name == "rollout_batch_size":
                unit = ranks
            if size % unit:
                raise _error(f"{stage}.{name}", size, f"a multiple of {unit}, for {ranks} ranks"
                             + (f" with {stage}.micro_batch_size={settings.micro_batch_size}" if unit != ranks else ""),
                             f"--set {stage}.{name}={-(-size // unit) * unit}, or another --num-gpus")

    def config_hash(self, stage: str) -> str:
        """Hash of every setting that the results of `stage` depend on, those of earlier stages included."""
        seen = {name: value for name, value in self.to_dict().items() if name in _DEPENDS[stage]}
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


_DEPENDS = {
    "data": ("data", "model", "seed"),
    "sft": ("data", "model", "seed", "lora", "zero", "sft"),
    "reward": ("data", "model", "seed", "lora", "zero", "sft", "reward"),
    "ppo": ("data", "model", "seed", "lora", "zero", "sft", "reward", "ppo", "sampling", "rollout"),
    "chat": ("data", "model", "seed", "lora", "zero", "sft", "reward", "ppo", "sampling", "rollout"),
}


def _parse(text: str):
    """JSON where it is JSON (`0.1`, `true`, `null`), otherwise the text itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if isinstance(value, (list, dict)) else value


def _unknown(cls, path: str) -> ConfigError:
    section = {f.name: f for f in dataclasses.fields(cls)}.get(path.split(".")[0])
    inner = section.default_factory if section and "." in path and dataclasses.is_dataclass(section.default_factory) else cls
    names = ", ".join(f.name for f in dataclasses.fields(inner))
    return _error(path, "an unknown name", f"one of: {names}", "check the spelling")


def _build(cls, tree: dict, prefix: str):
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in hints:
            raise _unknown(cls if not prefix else Pipeline, path)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise _error(path, value, "a section (an object)", "give its fields")
            values[name] = _build(hints[name], value, f"{path}.")
        else:
            values[name] = _checked(value, hints[name], path)
    return cls(**values)


def _checked(value, hint, path: str):
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int:
        value = float(value)
    if str in allowed and type(value) in (int, float, bool):
        value = str(value)
    if type(value) not in allowed or value != value or value in (float("inf"), float("-inf")):
        names = " or ".join("null" if a is types.NoneType else a.__name__ for a in allowed)
        raise _error(path, value, f"a finite {names}" if float in allowed else names, f"--set {path}=...")
    return value
