"""Causal language models: from random weights, a folder or a Hub name, always without dropout.

Shapes: B sequences, T prompt + response, A response tokens, V vocabulary.
"""

import inspect
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from dschat_kit.config import ConfigError, Model
from dschat_kit.runs import RunError

__all__ = ["DTYPES", "check_length", "load_causal_lm", "load_config", "model_inputs", "response_logits", "save_folder"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_config(source: str | Path):
    """The configuration of a model with every kind of dropout off: PPO's ratio is 1 only without."""
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.name: got {str(source)!r}, which cannot be loaded: {str(error).splitlines()[0]}\n"
                          "  expected: `scratch`, a model folder or the name of a model on a reachable Hub\n"
                          "  change:   --set model.name=PATH (`dschat fetch-model smollm2-135m` makes one)") from error
    for name, value in list(vars(config).items()):
        if ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_causal_lm(source: str | Path, settings: Model, tokenizer, seed: int) -> nn.Module:
    """A causal language model in `settings.dtype`; `source` is `scratch`, a folder or a Hub name.

    Raises ConfigError when there is no such model or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM
    if str(source) == "scratch":
        model = _from_scratch(settings, tokenizer, seed)
    else:
        config = load_config(source)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(source), config=config, dtype=DTYPES[settings.dtype], output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"model.name: {str(source)!r} is no causal language model: {str(error).splitlines()[0]}\n"
                              "  expected: a folder with the weights of a causal language model\n"
                              "  change:   --set model.name=PATH") from error
        if info["missing_keys"] or getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"model.name: {str(source)!r} is no causal language model: it has no weights for "
                              f"{', '.join(sorted(info['missing_keys'])[:3]) or 'a decoder alone'}\n  change: --set model.name=PATH")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ConfigError(f"model.name: {str(source)!r} has {model.get_input_embeddings().num_embeddings} embeddings\n"
                          f"  expected: at least the tokenizer's {len(tokenizer)}\n  change:   the tokenizer or the model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = _pad(tokenizer)
    model.config.use_cache = True
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _pad(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _from_scratch(settings: Model, tokenizer, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(
        settings.architecture, vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        head_dim=settings.hidden_size // settings.heads, intermediate_size=settings.intermediate_size,
        initializer_range=settings.initializer_range, tie_word_embeddings=True, max_position_embeddings=1024,
        pad_token_id=_pad(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype])


def check_length(config, tokens: int) -> None:
    """Raises ConfigError when `tokens` positions do not fit into the model."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ConfigError(f"data.max_prompt_tokens and the response make {tokens} tokens\n  expected: at most {limit}, the "
                          "model's positions\n  change:   --set data.max_prompt_tokens=... sampling.max_new_tokens=...")


def model_inputs(model: nn.Module, sequences: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass. Positions count real tokens only, so left padding changes nothing."""
    inputs = {"input_ids": sequences, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(getattr(model, "module", model).forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def response_logits(model: nn.Module, sequences: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """(B, A, V) logits that predict the last `response_length` tokens; no other position is projected to V."""
    inputs = model_inputs(model, sequences, attention_mask)
    return model(**inputs, use_cache=False, logits_to_keep=response_length + 1).logits[:, :-1]


def save_folder(model: nn.Module, tokenizer, folder: Path, state_dict: dict | None = None) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer) under a temporary name, then rename it into place."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=state_dict)
        tokenizer.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {folder}: {error.strerror or error}\n  change: free space or --run-root") from error
