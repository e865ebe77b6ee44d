"""Small random models of real architectures and a byte tokenizer, for tests that need no launch."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dschat_kit.config import Model
from dschat_kit.data.tokenizer import train_tokenizer

VOCABULARY = 300
SETTINGS = Model(hidden_size=32, layers=2, heads=4, intermediate_size=64, vocab_size=VOCABULARY, dtype="fp32")
LLAMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             intermediate_size=64, max_position_embeddings=128)
SHAPES = {
    "llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma": LLAMA, "mistral": LLAMA | dict(sliding_window=7),
    "opt": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=128,
                word_embed_proj_dim=32),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "gpt_neox": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                     max_position_embeddings=128),
}
GATED = dict(SHAPES["llama"], head_dim=8)
SHAPES |= dict.fromkeys(("qwen2", "qwen3", "mistral", "gemma"), GATED) | {
    "gemma2": GATED, "gemma3_text": GATED | dict(layer_types=["sliding_attention", "full_attention"]),
    "qwen3_moe": GATED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": GATED | dict(num_local_experts=4)}
FAMILIES = ("opt", "bloom", "gpt_neox", "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma")


def tokenizer():
    """A byte-level tokenizer of the kit with pad 0 and EOS 1."""
    return train_tokenizer(["the cow says moo and eats grass"] * 20, VOCABULARY)


def causal_lm(architecture: str = "llama", seed: int = 0):
    """A random causal language model without dropout, its weights large enough to give peaked distributions."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1,
                                  bos_token_id=None, **SHAPES[architecture])
    for name in ("dropout", "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def folder(path: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A model folder with its tokenizer."""
    causal_lm(architecture, seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
