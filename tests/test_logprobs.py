"""Log-probabilities of responses: the same as the plain formula, its gradient included, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import entropy_of, response_logits, token_logprobs
from test_decode import SAMPLING, request, run
from tiny_models import SHAPES, causal_lm

from dschat_kit.models.loading import left_aligned, model_inputs, response_columns
from dschat_kit.rlhf import logprobs
from dschat_kit.rlhf.logprobs import CHUNK, chunked_logprobs, response_logprobs, sequence_logprobs


@given(st.integers(0, 2**30), st.integers(1, 3 * CHUNK), st.floats(0.3, 2.0))
@settings(deadline=None, max_examples=15)
def test_chunks_give_the_plain_value_and_gradient(seed, rows, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, 11, generator=generator)).requires_grad_()
    tokens, weight = torch.randint(11, (rows,), generator=generator), torch.randn(rows, generator=generator)
    expected = token_logprobs(logits, tokens, temperature)
    wanted, = torch.autograd.grad((expected * weight).sum(), logits)
    found, entropy = chunked_logprobs(logits, tokens, temperature)
    gradient, = torch.autograd.grad((found * weight).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-4)  # scaled logits up to 50 round by 4e-6, weights reach 15
    assert torch.allclose(entropy, entropy_of(logits, temperature), atol=1e-4) and not entropy.requires_grad


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_moving_rows_to_the_left_changes_nothing(architecture):
    model = causal_lm(architecture)
    batch = run(model, request(lengths=(3, 9, 1, 6)), SAMPLING)
    A, mask = batch.response_mask.shape[1], batch.response_mask
    model.zero_grad()
    found, entropy = response_logprobs(model, batch.input_ids, batch.attention_mask, A, 0.7)
    found.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits = response_logits(model, batch.input_ids, batch.attention_mask, A)
    expected = token_logprobs(logits, batch.input_ids[:, -A:], 0.7) * mask
    expected.sum().backward()
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(found != 0, mask)
    assert torch.allclose(entropy, entropy_of(logits, 0.7) * mask, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("architecture", ["opt", "bloom", "llama"])
def test_the_logprob_of_a_response_is_the_sum_of_its_tokens_and_nothing_else(architecture, right, monkeypatch):
    """With its gradient, wherever padding stands and without a mask; only what is predicted is projected to V, which no
    more than a chunk of is ever in fp32."""
    model, asked = causal_lm(architecture), request(lengths=(9, 4, 7))
    ids, real = asked.prompt_ids, asked.prompt_attention_mask.clone()
    real[:, :5], real[1] = False, False  # the second row has no response at all
    inputs = model_inputs(model, ids, asked.prompt_attention_mask)
    logits = model(**inputs, use_cache=False).logits
    by_hand = [sum((logits[i, t - 1].log_softmax(-1)[ids[i, t]] for t in range(5, 9) if real[i, t]), torch.zeros(()))
               for i in range(3)]
    seen, masks = [], []
    chunks = logprobs.chunked_logprobs
    monkeypatch.setattr(logprobs, "chunked_logprobs", lambda logits, *more: seen.append(len(logits)) or
                        chunks(logits, *more))
    rows = ids, asked.prompt_attention_mask, real
    if right:
        padding = (~asked.prompt_attention_mask).sum(1).tolist()
        rows = [torch.stack([row.roll(-by) for row, by in zip(part, padding, strict=True)]) for part in rows]
    model.register_forward_pre_hook(lambda _model, _args, inputs: masks.append("attention_mask" in inputs),
                                    with_kwargs=True)
    found = sequence_logprobs(model, *rows)
    assert torch.allclose(found, torch.stack(by_hand), atol=1e-4) and seen == [int(real.sum())] and found[1] == 0
    assert masks == [False]
    weight, weights = torch.tensor([1.0, 2.0, -3.0]), [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((found * weight).sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad((torch.stack(by_hand) * weight).sum(), weights, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)


def test_columns_point_at_the_token_before_each_response_token():
    batch = run(causal_lm(), request(lengths=(3, 6, 1)), SAMPLING)
    A = batch.response_mask.shape[1]
    ids, columns = left_aligned(batch.input_ids, batch.attention_mask), response_columns(batch.attention_mask, A)
    before = batch.input_ids[:, -A - 1:-1]
    assert torch.equal(ids.gather(1, columns)[batch.response_mask], before[batch.response_mask])
    assert ids.shape[1] == batch.attention_mask.sum(1).max()
