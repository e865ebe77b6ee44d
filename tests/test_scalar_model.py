"""The scalar head: where it is read, what it depends on, and that plain transformers reads the export alike."""

import pytest
import torch
from tiny_models import SETTINGS, VOCABULARY, causal_lm, folder, tokenizer
from transformers import AutoModelForSequenceClassification

from dschat_kit.config import ConfigError
from dschat_kit.models.saving import save_folder
from dschat_kit.models.scalar_model import last_token, load_scalar_model, response_values


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def model(request, tmp_path_factory):
    path = folder(tmp_path_factory.mktemp(request.param), request.param)
    return load_scalar_model(path, SETTINGS, 0, new_head=True).eval()


def padded(rows, left, right):
    """(sequences, mask) of token lists with padding on both sides."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), left + width + right), 0), torch.zeros(len(rows), left + width + right).bool()
    for i, row in enumerate(rows):
        ids[i, left:left + len(row)], mask[i, left:left + len(row)] = torch.tensor(row), True
    return ids, mask


def score(model, rows, left=0, right=0):
    ids, mask = padded(rows, left, right)
    with torch.no_grad():
        return last_token(model(ids, mask), mask)


def test_last_token_is_the_last_real_one_wherever_padding_stands():
    values = torch.arange(8.0).view(2, 4)
    assert last_token(values, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()).tolist() == [2.0, 7.0]


def test_a_score_depends_neither_on_batch_mates_nor_on_padding(model):
    rows = [torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 9, 6)]
    alone = torch.cat([score(model, [row]) for row in rows])
    assert alone.unique().numel() == 3
    for left, right in ((0, 0), (5, 0), (0, 7), (3, 2)):
        assert torch.allclose(score(model, rows, left, right), alone, atol=1e-5)


def test_new_head_has_no_bias_and_the_published_spread(tmp_path):
    wide = [load_scalar_model(folder(tmp_path), SETTINGS, seed, new_head=True).classifier.score for seed in range(40)]
    weights = torch.stack([head.weight.detach() for head in wide])
    assert wide[0].bias is None and abs(float(weights.std()) - 33**-0.5) < 0.01 and abs(float(weights.mean())) < 0.02


def test_values_stand_before_their_token(model):
    ids, mask = padded([list(range(2, 12))], 0, 0)
    with torch.no_grad():
        everything, values = model(ids, mask), response_values(model, ids, mask, 3)
        changed = response_values(model, ids.clone().index_fill_(1, torch.tensor([9]), 44), mask, 3)
    assert torch.equal(values, everything[:, 6:9])
    assert torch.equal(values, changed)  # V(s_t) must not see token t


def test_normalised_scores_have_mean_0_and_export_keeps_it(model, tmp_path):
    rows = [[2 + i, 9, 30 + i] for i in range(20)]
    raw = score(model, rows)
    before = (model.shift, model.scale)
    model.normalise(float(raw.mean()), float(1 / raw.std()))
    model.normalise(0.5, 2.0)  # on top of the first
    shifted = score(model, rows)
    assert torch.allclose(shifted, ((raw - raw.mean()) / raw.std() - 0.5) * 2, atol=1e-5)
    save_folder(model.classifier, tokenizer(), tmp_path / "model")
    assert torch.equal(score(load_scalar_model(tmp_path / "model", SETTINGS, 0, new_head=False).eval(), rows), shifted)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    ids, mask = padded(rows, 0, 3)
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert torch.allclose((logits - plain.config.score_shift) * plain.config.score_scale, shifted, atol=1e-5)
    model.normalise(-model.shift * model.scale, 1 / model.scale)
    assert (round(model.shift, 6), round(model.scale, 6)) == before


def test_a_new_head_on_a_reward_model_forgets_the_old_shift_and_scale(tmp_path):
    """Its margins would be that many times the log-odds, and be reported as badly calibrated."""
    old = load_scalar_model(folder(tmp_path / "first"), SETTINGS, 0, new_head=True)
    old.normalise(3.0, 2.0)
    save_folder(old.classifier, tokenizer(), tmp_path / "model")
    new = load_scalar_model(tmp_path / "model", SETTINGS, 1, new_head=True)
    assert (new.shift, new.scale) == (0.0, 1.0)


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="score.weight"):
        load_scalar_model(folder(tmp_path), SETTINGS, 0, new_head=False)


def test_pad_that_is_eos_never_stands_in_the_export(tmp_path):
    model = causal_lm()
    model.config.pad_token_id = model.config.eos_token_id
    save_folder(model, tokenizer(), tmp_path / "model")
    assert load_scalar_model(tmp_path / "model", SETTINGS, 0, new_head=True).classifier.config.pad_token_id is None
