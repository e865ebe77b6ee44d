"""Causal language models: from random weights, a folder or a Hub name, always without dropout.

Shapes: B sequences, T prompt + response, A response tokens, V vocabulary.
"""

import inspect
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dschat_kit.config import ConfigError, Model
from dschat_kit.data.tokenizer import pad_id_of
from dschat_kit.models.attention import take_products

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAUSAL = ("ForCausalLM", "LMHeadModel")


def load_config(source: str | Path):
    """The configuration of a model with every kind of dropout off: PPO's ratio is 1 only without."""
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(source, f"cannot be loaded: {_first_line(error)}", "`scratch`, a model folder or the name of a "
                        "model on a reachable Hub (`dschat fetch-model smollm2-135m` makes a folder)") from error
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_pretrained(auto_class, source: str | Path, config, settings: Model,
                    expected: str) -> tuple[nn.Module, list[str]]:
    """(model in `settings.dtype`, names of the weights that the folder does not hold).

    Raises ConfigError with `expected` when the folder does not fit the class or its weights are damaged.
    """
    try:
        with quiet_loading():
            model, info = auto_class.from_pretrained(str(source), config=config, dtype=DTYPES[settings.dtype],
                                                     output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(source, f"cannot be used: {_first_line(error)}", expected) from error
    return _prepared(model, settings), sorted(info["missing_keys"])


def _unusable(source: str | Path, problem: str, expected: str) -> ConfigError:
    """The error for a model that has a problem."""
    return ConfigError(f"model.name: {str(source)!r} {problem}\n  expected: {expected}\n"
                       "  change:   --set model.name=PATH")


def _prepared(model: nn.Module, settings: Model) -> nn.Module:
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return take_products(model)


def load_causal_lm(source: str | Path, settings: Model, tokenizer, seed: int) -> nn.Module:
    """A causal language model in `settings.dtype`; `source` is `scratch`, a folder or a Hub name.

    Raises ConfigError when there is no such model or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM
    if str(source) == "scratch":
        model = _from_scratch(settings, tokenizer, seed)
    else:
        config, expected = load_config(source), "the folder or Hub name of a causal language model"
        kinds = [name for name in getattr(config, "architectures", None) or [] if "For" in name]
        if kinds and not any(name.endswith(CAUSAL) for name in kinds):
            raise _unusable(source, f"is no causal language model but {', '.join(kinds)}", expected)
        model, missing = load_pretrained(AutoModelForCausalLM, source, config, settings, expected)
        if missing:
            raise _unusable(source, f"is no causal language model: it has no weights for {', '.join(missing[:3])}",
                            expected)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise _unusable(source, f"has {embeddings} embeddings", f"at least the tokenizer's {len(tokenizer)}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = pad_id_of(tokenizer)
    return model


def _from_scratch(settings: Model, tokenizer, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(
        settings.architecture, vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        head_dim=settings.hidden_size // settings.heads, intermediate_size=settings.intermediate_size,
        initializer_range=settings.initializer_range, tie_word_embeddings=True, max_position_embeddings=1024,
        pad_token_id=pad_id_of(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _prepared(AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype]), settings)


def check_length(config, tokens: int) -> None:
    """Raises ConfigError when `tokens` positions do not fit into the model."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ConfigError(f"data.max_prompt_tokens and the response make {tokens} tokens\n  expected: at most {limit}, "
                          "the model's positions\n  change:   --set data.max_prompt_tokens=... "
                          "data.max_response_tokens=... sampling.max_new_tokens=...")


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of a model, or of the model in an engine, takes an argument of that name."""
    return name in _forward_parameters(type(getattr(model, "module", model)))


@cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@torch.no_grad()
def can_pack(model: nn.Module) -> bool:
    """Whether the model keeps rows that are packed into one sequence apart: tried, not looked up. Other tokens in the
    first row must not change one bit of the second row's logits."""
    if not accepts(model, "position_ids"):
        return False
    device = next(model.parameters()).device
    rows, positions = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 4, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    logits = model(input_ids=rows.to(device), position_ids=positions.to(device), use_cache=False).logits[:, 3:]
    return bool(torch.equal(logits[0], logits[1]))


def model_inputs(model: nn.Module, sequences: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass. Positions count real tokens only, so left padding changes nothing; without
    a mask, sequences begin in the first column."""
    if attention_mask is None:
        return {"input_ids": sequences}
    inputs = {"input_ids": sequences, "attention_mask": attention_mask}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def left_aligned(sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, longest) the real tokens of each row from the first column on; what stands behind them means nothing.

    A causal model needs no mask for such rows: no real token looks at what comes after it.
    """
    longest = int(attention_mask.sum(1).max())
    columns = attention_mask.int().argmax(1, keepdim=True) + torch.arange(longest, device=sequences.device)
    return sequences.gather(1, columns.clamp(max=sequences.shape[1] - 1))


def response_columns(attention_mask: Tensor, response_length: int) -> Tensor:
    """(B, A) columns of `left_aligned` rows where each of the last `response_length` tokens is predicted; those of
    padding lie anywhere inside."""
    places = torch.arange(response_length, device=attention_mask.device) - 1
    columns = attention_mask[:, :-response_length].sum(1, keepdim=True) + places
    return columns.clamp(max=int(attention_mask.sum(1).max()) - 1)


@contextmanager
def quiet_loading():
    """Without transformers' progress bars and its lists of weights that are new: who loads says what is wrong."""
    from transformers.utils import logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
