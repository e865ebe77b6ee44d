"""Models from random weights and folders; what is no causal language model is said in one sentence."""

import pytest
import torch
from references import response_logits
from tiny_models import SETTINGS, SHAPES, VOCABULARY, causal_lm, folder, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from dschat_kit.config import ConfigError, Lora, Model
from dschat_kit.data.sources import DataError
from dschat_kit.data.tokenizer import require_same_tokenizer, train_tokenizer
from dschat_kit.engine.zero import whole_layers
from dschat_kit.models import saving
from dschat_kit.models.loading import (
    accepts,
    check_length,
    load_causal_lm,
    load_config,
    model_inputs,
)
from dschat_kit.models.lora import add_adapters, merge_adapters
from dschat_kit.models.saving import save_folder
from dschat_kit.models.scalar_model import load_scalar_model


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_from_scratch_is_a_function_of_the_seed(architecture):
    settings = Model(hidden_size=32, layers=1, heads=2, intermediate_size=64, dtype="fp32", architecture=architecture)
    random_state = torch.get_rng_state()
    one, same, other = (load_causal_lm("scratch", settings, tokenizer(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random_state)
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.config.eos_token_id != one.config.pad_token_id


def test_dropout_is_off_whatever_the_folder_says(tmp_path):
    model = causal_lm("gpt2")
    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.3
    save_folder(model, tokenizer(), tmp_path / "model")
    loaded = load_causal_lm(tmp_path / "model", SETTINGS, tokenizer(), 0).train()
    ids = torch.arange(2, 12)[None]
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert {value for name, value in vars(load_config(tmp_path / "model")).items() if "drop" in name} <= {0.0, None}


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_response_logits_are_the_last_ones_of_a_whole_forward_pass(architecture):
    model, ids = causal_lm(architecture), torch.arange(2, 18).view(2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.allclose(response_logits(model, ids, mask, 3), model(input_ids=ids).logits[:, 4:7], atol=1e-5)


def test_positions_count_real_tokens_only():
    model = causal_lm("gpt2")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert accepts(model, "position_ids") and not accepts(model, "nonsense")
    assert model_inputs(model, mask.long(), mask)["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_saved_folder_loads_in_plain_transformers_with_the_same_logits(tmp_path):
    folder(tmp_path / "source")
    model = load_causal_lm(tmp_path / "source", SETTINGS, tokenizer(), 0).eval()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("replaced")
    save_folder(model, tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model" / "old").exists() and not list(tmp_path.glob(".*"))
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", SHAPES)
def test_a_model_written_in_parts_is_the_same(family, tmp_path, monkeypatch):
    """Files of at most 60 KB, layer by layer, with an index; what is tied, and experts, come back as they were."""
    monkeypatch.setattr(saving, "SHARD_BYTES", 60_000)
    model, ids = causal_lm(family), torch.arange(2, 12)[None]
    whole, layers = model.num_parameters(), list(whole_layers(model, keep=True))
    assert max(sum({id(t): t.numel() for t in layer.values()}.values()) for layer in layers) < 0.6 * whole
    save_folder(model, tokenizer(), tmp_path / "model", layers)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    plain, said = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(said.values()), said
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def _bert(path, auto_class):
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, intermediate_size=16)
    auto_class.from_config(config).save_pretrained(path)


def _damaged(path):
    folder(path)
    (path / "model.safetensors").write_bytes(b"no weights")


def _without_weights(path):
    folder(path)
    (path / "model.safetensors").unlink()


def _backbone(path):
    causal_lm().model.save_pretrained(path)


def _reward_model(path):
    folder(path)
    load_scalar_model(path, SETTINGS, 0, new_head=True).classifier.save_pretrained(path)


@pytest.mark.parametrize("make", [
    lambda path: _bert(path, AutoModelForMaskedLM), lambda path: _bert(path, AutoModelForSequenceClassification),
    _damaged, _without_weights, _backbone, _reward_model, lambda path: path.mkdir(), lambda path: None,
    lambda path: AutoConfig.for_model("t5").save_pretrained(path)])
def test_what_is_no_causal_language_model_is_a_config_error(make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ConfigError, match="expected") as caught:
        load_causal_lm(tmp_path / "model", SETTINGS, tokenizer(), 0)
    assert "change:" in str(caught.value) and len(str(caught.value).splitlines()) <= 4


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    larger = tokenizer()
    larger.add_tokens([f"<word {i}>" for i in range(20)])
    with pytest.raises(ConfigError, match="300 embeddings"):
        load_causal_lm(folder(tmp_path), SETTINGS, larger, 0)


def test_too_many_positions_are_refused():
    check_length(causal_lm().config, 128)
    with pytest.raises(ConfigError, match="129 tokens"):
        check_length(causal_lm().config, 129)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_adapters_change_nothing_at_first_and_merge_exactly(architecture, tmp_path):
    ids, mask = torch.arange(2, 18).view(2, 8), torch.ones(2, 8, dtype=torch.bool)
    plain, model = causal_lm(architecture), add_adapters(causal_lm(architecture), Lora(rank=4, alpha=16), seed=0)
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert heads == [] and accepts(model, "input_ids")
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        changed = response_logits(model, ids, mask, 7)
        assert not torch.allclose(plain(input_ids=ids).logits[:, :-1], changed, atol=0.1)
        save_folder(model, tokenizer(), tmp_path / "model", [merge_adapters(model, model.state_dict())])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        found = merged(input_ids=ids).logits[:, :-1]
    assert float((found - changed).abs().max() / changed.abs().max()) < 1e-5
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_of_experts_get_no_adapter(family):
    model = add_adapters(causal_lm(family), Lora(rank=2), seed=0)
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj"}


def test_targets_are_those_that_were_named_and_a_wrong_one_is_refused():
    model = add_adapters(causal_lm("opt"), Lora(rank=2, targets="q_proj, fc1"), seed=0)
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == {"q_proj", "fc1"}
    with pytest.raises(ConfigError, match="c_attn, which match no module") as caught:
        add_adapters(causal_lm("opt"), Lora(rank=2, targets="q_proj,c_attn"), seed=0)
    assert "fc1, fc2, k_proj" in str(caught.value)


def test_a_reward_model_with_another_tokenizer_is_refused_with_the_reason(tmp_path):
    require_same_tokenizer(tokenizer(), folder(tmp_path / "same"))
    other = train_tokenizer(["quite another language without any animal"] * 20, VOCABULARY)
    causal_lm().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="tokens differ") as caught:
        require_same_tokenizer(tokenizer(), tmp_path / "other")
    assert "reads the actor's tokens" in str(caught.value) and "change:" in str(caught.value)


def test_a_scalar_head_is_trained_beside_the_adapters(tmp_path):
    model = load_scalar_model(folder(tmp_path), SETTINGS, 0, new_head=True)
    assert add_adapters(model, Lora(rank=0), 0) is model and all(p.requires_grad for p in model.parameters())
    add_adapters(model, Lora(rank=4), seed=0)
    trained = {name.split(".")[-3] if "lora" in name else name for name, p in model.named_parameters()
               if p.requires_grad}
    assert trained == {"classifier.score.weight", "lora_A", "lora_B"}
