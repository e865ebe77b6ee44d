"""The two parts of a decode step that read much and compute little, as loops for a CPU, which numba compiles at their
first use: attention of one query a row, and the draw of a token.

Both should take as long as reading memory does. torch's products and its attention kernel first bring keys and values
into another order, twice the time; a draw made of torch's operations reads and writes logits seven times. What is
computed is in fp32, sums over blocks of a distribution in fp64, whatever the dtype of the memory.

Shapes: n rows, H heads, K key-value heads, D head size, V vocabulary.
"""

import functools

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from torch import Tensor

BLOCK = 256
"""Probabilities of a distribution that are summed before it is searched."""
NO_BIAS = np.zeros((0, 0), np.float32)


def compiles(like: Tensor) -> bool:
    """Whether there are such loops for memory like this."""
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.bfloat16)


def attend_one(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, positions: Tensor,
               scaling: float, window: int | None = None, bias: Tensor | None = None) -> Tensor:
    """(n, 1, H, D): what the query (n, H, 1, D) of each row finds in columns 0 to positions (n,) of its keys and values
    (slots, K, columns, D), or in the last `window` of them. The new key and value (n, K, 1, D) are stored in that last
    column before. `bias` (H, 1, columns) is added to the scores."""
    assert keys.is_contiguous() and values.is_contiguous()  # what is stored into a copy would be lost
    output = query.new_empty(len(query), query.shape[1], query.shape[3])
    loop = _compiled(_attend)
    loop(*(_memory(part[:, :, 0]) for part in (query, key, value)), _memory(keys), _memory(values), positions.numpy(),
         np.float32(scaling), window or 0, NO_BIAS if bias is None else _memory(bias[:, 0].float()), _memory(output),
         numba.get_num_threads())
    return output[:, None]


def draw(logits: Tensor, temperature: float, uniforms: Tensor, forced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, logprobs, entropy), each (n,), of the distributions softmax(logits / temperature), logits (n, V): the
    token at which the distribution function passes uniforms (n,), or `forced` (n,) where that is not negative."""
    highest, tokens = logits.amax(-1).float(), forced.clone()
    logprobs, entropy = torch.empty(2, len(logits))
    _compiled(_draw)(_memory(logits), highest.numpy(), np.float32(1 / temperature), uniforms.numpy(), tokens.numpy(),
                     logprobs.numpy(), entropy.numpy())
    return tokens, logprobs, entropy


def _memory(part: Tensor) -> np.ndarray:
    """A tensor as an array; bf16, which numpy does not know, as the integers of the same memory."""
    part = part.contiguous()
    return (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy()


def _compiled(loop):
    """The compiled loop, which will use torch's number of threads."""
    found = _compile(loop)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # of the calling thread
    return found


@functools.cache
def _compile(loop):
    threads = torch.get_num_threads()
    numba.set_num_threads(1)  # the first such call makes numba's pool and gives torch, too, a thread for every core
    torch.set_num_threads(threads)
    how = {"parallel": True, "nogil": True, "fastmath": {"reassoc", "contract"}}  # without them no vector is formed
    try:
        return numba.njit(cache=True, **how)(loop)
    except RuntimeError:  # there is no place where it could be kept for the next process
        return numba.njit(**how)(loop)


def _attend(query, key, value, keys, values, positions, scaling, window, bias, output, parts):
    n, H, D = query.shape
    K, columns = keys.shape[1:3]
    for part in numba.prange(parts):
        probs, asked, found = np.empty(columns, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
        for i in range(part * n * K // parts, (part + 1) * n * K // parts):
            row, shared = i // K, i % K
            last = positions[row]
            first = max(0, last - window + 1) if window else 0
            # Memory that is read without gaps comes twice as fast, so a few columns that nobody looks at are read too.
            end = columns if 2 * last > columns else last + 1
            for d in range(D):
                keys[row, shared, last, d], values[row, shared, last, d] = key[row, shared, d], value[row, shared, d]
            for h in range(shared * H // K, (shared + 1) * H // K):
                for d in range(D):
                    asked[d] = _float(query[row, h, d]) * scaling
                for t in range(end):
                    score = np.float32(0)
                    for d in range(D):
                        score += asked[d] * _float(keys[row, shared, t, d])
                    probs[t] = score
                if len(bias):
                    for t in range(end):
                        probs[t] += bias[h, t]
                highest, total = np.float32(-np.inf), np.float32(0)
                for t in range(first, last + 1):
                    highest = max(highest, probs[t])
                for t in range(first, last + 1):
                    probs[t] = _exp(probs[t] - highest)
                for t in range(first, last + 1):
                    total += probs[t]
                probs[:first], probs[last + 1:], found[:] = 0, 0, 0
                for t in range(end):
                    prob = probs[t]
                    for d in range(D):
                        found[d] += prob * _float(values[row, shared, t, d])
                for d in range(D):
                    output[row, h, d] = _entry(found[d] / total, output[row, h, d])


def _draw(logits, highest, scale, uniforms, tokens, logprobs, entropy):
    n, V = logits.shape
    blocks = (V + BLOCK - 1) // BLOCK
    for row in numba.prange(n):
        top, sums, total, mean = highest[row], np.empty(blocks), 0.0, 0.0
        for block in range(blocks):
            part, shift = np.float32(0), np.float32(0)
            for t in range(block * BLOCK, min(V, (block + 1) * BLOCK)):
                x = (_float(logits[row, t]) - top) * scale
                weight = _exp(x)
                part += weight
                shift += weight * x
            sums[block] = part
            total += part
            mean += shift
        block, reached, target = 0, 0.0, uniforms[row] * total
        while block < blocks - 1 and reached + sums[block] <= target:
            reached += sums[block]
            block += 1
        token, t, end = tokens[row], block * BLOCK, min(V, (block + 1) * BLOCK)
        while tokens[row] < 0 and t < end and reached <= target:
            weight = _exp((_float(logits[row, t]) - top) * scale)
            if weight > 0:  # rounding must not choose a token of probability 0
                token = t
            reached += weight
            t += 1
        token = max(token, 0)  # without finite logits there is nothing to find
        tokens[row], logprobs[row] = token, (_float(logits[row, token]) - top) * scale - np.log(total)
        entropy[row] = np.log(total) - mean / total


def _float(x):
    """What an entry of `_memory` stands for."""


@overload(_float, inline="always")
def _float_of(x):
    if x is types.uint16:  # bf16 is the upper half of an fp32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def _entry(x, like):
    """An fp32 as an entry of `_memory` like another."""


@overload(_entry)
def _entry_of(x, like):
    if like is types.uint16:  # to the nearest, ties to even
        return lambda x, like: np.uint16((_bits(x) + np.uint32(0x7FFF) + (_bits(x) >> 16 & np.uint32(1))) >> 16)
    return lambda x, like: x


@register_jitable
def _bits(x):
    return np.float32(x).view(np.uint32)


@register_jitable
def _exp(x):
    """exp of a number up to 0, to 1e-7 (0 where fp32 has no normal number), by arithmetic that is done for 16 numbers
    at once: 2^n times a polynomial (S. L. Moshier, Cephes, expf)."""
    x = np.float32(-104) if x < np.float32(-104) else x  # not max(): what is not finite has to stay so
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r, p = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4), np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32(max(np.int32(n) + np.int32(127), np.int32(0)) << np.int32(23))
    return (p * r * r + r + np.float32(1)) * np.uint32(power).view(np.float32)
