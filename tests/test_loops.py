"""The compiled loops: torch's attention in fp64, whatever lies in the columns that a row does not see, and draws from
the softmax in fp64 (tests/test_decode.py has filters and frequencies)."""

import subprocess
import sys

import numba
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat_kit.engine import loops
from dschat_kit.engine.loops import attend_one, compiles, draw
from dschat_kit.engine.sampling import _draw


def expected(query, keys, values, positions, scaling, window, bias):
    """(n, 1, H, D) in fp64."""
    columns, last = torch.arange(keys.shape[2]), positions[:, None, None, None]
    hidden = (columns > last) | (columns <= last - (window or len(columns)))
    mask = torch.zeros(1) if bias is None else bias.double()
    found = F.scaled_dot_product_attention(query.double(), keys.double(), values.double(), scale=scaling,
                                           attn_mask=torch.where(hidden, float("-inf"), mask.double()), enable_gqa=True)
    return found.transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5), spare=st.integers(0, 2), K=st.integers(1, 3), group=st.integers(1, 3),
       D=st.sampled_from((1, 8, 24, 64)), columns=st.integers(1, 70), window=st.none() | st.integers(1, 80),
       biased=st.booleans(), large=st.booleans(), bf16=st.booleans(), seed=st.integers(0, 999))
def test_it_is_torchs_attention(n, spare, K, group, D, columns, window, biased, large, bf16, seed):
    """And it stores the new key and value, and nothing else."""
    torch.manual_seed(seed)
    dtype, H = torch.bfloat16 if bf16 else torch.float32, K * group
    keys, values = torch.randn(2, n + spare, K, columns, D).to(dtype)
    query = (torch.randn(n, 1, H, D) * (30 if large else 1)).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, n, 1, K, D).to(dtype).transpose(2, 3)
    positions, bias = torch.randint(columns, (n,)), torch.randn(H, 1, columns).to(dtype) if biased else None
    stored = [memory.clone() for memory in (keys, values)]
    for memory, new in zip(stored, (key, value), strict=True):
        memory[torch.arange(n), :, positions] = new[:, :, 0]
    found = attend_one(query, key, value, keys, values, positions, 0.3, window, bias)
    assert torch.equal(keys, stored[0]) and torch.equal(values, stored[1]) and found.dtype == dtype
    true = expected(query, keys[:n], values[:n], positions, 0.3, window, bias)
    size, scores = values.abs().max(), 0.3 * (query.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max())
    tolerance = 2**-8 if bf16 else 3e-7 * (4 + scores)  # of the output; of scores in fp32
    assert found.shape == (n, 1, H, D) and (found.double() - true).abs().max() <= tolerance * size


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_row_does_not_depend_on_those_beside_it_nor_on_threads(threads):
    torch.manual_seed(0)
    query, key, value, memory, positions = (torch.randn(6, 4, 1, 16), torch.randn(6, 2, 1, 16),
                                            torch.randn(6, 2, 1, 16), torch.randn(2, 6, 2, 40, 16),
                                            torch.randint(40, (6,)))
    together = attend_one(query, key, value, *memory.clone(), positions, 0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in range(6):
            some = slice(row, row + 1)
            alone = attend_one(query[some], key[some], value[some], *memory[:, some].clone(), positions[some], 0.3)
            assert torch.equal(alone, together[some])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["query", "keys", "values"])
def test_what_is_not_finite_stays_so_and_in_its_row(place, bad):
    """Else the decode loop could not name the row."""
    parts = {"query": torch.ones(3, 2, 1, 8), "key": torch.ones(3, 2, 1, 8), "value": torch.ones(3, 2, 1, 8),
             "keys": torch.ones(3, 2, 9, 8), "values": torch.ones(3, 2, 9, 8)}
    parts[place][1, :, 0] = bad
    found = attend_one(**parts, positions=torch.tensor([8, 8, 4]), scaling=1.0)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("draw", [draw, _draw])
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5), V=st.integers(1, 1000), scale=st.sampled_from((0.1, 3.0, 300.0)),
       temperature=st.sampled_from((0.3, 1.0, 2.0)), bf16=st.booleans(), seed=st.integers(0, 999))
