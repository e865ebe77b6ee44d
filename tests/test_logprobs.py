"""Log-probabilities of responses: the same as the plain formula, its gradient included, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import entropy_of, response_logits
from test_decode import SAMPLING, request, run
from tiny_models import SHAPES, causal_lm

from dschat_kit.models.loading import left_aligned, response_columns
from dschat_kit.rlhf.logprobs import CHUNK, chunked_logprobs, response_logprobs
from dschat_kit.rlhf.losses import token_logprobs


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
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(gradient, wanted, atol=1e-5)
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


def test_columns_point_at_the_token_before_each_response_token():
    batch = run(causal_lm(), request(lengths=(3, 6, 1)), SAMPLING)
    A = batch.response_mask.shape[1]
    ids, columns = left_aligned(batch.input_ids, batch.attention_mask), response_columns(batch.attention_mask, A)
    before = batch.input_ids[:, -A - 1:-1]
    assert torch.equal(ids.gather(1, columns)[batch.response_mask], before[batch.response_mask])
    assert ids.shape[1] == batch.attention_mask.sum(1).max()
