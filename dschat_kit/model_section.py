"""The sections Model, Lora and Zero: how weights are made and held, with the user's own DeepSpeed JSON."""

import functools
import json
from dataclasses import dataclass

from dschat_kit.sections import Section, bounded, error


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    name: str = "scratch"
    """A local folder or Hub name of a causal language model, or `scratch`: random weights of the shape below."""
    architecture: str = bounded("llama", one_of=("llama", "qwen3"))
    """For `scratch`."""
    hidden_size: int = bounded(128, least=1)
    layers: int = bounded(2, least=1)
    heads: int = bounded(4, least=1)
    intermediate_size: int = bounded(384, least=1)
    initializer_range: float = bounded(0.08, above=0)
    vocab_size: int = bounded(512, least=260, why="256 bytes and the special tokens")
    """For `scratch`: size of the byte-level BPE that is trained on the SFT rows."""
    dtype: str = bounded("auto", one_of=("auto", "fp32", "bf16", "fp16"))
    """auto is bf16 where the hardware multiplies it, else fp32."""
    gradient_checkpointing: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.divides("heads", "hidden_size")


@dataclass(frozen=True, kw_only=True)
class Lora(Section):
    rank: int = bounded(0, least=0)
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = bounded(32.0, above=0)
    targets: str = "auto"
    """Names of the adapted modules, as in `q_proj,v_proj`; auto is every linear layer that the family allows."""
    share_base: bool = False
    """PPO keeps one base model in memory; actor, critic and reward model are adapters on it, ref is none."""

    def __post_init__(self):
        super().__post_init__()
        if self.share_base and not self.rank:
            raise error("lora.share_base", "true with lora.rank 0", "adapters: the roles share what they do not train",
                        "--set lora.rank=16, or lora.share_base=false")


OWNED = {"train_batch_size": "STAGE.batch_size", "train_micro_batch_size_per_gpu": "STAGE.micro_batch_size",
         "gradient_accumulation_steps": "STAGE.batch_size and STAGE.micro_batch_size",
         "gradient_clipping": "STAGE.grad_clip", "optimizer": "STAGE.lr and STAGE.weight_decay",
         "scheduler": "STAGE.warmup and STAGE.min_lr", "zero_optimization.stage": "zero.stage",
         "bf16.enabled": "model.dtype", "fp16.enabled": "model.dtype", "amp.enabled": "model.dtype",
         "torch_autocast.enabled": "model.dtype", "checkpoint.load_universal": "the number of ranks"}
"""Keys of a DeepSpeed JSON that typed settings decide."""
OBJECTS = ("bf16", "fp16", "zero_optimization", "zero_optimization.offload_optimizer",
           "zero_optimization.offload_param")
"""Sections of it whose keys we read, outer ones first."""


@dataclass(frozen=True, kw_only=True)
class Zero(Section):
    stage: int = bounded(2, one_of=(0, 1, 2, 3))
    """ZeRO stage: 0 replicates, 1 shards optimiser states, 2 gradients as well, 3 parameters as well."""
    offload_optimizer: bool = False
    """Optimiser states and fp32 weights live in the CPU's memory (stage 1 and above)."""
    offload_parameters: bool = False
    """The shards of the parameters as well (stage 3)."""
    deepspeed: str = ""
    """Path of a DeepSpeed JSON (NVMe offload, ZeRO++, communication) whose keys go over ours; config.json keeps its
    text. A key that a setting of ours decides is refused by name."""

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if self.offloads(name) and self.stage < least:
                raise error(f"zero.{name}", f"offloading with zero.stage {self.stage}",
                            f"zero.stage of at least {least}: only what is sharded can be offloaded",
                            f"--set zero.stage={least}")

    def offloads(self, name: str) -> bool:
        """Whether a setting of that name, or the user's JSON in its place, moves something off the device."""
        theirs = self.user_tree().get("zero_optimization", {}).get(name.replace("parameters", "param"), {})
        return getattr(self, name) or theirs.get("device", "none") != "none"

    def user_tree(self) -> dict:
        """The user's own DeepSpeed settings; {} while they are still a path. "auto" and null are ours to fill. Raises
        ConfigError when the text, or a section that is read here, is no JSON object."""
        if not self.deepspeed.lstrip().startswith(("{", "[")):
            return {}
        try:
            tree = _without_auto(json.loads(self.deepspeed))
        except (json.JSONDecodeError, AttributeError) as problem:
            raise error("zero.deepspeed", f"text that is no JSON object ({problem})", "DeepSpeed's settings",
                        "the file") from None
        for path in OBJECTS:
            inside = functools.reduce(lambda part, name: part.get(name, {}), path.split("."), tree)
            if not isinstance(inside, dict):
                raise error("zero.deepspeed", f"{path} {json.dumps(inside)}", "a JSON object", "the file")
        return tree

    def check_user_json(self, dtype: str) -> None:
        """Raises ConfigError naming every key of the user's JSON that contradicts a typed setting."""
        ours = {"zero_optimization.stage": self.stage, "bf16.enabled": dtype == "bf16", "fp16.enabled": dtype == "fp16",
                "amp.enabled": False, "torch_autocast.enabled": False, "checkpoint.load_universal": False}
        conflicts, tree = [], self.user_tree()
        for key, setting in OWNED.items():
            section, _, name = key.rpartition(".")
            inside = tree.get(section) if section else tree
            if isinstance(inside, dict) and name in inside and inside[name] != ours.get(key, ...) and dtype != "auto":
                conflicts.append(f"{key} {json.dumps(inside[name])}, which {setting} decides")
        for key in ("offload_optimizer", "offload_parameters"):
            name = key.replace("parameters", "param")
            device = tree.get("zero_optimization", {}).get(name, {}).get("device")
            if getattr(self, key) and device == "none":
                conflicts.append(f'zero_optimization.{name}.device "none", which zero.{key} decides')
        if conflicts:
            raise error("zero.deepspeed", "; ".join(conflicts), 'no such keys, or "auto" as their value',
                        "the file, or those settings")


def _without_auto(tree: dict) -> dict:
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in tree.items()
            if value not in ("auto", None)}
