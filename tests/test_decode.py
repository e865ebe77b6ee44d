"""Generation: the distribution, the seeds, the padding, the end of a response."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, causal_lm

from dschat_kit.engine.decode import decode, row_uniforms, sample_tokens
from dschat_kit.engine.hybrid import HybridEngine
from dschat_kit.engine.rollout_types import KitRequest, KitSampling
from dschat_kit.models.loading import response_logits
from dschat_kit.rlhf.losses import token_logprobs
from dschat_kit.runs import RunError

SAMPLING = KitSampling(max_new_tokens=12, temperature=1.0, stop_token_ids=(1,), pad_token_id=0)


def request(lengths=(3, 6, 4, 6), seeds=None, pad=0, seed=0):
    """Random prompts, padded on the left by at least `pad` columns; row i depends on i alone."""
    width = max(lengths) + pad
    ids, mask = torch.full((len(lengths), width), 0), torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + i)
        ids[i, width - length:] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[i, width - length:] = True
    return KitRequest(prompt_ids=ids, prompt_attention_mask=mask,
                      row_seeds=torch.tensor(range(len(lengths)) if seeds is None else seeds))


def run(model, asked, sampling=SAMPLING):
    return decode(model, asked, sampling, lambda unfinished: unfinished)


def responses(batch):
    tokens = batch.input_ids[:, -batch.response_mask.shape[1]:]
    return [row[mask].tolist() for row, mask in zip(tokens, batch.response_mask, strict=True)]


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request):
    return causal_lm(request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_the_sampler_are_those_of_a_forward_pass(model, temperature):
    batch = run(model, request(), replace(SAMPLING, temperature=temperature))
    A = batch.response_mask.shape[1]
    logits = response_logits(model, batch.input_ids, batch.attention_mask, A)
    again = token_logprobs(logits, batch.input_ids[:, -A:], temperature) * batch.response_mask
    assert torch.allclose(batch.logprobs, again, atol=1e-4) and batch.logprobs.any()


def test_same_row_seed_gives_the_same_tokens_whatever_the_batch_mates_and_the_padding(model):
    together = responses(run(model, request()))
    padded = responses(run(model, request(pad=5)))
    names = ("prompt_ids", "prompt_attention_mask", "row_seeds")
    rows = [KitRequest(**{name: getattr(request(), name)[i:i + 1] for name in names}) for i in range(4)]
    alone = [responses(run(model, row))[0] for row in rows]
    assert together == padded == alone
    assert together != responses(run(model, request(seeds=(10, 11, 12, 13))))


def test_it_samples_and_is_not_greedy_by_accident(model):
    many = run(model, request(lengths=[4] * 64, seed=1))
    assert len({row[0] for row in responses(many)}) > 3
    one = KitRequest(prompt_ids=request().prompt_ids[:1].expand(32, -1), row_seeds=torch.arange(32),
                     prompt_attention_mask=request().prompt_attention_mask[:1].expand(32, -1))
    assert len({tuple(row) for row in responses(run(model, one))}) > 3
    assert len({tuple(row) for row in responses(run(model, one, replace(SAMPLING, temperature=0.0)))}) == 1


def test_greedy_is_what_transformers_generates(model):
    asked = request()
    batch = run(model, asked, replace(SAMPLING, temperature=0.0, stop_token_ids=()))
    theirs = model.generate(input_ids=asked.prompt_ids, attention_mask=asked.prompt_attention_mask.long(),
                            do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(batch.input_ids, theirs)


def test_a_response_ends_with_its_stop_token_which_belongs_to_it(model):
    free = responses(run(model, request(lengths=[5] * 16)))
    stop = free[0][2]
    batch = run(model, request(lengths=[5] * 16), replace(SAMPLING, stop_token_ids=(stop,)))
    for full, cut, finished in zip(free, responses(batch), batch.finished.tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert cut == full[:end] and finished == (stop in full)
    assert batch.finished.any() and not batch.logprobs[~batch.response_mask].any()
    assert torch.equal(batch.attention_mask[:, -batch.response_mask.shape[1]:], batch.response_mask)


def test_sampled_frequencies_are_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(40_000, 4)
    tokens, logprobs = sample_tokens(logits, row_uniforms(torch.arange(40_000), 1)[:, 0], SAMPLING)
    expected = logits[0].softmax(-1)
    assert torch.allclose(tokens.bincount(minlength=4) / 40_000, expected, atol=0.01)
    assert torch.allclose(logprobs.exp(), expected[tokens])


@given(st.integers(0, 2**40), st.floats(0.1, 1.0), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_filters_keep_the_most_likely_tokens_and_renormalise(seed, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(8, 9, generator=generator), torch.rand(8, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, replace(SAMPLING, top_p=top_p, top_k=top_k))
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        order = row.argsort(descending=True)[:top_k or 9]
        kept = row[order].softmax(-1)
        kept = order[kept.cumsum(-1) - kept < top_p]
        assert token in kept
        assert torch.allclose(logprob, row[kept].log_softmax(-1)[kept.tolist().index(int(token))], atol=1e-5)


def test_hybrid_engine_joins_slices_and_restores_the_mode():
    class Engine:
        module, device = causal_lm(), torch.device("cpu")

        def zero_optimization_stage(self):
            return 2
    Engine.module.train()
    whole = run(Engine.module, request(lengths=(3, 6, 4, 6, 5)))
    sliced = HybridEngine(Engine(), micro_batch_size=2).generate(request(lengths=(3, 6, 4, 6, 5)), SAMPLING)
    assert responses(sliced) == responses(whole) and torch.equal(sliced.finished, whole.finished)
    assert Engine.module.training


def test_a_model_without_finite_logits_is_named():
    broken = causal_lm()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="row 0, response token 0"):
        run(broken, request())
