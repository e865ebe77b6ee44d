"""Generation: the distribution, the seeds, the padding, the end of a response."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import response_logits, token_logprobs
from tiny_models import SHAPES, VOCABULARY, causal_lm, tokenizer

from dschat_kit.engine import attention, sampling
from dschat_kit.engine.attention import ATTENTION, FAMILIES, KVSlots, take_slots
from dschat_kit.engine.decode import Plain, Slots, _Responses, decode
from dschat_kit.engine.graphs import GraphedSlots
from dschat_kit.engine.rollout_types import KitRequest, KitSampling
from dschat_kit.engine.sampling import row_uniforms, sample_tokens
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


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"n_samples_per_prompt": 0}, {"temperature": -0.1},
                                   {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.5},
                                   {"min_p": -0.1}, {"stop_strings": ("",)}, {"stop_strings": "END"}], ids=str)
def test_settings_that_no_distribution_fits_are_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: got {value!r}, expected")):
        replace(SAMPLING, **wrong)


def plain_attention(model):
    return "sdpa" if model._supports_sdpa else "eager"


def run(model, asked, sampling=SAMPLING, slots=64, path="slots"):
    """Decode with plain transformers (`plain`), the slots of memory (`slots`), or as a graph would (`graph`)."""
    take_slots(model)
    fast = path != "plain" and model.config.model_type in FAMILIES
    model.set_attn_implementation(ATTENTION if fast else plain_attention(model))
    try:
        if path == "graph" and fast:
            return decode(GraphedSlots(model, KVSlots(slots, 128), torch.device("cpu"), capture=False), asked, sampling)
        return decode(Slots(model, KVSlots(slots, 128)) if fast else Plain(model, slots), asked, sampling)
    finally:
        model.set_attn_implementation(plain_attention(model))


def responses(batch):
    tokens = batch.input_ids[:, -batch.response_mask.shape[1]:]
    return [row[mask].tolist() for row, mask in zip(tokens, batch.response_mask, strict=True)]


@pytest.fixture(scope="module", params=[*sorted(SHAPES), *(f"{name} kernel" for name in FAMILIES)])
def model(request):
    """Compiled loops, and memory that grows every few tokens; `kernel`: torch's operations, as on a GPU."""
    architecture, _, kernel = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "COLUMNS", 4)
        if kernel:
            for module in (attention, sampling):
                patch.setattr(module, "compiles", lambda like: False)
        yield causal_lm(architecture)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_the_sampler_are_those_of_a_forward_pass(model, temperature):
    batch = run(model, request(), replace(SAMPLING, temperature=temperature))
    A = batch.response_mask.shape[1]
    logits = response_logits(model, batch.input_ids, batch.attention_mask, A)
    again = token_logprobs(logits, batch.input_ids[:, -A:], temperature) * batch.response_mask
    assert torch.allclose(batch.logprobs, again, atol=1e-5) and batch.logprobs.any()


def test_same_row_seed_gives_the_same_tokens_whatever_the_batch_mates_and_the_padding(model):
    together = responses(run(model, request()))
    padded = responses(run(model, request(pad=5)))
    names = ("prompt_ids", "prompt_attention_mask", "row_seeds")
    rows = [KitRequest(**{name: getattr(request(), name)[i:i + 1] for name in names}) for i in range(4)]
    alone = [responses(run(model, row))[0] for row in rows]
    assert together == padded == alone
    assert together != responses(run(model, request(seeds=(10, 11, 12, 13))))


