"""The machinery of ``specdec.rng``: Philox words, the exact logarithm, and the noise, in torch and in compiled loops.

Both implementations run the same IEEE operations in the same order, so that they agree in every bit. Nobody else needs
this module.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 (Philox4x32-10).
"""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["MASK", "UNIT", "Words", "bits_torch", "draw", "fill_gumbel", "fill_words", "log", "log_torch", "noise"]

Words: TypeAlias = npt.NDArray[np.uint32]
Floats: TypeAlias = npt.NDArray[np.float32]

_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

UNIT: Final = 2.0**-32
_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD  # the float64 sqrt(1/2), seen as an integer
_MANTISSA_BITS: Final = 52
# ln 2 in two parts: the high one has 32 trailing zero bits, so that its product with an exponent is exact.
_LN2_HIGH: Final = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
# 2 atanh(s) = 2 s + s (2/3 s^2 + 2/5 s^4 + ...). Here s^2 <= 0.02944, so the first term left out, 2/23 s^22, is below
# 2^-58 of the result. Highest power first.
_ATANH: Final = (2 / 21, 2 / 19, 2 / 17, 2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8, _A9 = _ATANH
# An upper bound of the noise of a word: -log(-log(1 - w)) <= -log(w) = ln 2 (32 - log2(word)), and a float32 read as an
# integer is a lower bound of its log2, scaled by 2^23 and shifted by 127. The margin covers the roundings (1e-5).
_BOUND_SLOPE: Final = np.float32(math.log(2) * 2.0**-23)
_BOUND_OFFSET: Final = np.float32(math.log(2) * (32 + 127) + 1e-3)
_DRAW_CHUNK: Final = 256


# ---- torch --------------------------------------------------------------------------------------------------------


def bits_torch(keys: Words, places: Words, num: int, stream: int, device: torch.device) -> Tensor:
    """[R, num] int64: the Philox words as numbers in [0, 2^32)."""
    key = torch.from_numpy(keys.astype(np.int64)).to(device)[:, :, None]  # [R, 2, 1]
    place = torch.from_numpy(places.astype(np.int64)).to(device)[:, :, None]
    block = torch.arange((num + 3) // 4, device=device)[None, :]  # [1, B]
    counter = (block, torch.full_like(block, stream), place[:, 0], place[:, 1])
    words = philox_torch(counter, (key[:, 0], key[:, 1]))
    shape = (len(keys), block.shape[1])
    return torch.stack([word.expand(shape) for word in words], dim=-1).flatten(1)[:, :num]


def philox_torch(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 over int64 tensors that hold 32-bit words; shapes broadcast.

    A product of two words may pass 2^63: int64 wraps, and both masked halves are still those of the true product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((product_1 >> 32) & MASK) ^ c1 ^ k0, ((product_0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = product_1 & MASK, product_0 & MASK
        k0, k1 = (k0 + _WEYL_0) & MASK, (k1 + _WEYL_1) & MASK
    return c0, c1, c2, c3


def log_torch(x: Tensor) -> Tensor:
    """``log`` over float64 tensors: the same operations in the same order, one torch call each."""
    bits = x.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    f = (bits - (exponent << _MANTISSA_BITS)).view(torch.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = torch.full_like(z, _ATANH[0])
    for coefficient in _ATANH[1:]:
        series = series * z + coefficient
    series = series * z
    half_square = f * 0.5 * f
    k = exponent.to(torch.float64)
    return k * _LN2_HIGH - ((half_square - (s * (half_square + series) + k * _LN2_LOW)) - f)


# ---- numba --------------------------------------------------------------------------------------------------------
# error_model="numpy" drops the division-by-zero branch, without which the loop is not vectorised (9x slower).
# There is no fastmath: it would allow fused multiply-add and other orders, and the bits would change.


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def log(x: float) -> float:
    """Natural logarithm of a positive normal float64, within 1 ulp; exact in its argument near 1.

    x = 2^k m with m in [sqrt(1/2), sqrt(2)); f = m - 1 is exact; with s = f / (2 + f),
    log m = 2 atanh(s) = f - f^2/2 + s (f^2/2 + series), which loses nothing where f is small.
    """
    bits = np.float64(x).view(np.int64)
    exponent = (bits - np.int64(_SQRT_HALF_BITS)) >> np.int64(_MANTISSA_BITS)
    f = np.int64(bits - (exponent << np.int64(_MANTISSA_BITS))).view(np.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = _A0 * z + _A1
    series = series * z + _A2
    series = series * z + _A3
    series = series * z + _A4
    series = series * z + _A5
    series = series * z + _A6
    series = series * z + _A7
    series = series * z + _A8
    series = series * z + _A9
    series = series * z
    half_square = f * 0.5 * f
    k = np.float64(exponent)
    return k * _LN2_HIGH - ((half_square - (s * (half_square + series) + k * _LN2_LOW)) - f)


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fill_words(key: Words, c1: int, c2: int, c3: int, out: Words) -> None:
    """``out[4 b .. 4 b + 3]`` become the words of Philox4x32-10 at counter (b, c1, c2, c3)."""
    mask = np.uint64(MASK)
    half = np.uint64(32)
    for block in range(len(out) // 4):
        a0, a1, a2, a3 = np.uint64(block), np.uint64(c1), np.uint64(c2), np.uint64(c3)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        for _ in range(_ROUNDS):
            product_0 = a0 * np.uint64(_MULTIPLIER_0)
            product_1 = a2 * np.uint64(_MULTIPLIER_1)
            a0 = (product_1 >> half) ^ a1 ^ k0
            a2 = (product_0 >> half) ^ a3 ^ k1
            a1 = product_1 & mask
            a3 = product_0 & mask
            k0 = (k0 + np.uint64(_WEYL_0)) & mask
            k1 = (k1 + np.uint64(_WEYL_1)) & mask
        out[4 * block] = np.uint32(a0)
        out[4 * block + 1] = np.uint32(a1)
        out[4 * block + 2] = np.uint32(a2)
        out[4 * block + 3] = np.uint32(a3)


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def noise(word: int) -> np.float32:
    """-log(-log(1 - w)) in float32, for w = (word + 1/2) 2^-32."""
    return np.float32(-log(-log(1.0 - (np.float64(word) + 0.5) * UNIT)))


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _transform(words: Words, out: Floats) -> None:
    for index in range(len(words)):
        out[index] = noise(words[index])


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fill_gumbel(keys: Words, places: Words, stream: int, out: Floats) -> None:
    """Write the noise of every row into ``out`` [R, V]."""
    num_rows, vocab_size = out.shape
    words = np.empty((vocab_size + 3) // 4 * 4, dtype=np.uint32)
    for row in range(num_rows):
        fill_words(keys[row], stream, places[row, 0], places[row, 1], words)
        _transform(words[:vocab_size], out[row])


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _cannot_win(score: np.float32, word: int, best: np.float32) -> np.bool_:
    """True only if score + noise < best; almost always so where it is."""
    return score + (_BOUND_OFFSET - _BOUND_SLOPE * np.float32(np.float32(word).view(np.int32))) < best


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _num_candidates(scores: Floats, words: Words, best: np.float32) -> np.int32:
    count = np.int32(0)
    for index in range(len(scores)):
        count += np.int32(not _cannot_win(scores[index], words[index], best))
    return count


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def draw(scores: Floats, keys: Words, places: Words, stream: int, winners: npt.NDArray[np.int64]) -> None:
    """The index of the largest score + noise of every row, the first one if there are several.

    Args:
        scores: [R, V] float32.
        keys: [R, 2]: low and high word of the seeds.
        places: [R, 2]: likewise of the positions.
        stream: what the noise is for.
        winners: [R] int64: in, the index of the largest score of each row, which the others have to beat; out, the
            result.
    """
    num_rows, vocab_size = scores.shape
    words = np.empty((vocab_size + 3) // 4 * 4, dtype=np.uint32)
    for row in range(num_rows):
        fill_words(keys[row], stream, places[row, 0], places[row, 1], words)
        line = scores[row]
        winner = winners[row]
        best = line[winner] + noise(words[winner])
        for start in range(0, vocab_size, _DRAW_CHUNK):
            stop = min(start + _DRAW_CHUNK, vocab_size)
            if _num_candidates(line[start:stop], words[start:stop], best) == 0:
                continue
            for index in range(start, stop):
                if not _cannot_win(line[index], words[index], best):
                    value = line[index] + noise(words[index])
                    if value > best or (value == best and index < winner):
                        best, winner = value, index
        winners[row] = winner
