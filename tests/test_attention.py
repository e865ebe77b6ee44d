"""Attention as products: what transformers' own computes, with its gradients; elsewhere left alone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from dschat_kit.machine import Machine
from dschat_kit.models import attention
from dschat_kit.models.attention import PRODUCTS, causal_attention, take_products


@pytest.fixture
def anywhere(monkeypatch):
    """Products on every machine, and in fp32 too, where they can be compared closely."""
    monkeypatch.setattr(attention, "faster_as_products", lambda like: True)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("limits", [{}, {"KEPT": 0, "BLOCK": 5}, {"KEPT": 0, "BLOCK": 17}, {"KEPT": 0, "BLOCK": 64},
                                    {"KEPT": 0, "BLOCK": 6, "AT_ONCE": 1}, {"AT_ONCE": 2 * 4 * 17 * 17}], ids=str)
def test_products_are_the_attention_of_torch_with_its_gradients(anywhere, monkeypatch, heads, shared, limits):
    """All at once, in blocks of queries, and some rows after others."""
    for name, value in limits.items():
        monkeypatch.setattr(attention, name, value)
    torch.manual_seed(0)
    parts = [torch.randn(3, count, 17, 8, requires_grad=True) for count in (heads, shared, shared)]
    direction = torch.randn(3, heads, 17, 8)
    ours = causal_attention(*parts, 0.3)
    theirs = F.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(ours, parts, direction), torch.autograd.grad(theirs, parts, direction),
                          strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [127, 300])
def test_in_bf16_products_err_about_as_torchs_kernel_does(anywhere, T):
    """Relative errors of the output and of the three gradients to fp64: 3e-3 to 5e-3, the kernel's 2e-3 to 5e-3."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, T, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    direction = torch.randn(2, 4, T, 64, dtype=torch.bfloat16)
    ours = causal_attention(*parts, 0.125)
    true = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.125)
    found = [ours, *torch.autograd.grad(ours, parts, direction)]
    wanted = [true, *torch.autograd.grad(true, exact, direction.double())]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() / other.norm() < 6e-3


def small_model(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=64, ffn_dim=64, word_embed_proj_dim=32, num_key_value_heads=2,
                                  max_position_embeddings=64, dropout=0.0, sliding_window=4)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("limits", [{}, {"KEPT": 0, "BLOCK": 5}], ids=["whole", "blocks"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "mistral"])
def test_a_model_says_the_same_with_and_without_mask_and_cache(anywhere, monkeypatch, family, limits):
    """Mistral looks back 4 tokens only, so it has a mask and must be left to transformers."""
    for name, value in limits.items():
        monkeypatch.setattr(attention, name, value)
    model, ids = small_model(family, torch.float32), torch.randint(64, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    how = {"no mask": dict(use_cache=False), "padded": dict(attention_mask=mask, use_cache=False)}
    expected = {name: model(input_ids=ids, **inputs).logits for name, inputs in how.items()}
    generated = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert take_products(model).config._attn_implementation == PRODUCTS
    for name, inputs in how.items():
        seen = slice(None) if name == "no mask" else mask.bool()
        torch.testing.assert_close(model(input_ids=ids, **inputs).logits[seen], expected[name][seen], atol=1e-5,
                                   rtol=1e-4)
    again = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(again, generated)


def test_a_model_has_the_same_gradients_with_checkpointed_activations_and_without(anywhere, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 0)
    monkeypatch.setattr(attention, "BLOCK", 5)
    ids, found = torch.randint(64, (3, 12)), []
    for products, checkpointing in ((False, False), (True, False), (True, True)):
        model = small_model("llama", torch.float32).train()
        if products:
            take_products(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours in found[1:]:
        for one, other in zip(ours, found[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def kept_by_training(B: int, T: int) -> int:
    """Entries that the backward pass of attention with 4 heads of size 8 finds saved, beside query, key and value."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
        causal_attention(*torch.randn(3, B, 4, T, 8, requires_grad=True).unbind(), 0.3)
    return sum(sizes) - 3 * B * 4 * T * 8


def test_long_rows_keep_no_probabilities(anywhere, monkeypatch):
    """Only where T x T is little, however many rows there are."""
    monkeypatch.setattr(attention, "KEPT", 4 * 10 * 10)
    for B in (1, 9):
        for block in (11, 12):
            monkeypatch.setattr(attention, "BLOCK", block)
            assert (kept_by_training(B, 10), kept_by_training(B, 11)) == (B * 4 * 10 * 10, 0)


def test_rows_longer_than_measured_have_torchs_kernel(anywhere, monkeypatch):
    called, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or kernel(*a, **k))
    monkeypatch.setattr(attention, "LONGEST", 10)
    for T, expected in ((10, 0), (11, 1)):
        causal_attention(*torch.randn(3, 2, 4, T, 8), 0.3)
        assert len(called) == expected


def test_elsewhere_transformers_choice_stays(monkeypatch):
    assert take_products(small_model("llama", torch.float32)).config._attn_implementation == "sdpa"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert take_products(small_model("llama", torch.bfloat16)).config._attn_implementation == "sdpa"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert take_products(small_model("llama", torch.bfloat16)).config._attn_implementation == PRODUCTS
    unknown = small_model("llama", torch.bfloat16)
    unknown.config.model_type = "inkling_text"  # what it passes beside a mask would be lost
    assert take_products(unknown).config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "detect", lambda: Machine(accelerator="cuda", devices=1, cores=1, bf16=True,
                                                             torch_build=""))
    assert take_products(small_model("llama", torch.bfloat16)).config._attn_implementation == "sdpa"
    monkeypatch.undo()
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1,
                                                                  n_head=4), dtype=torch.bfloat16)
    assert take_products(bloom).config._attn_implementation == "eager"