def test_memory_follows_the_longest_row(monkeypatch):
    """One place: a long prompt's columns are given back when a short one stands there."""
    monkeypatch.setattr(attention, "COLUMNS", 8)
    model, asked = causal_lm("llama"), request(lengths=(100, 3))
    alone = responses(run(model, request(lengths=(100, 3)), slots=2))
    take_slots(model).set_attn_implementation(ATTENTION)
    kv = KVSlots(1, 128)
    assert responses(decode(Slots(model, kv), asked, SAMPLING)) == alone
    assert max(keys.shape[2] for keys, _ in kv._memory.values()) <= 16


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
    free = responses(run(model, request(lengths=[5] * 16), replace(SAMPLING, stop_token_ids=())))
    stop = free[0][2]
    batch = run(model, request(lengths=[5] * 16), replace(SAMPLING, stop_token_ids=(stop,)))
    for full, cut, finished in zip(free, responses(batch), batch.finished.tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert cut == full[:end] and finished == (stop in full)
    assert batch.finished.any() and not batch.logprobs[~batch.response_mask].any()
    assert torch.equal(batch.attention_mask[:, -batch.response_mask.shape[1]:], batch.response_mask)


def drawn(compiled, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "compiles", lambda like: compiled)
        return sample_tokens(*args)


compiled_and_not = pytest.mark.parametrize("compiled", [True, False])


@compiled_and_not
def test_sampled_frequencies_are_the_softmax(compiled):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(40_000, 4)
    tokens, logprobs, entropy = drawn(compiled, logits, row_uniforms(torch.arange(40_000), 1)[:, 0], SAMPLING)
    expected = logits[0].softmax(-1)
    assert torch.allclose(entropy, -(expected * expected.log()).sum())
    assert torch.allclose(tokens.bincount(minlength=4) / 40_000, expected, atol=0.01)
    assert torch.allclose(logprobs.exp(), expected[tokens])


@compiled_and_not
@given(st.integers(0, 2**40), st.floats(0.1, 1.0), st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.5]),
       st.sampled_from([0.3, 1.0, 2.0]))