def test_a_draw_is_of_the_softmax(draw, n, V, scale, temperature, bf16, seed):
    """Whatever can happen: the first and the last number there is, tokens without probability, a token that is forced.
    """
    torch.manual_seed(seed)
    logits, forced = (torch.randn(n, V) * scale).to(torch.bfloat16 if bf16 else torch.float32), torch.full((n,), -1)
    logits[:, V // 2 + 1:] = -1e9
    logits[:, :V // 3] = -1e9
    forced[0], uniforms = V - 1, torch.rand(5).double()[:n]
    uniforms[1:3] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[:n - 1]
    tokens, logprobs, entropy = draw(logits, temperature, uniforms, forced)
    true = (logits.double() / temperature).log_softmax(-1)  # of tokens at -1e9 with probability 0
    upper = true.exp().cumsum(-1)
    assert tokens[0] == V - 1 and forced[0] == V - 1 and (forced[1:] == -1).all()
    for row in range(1, n):
        token = tokens[row]
        assert V // 3 <= token <= V // 2 and true[row, token] > -105
        assert upper[row, token] - true[row, token].exp() - 1e-6 <= uniforms[row] <= upper[row, token] + 1e-6
    error = 1e-6 * (4 + (logits.double().max(-1).values - logits.double()[range(n), tokens]) / temperature)
    assert ((logprobs - true[range(n), tokens]).abs() <= error).all()
    assert torch.allclose(entropy.double(), -(true.exp() * true).sum(-1), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_draw_does_not_depend_on_the_rows_beside_it_nor_on_threads(threads):
    torch.manual_seed(0)
    parts = torch.randn(6, 1000), torch.rand(6).double(), torch.full((6,), -1)
    together, before = draw(parts[0], 1.0, *parts[1:]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in range(6):
            logits, uniforms, forced = (part[row:row + 1] for part in parts)
            for one, all_rows in zip(draw(logits, 1.0, uniforms, forced), together, strict=True):
                assert torch.equal(one, all_rows[row:row + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("draw", [draw, _draw])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_draw_without_finite_logits_says_so_in_its_row(draw, bad):
    logits = torch.zeros(3, 600)
    logits[1, 500] = bad
    tokens, logprobs, _ = draw(logits, 1.0, torch.full((3,), 0.5).double(), torch.full((3,), -1))
    assert logprobs.isfinite().tolist() == [True, False, True] and ((tokens >= 0) & (tokens < 600)).all()


def test_it_is_compiled_anew_where_nothing_can_be_kept(monkeypatch):
    """As in a read-only image without a home."""
    asked, honest = [], numba.njit

    def njit(**how):
        asked.append(how.get("cache", False))
        if how.get("cache"):
            return lambda function: (_ for _ in ()).throw(RuntimeError("cannot cache function: no locator available"))
        return honest(**how)
    monkeypatch.setattr(numba, "njit", njit)
    loops._compile.cache_clear()
    try:
        parts = torch.ones(5, 1, 1, 1, 4)
        assert torch.equal(attend_one(*parts, torch.zeros(1, dtype=torch.long), 1.0), torch.ones(1, 1, 1, 4))
    finally:
        loops._compile.cache_clear()
    assert asked == [True, False]


THREADS = """
import torch
torch.set_num_threads(1)
from dschat_kit.engine.loops import attend_one
attend_one(*torch.ones(5, 1, 1, 1, 4), torch.zeros(1, dtype=torch.long), 1.0)
assert torch.get_num_threads() == 1
"""


def test_torch_keeps_its_number_of_threads():
    """Else each of several ranks would compute on all cores."""
    subprocess.run([sys.executable, "-c", THREADS], check=True)


def test_where_there_is_a_loop():
    assert compiles(torch.empty(1)) and compiles(torch.empty(1, dtype=torch.bfloat16))
    assert not compiles(torch.empty(1, dtype=torch.float16)) and not compiles(torch.empty(1, device="meta"))
