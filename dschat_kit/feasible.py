"""What a machine or a model cannot do, found without torch before a rank starts."""

import importlib.util
import json
import re
from pathlib import Path

from dschat_kit.config import ConfigError, Model, Pipeline
from dschat_kit.machine import Machine
from dschat_kit.sections import error

SCRATCH = tuple(f"model.layers.0.{name}.weight" for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj"))

NOT_ADAPTED = re.compile(r"(norm\w*|ln_\w+|\w*embed\w*|wte|wpe|lm_head|score)\.weight$")
"""Weights that are no linear layers, or heads: norms, embeddings, and what may be tied to them."""


SPLIT_FAMILIES = ("opt", "llama", "qwen2", "qwen3", "mistral", "gemma")
"""Model types whose queries, keys and values are matrices of their own, split by heads as they stand."""
SPLIT_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim")


def refuse(pipeline: Pipeline, machine: Machine) -> None:
    """Raises ConfigError, with the reason, for a dtype, an adapter's target, a split or an extra that is not there."""
    dtype, hint = pipeline.model.dtype, {"fp16": "--set model.dtype=fp32", "bf16": "--set model.dtype=fp16"}
    reason = {"fp16": machine.accelerator == "cpu" and "DeepSpeed scales fp16 losses on GPUs only",
              "bf16": machine.accelerator == "cuda" and not machine.bf16 and "a GPU here is older than Ampere and "
              "has no bf16"}.get(dtype)
    if reason:
        raise error("model.dtype", f"{dtype}, but {reason}", "a dtype that this machine multiplies", hint[dtype])
    if pipeline.telemetry.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise error("telemetry.tensorboard", "true, but tensorboard is not installed", "the package tensorboard",
                    "bash env/setup.sh tensorboard (the extra of that name), or --set telemetry.csv=true")
    if pipeline.rollout.cuda_graphs and machine.accelerator != "cuda":
        raise error("rollout.cuda_graphs", f"true on a {machine.accelerator}", "a CUDA device",
                    "--set rollout.cuda_graphs=false")
    if pipeline.rollout.inference_tp_size > 1 and (config := model_config(pipeline.model)):
        check_split(pipeline.rollout.inference_tp_size, config)
    for target in [] if pipeline.lora.targets == "auto" else pipeline.lora.targets.split(","):
        for name in filter(None, (pipeline.model.name, pipeline.reward.model)) if pipeline.lora.rank else ():
            known = [weight for weight in weight_names(name) if not NOT_ADAPTED.search(weight)]
            if known and not any(f".{weight}".endswith(f".{target.strip()}.weight") for weight in known):
                modules = sorted({weight.split(".")[-2] for weight in known if weight.endswith(".weight")})
                raise error("lora.targets", f"{target!r}, which matches no module of {name} that takes adapters",
                            f"some of {', '.join(modules)}", "--set lora.targets=auto")


def check_split(size: int, config: dict) -> None:
    """Raises ConfigError for a model whose layers `size` ranks cannot share in generation."""
    text = config.get("text_config") or config
    kind, widths = config.get("model_type"), {name: text[name] for name in SPLIT_WIDTHS if text.get(name)}
    for got, good, expected in (
            (f"a {kind}", kind in SPLIT_FAMILIES, f"one of {', '.join(SPLIT_FAMILIES)}"),
            (", ".join(f"{name} {width}" for name, width in widths.items()),
             not any(width % size for width in widths.values()), f"multiples of {size}")):
        if not good:
            raise error("rollout.inference_tp_size", f"{size} for {got}", expected, "--set rollout.inference_tp_size=1")


def model_config(model: Model) -> dict:
    """config.json of the model; {} where it is neither here nor on a Hub that answers: loading will say so."""
    if model.name == "scratch":
        return {"model_type": model.architecture, "num_attention_heads": model.heads,
                "intermediate_size": model.intermediate_size}
    if (folder := _folder(model.name)) and (path := folder / "config.json").exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise ConfigError(f"model.name: {path} is damaged: {problem}\n  expected: a model's configuration\n"
                              "  change:   fetch the model again") from None
    return _from_hub(lambda hub: json.loads(Path(hub.hf_hub_download(model.name, "config.json")).read_text())) or {}


def weight_names(model: str) -> list[str]:
    """Names of the weights, read from safetensors headers in a folder, the Hub's cache or the Hub; [] where none of
    them has any: loading will say so."""
    if model == "scratch":
        return list(SCRATCH)
    names, folder = [], _folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files and not Path(model).exists():
        return _from_hub(lambda hub: sorted(hub.get_safetensors_metadata(model).weight_map)) or []
    for path in files:
        with open(path, "rb") as file:
            try:
                names += json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except (json.JSONDecodeError, UnicodeDecodeError, OverflowError, MemoryError) as problem:
                raise ConfigError(f"model.name: {path} is damaged: {problem}\n  expected: a safetensors file\n"
                                  "  change:   fetch the model again") from None
    return [name for name in names if name != "__metadata__"]


def _folder(model: str) -> Path | None:
    """Where the model lies: a folder, or a Hub name's place in the cache."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # neither a folder nor a name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _from_hub(ask):
    """ask(huggingface_hub), None where the Hub does not answer or has no such thing."""
    if not hub_answers():
        return None
    import huggingface_hub
    from huggingface_hub import errors
    try:
        return ask(huggingface_hub)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.NotASafetensorsRepoError,
            errors.SafetensorsParsingError, errors.LocalEntryNotFoundError):
        return None


def hub_answers() -> bool:
    """Whether a Hub is asked at all, and answers within seconds; its own library would try again and again."""
    from huggingface_hub import constants, get_session
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
        return True
    except Exception:  # noqa: BLE001 the kind is that of the version's HTTP library; whichever, there is no answer
        return False