@settings(deadline=None, max_examples=50)
def test_filters_keep_the_most_likely_tokens_and_renormalise(compiled, seed, top_p, top_k, min_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(8, 9, generator=generator), torch.rand(8, generator=generator, dtype=torch.float64)
    filters = replace(SAMPLING, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    tokens, logprobs, entropy = drawn(compiled, logits, uniforms, filters)
    assert entropy.isfinite().all()
    for row, token, logprob in zip(logits / temperature, tokens, logprobs, strict=True):
        order = row.argsort(descending=True)[:top_k or 9]
        kept = row[order].softmax(-1)
        kept = order[(kept.cumsum(-1) - kept < top_p) & (kept >= min_p * kept[0])]
        assert token in kept
        assert torch.allclose(logprob, row[kept].log_softmax(-1)[kept.tolist().index(int(token))], atol=1e-5)


@compiled_and_not
@given(st.integers(0, 2**40), st.integers(1, 1000))
@settings(deadline=None, max_examples=30)
def test_a_draw_inverts_the_whole_distribution_function(compiled, seed, size):
    """The search in blocks finds what a running sum over the vocabulary finds."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, size, generator=generator)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    tokens, *_ = drawn(compiled, logits, uniforms, SAMPLING)
    upper = logits.double().softmax(-1).cumsum(-1)
    lower = torch.nn.functional.pad(upper, (1, -1))
    for row in range(4):
        assert lower[row, tokens[row]] - 1e-6 <= uniforms[row] <= upper[row, tokens[row]] + 1e-6


def test_fewer_places_than_rows_and_several_samples_change_no_token(model):
    """Rows that end give their places to waiting prompts; n samples of a prompt share its computation."""
    asked = request(lengths=(3, 9, 4, 1, 7, 9, 2, 5), seed=4)
    many = replace(SAMPLING, n_samples_per_prompt=2, stop_token_ids=tuple(range(1, 60)))
    expected = run(model, asked, many, path="plain")
    assert 0 < expected.response_mask.sum(1).min() < expected.response_mask.sum(1).max()
    for slots, path in ((5, "graph"), (2, "slots"), (5, "slots"), (16, "slots")):
        batch = run(model, asked, many, slots=slots, path=path)
        assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.finished, expected.finished)
        assert torch.equal(batch.attention_mask, expected.attention_mask)
        assert torch.allclose(batch.logprobs, expected.logprobs, atol=1e-5)
        assert torch.allclose(batch.entropy, expected.entropy, atol=1e-4)
    first = [row for row, _ in zip(responses(batch)[::2], responses(batch)[1::2], strict=True)]
    assert first == responses(run(model, asked, replace(many, n_samples_per_prompt=1)))


def test_prompts_are_computed_once_longest_first_and_places_refilled_at_once():
    """Seen by the forward passes: what is admitted when, and how many rows a step computes."""
    model, asked = take_slots(causal_lm()), request(lengths=(3, 9, 4, 1, 7, 9, 2, 5), seed=4)
    model.set_attn_implementation(ATTENTION)
    steps, fed = Slots(model, KVSlots(4, 128)), []
    for name in ("admit", "step"):
        honest = getattr(steps, name)
        setattr(steps, name, lambda first, *more, name=name, honest=honest: (
            fed.append((name, len(first), int(more[0].sum(1).max()) if name == "admit" else len(steps.rows))),
            honest(first, *more))[1])
    ends = torch.tensor([length for pair in zip(range(2, 10), range(3, 11), strict=True) for length in pair])
    asked = replace(asked, row_lengths=ends)
    decode(steps, asked, replace(SAMPLING, n_samples_per_prompt=2))
    admitted = [(count, longest) for name, count, longest in fed if name == "admit"]
    assert sum(count for count, _ in admitted) == 8  # not 16: both samples share a prompt
    assert [longest for _, longest in admitted] == sorted((longest for _, longest in admitted), reverse=True)
    assert admitted[0] == (2, 9) and len(admitted) > 3
    refilled = [i for i, (name, *_) in enumerate(fed) if name == "admit"][1:]
    assert any(fed[i + 1][2] > 2 * fed[i][1] for i in refilled[:-1])  # beside rows that had not ended


def test_places_that_are_too_few_and_retired_rows_change_no_token():
    model, asked = causal_lm(), request(lengths=[1 + i % 11 for i in range(40)], seed=7)
    few = replace(SAMPLING, stop_token_ids=tuple(range(1, 40)))
    expected = responses(run(model, asked, few, path="plain"))
    assert responses(run(model, asked, few)) == responses(run(model, asked, few, slots=19)) == expected


def test_stop_strings_end_a_response_where_they_are_complete():
    words, model = tokenizer(), causal_lm()
    free = replace(SAMPLING, stop_token_ids=())
    asked = request(lengths=[4] * 8)
    whole = [words.decode(row) for row in responses(run(model, asked, free))]
    stop = next(text[i] for text in whole for i in range(2, len(text)) if text[i].isascii() and text[i] not in text[:i])
    batch = run(model, asked, replace(free, stop_strings=(stop,), tokenizer=words))
    assert batch.finished.any()
    for text, row, finished in zip(whole, responses(batch), batch.finished.tolist(), strict=True):
        said = words.decode(row)
        assert finished == (stop in said) == (stop in text) and text.startswith(said.rstrip("\ufffd"))
        assert stop not in words.decode(row[:-1])


def test_rows_of_a_given_length_end_there_and_nowhere_else():
    lengths = torch.tensor([1, 5, 12, 3])
    asked = replace(request(), row_lengths=lengths)
    for path in ("slots", "plain"):
        batch = run(causal_lm(), asked, path=path)
        assert batch.response_mask.sum(1).tolist() == lengths.tolist() and batch.finished.all()
        assert all(row[-1] == 1 and 1 not in row[:-1] for row in responses(batch))


@pytest.mark.parametrize("temperature", [1e-3, 1e9])
@compiled_and_not
def test_a_dropped_token_is_never_drawn_whatever_the_temperature(compiled, temperature):
    logits, uniforms = torch.linspace(0, 1, 500).repeat(3, 1), torch.tensor([0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs, entropy = drawn(compiled, logits, uniforms, replace(SAMPLING, temperature=temperature, top_k=1))
    assert tokens.tolist() == [499] * 3 and not logprobs.any() and not entropy.any()


def test_given_lengths_hold_in_fp16():
    """Whose smallest number is -65504."""
    said = _Responses(replace(request(), row_lengths=torch.tensor([2, 1, 2, 2])), SAMPLING)
    assert said.take([0, 1, 2, 3], torch.zeros(4, 300, dtype=torch.float16)) == [1]
    assert torch.isfinite(said.entropy).all() and said.tokens[1, 0] == 1 and (said.tokens[[0, 2, 3], 0] != 1).all()


def test_a_model_without_finite_logits_is_named():
    broken = causal_lm()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="row 0, response token 0"):
        run(broken, request())
