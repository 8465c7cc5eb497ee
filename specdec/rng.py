"""Noise that is a function of (seed, position, stream) and nothing else.

Every random choice of specdec is read from here, so that a request's output depends on neither its neighbours, nor the
drafter, nor the order of calls. The generator is counter-based (Philox4x32-10): there is no state to advance, any
position can be asked for at any time, on any device.

Layout of one Philox call, which yields the words of four neighbouring vocabulary entries:

=========== =================================================
key         the request's seed: low word, high word
counter 0   vocabulary index // 4 (the word is index % 4)
counter 1   stream: what the noise is for (``TARGET``, ...)
counter 2-3 absolute position: low word, high word
=========== =================================================

Two positions, seeds or streams therefore never share a block: Philox is a bijection of the counter for each key.

The noise is *bitwise* the same on every device and in every implementation. So the logarithm is our own, made only of
operations that IEEE 754 rounds exactly (add, subtract, multiply, one division, integer shifts), evaluated in float64
in a fixed order without fused multiply-add, and rounded to float32 once at the end. A library ``log`` is free to
differ in the last bit between devices.

Resolution: words have 32 bits, so the smallest uniform is 2^-33 and the noise lies in [-3.14, 22.88]. An event of
probability below about 2^-33 per vocabulary entry is not represented; the total-variation error of one draw is below
V * 2^-32 (4e-5 at V = 150k, an upper bound that assumes every entry is equally likely).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ACCEPT", "DRAFT", "RESIDUAL", "TARGET", "gumbel", "gumbel_torch", "uniforms"]

TARGET: Final = 0  # the target's token at a position; drafters that couple to it read the same noise
DRAFT: Final = 1  # a drafter's own choices
ACCEPT: Final = 2  # accept or reject, in the rejection rules
RESIDUAL: Final = 3  # the token after a rejection

Keys: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
_Words: TypeAlias = npt.NDArray[np.uint32]

_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

_UNIT: Final = 2.0**-32
_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD  # the float64 sqrt(1/2), seen as an integer
_MANTISSA_BITS: Final = 52
# ln 2 in two parts: the high one has 32 trailing zero bits, so that its product with an exponent is exact.
_LN2_HIGH: Final = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
# 2 atanh(s) = 2 s + s (2/3 s^2 + 2/5 s^4 + ...). Here s^2 <= 0.02944, so the first term left out, 2/23 s^22, is below
# 2^-58 of the result. Highest power first.
_ATANH: Final = (2 / 21, 2 / 19, 2 / 17, 2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8, _A9 = _ATANH
# Rows of the torch implementation are made in slabs of this many entries, to bound its int64 temporaries (~0.5 GiB).
_SLAB: Final = 1 << 23


def gumbel(
    seeds: Keys, positions: Keys, vocab_size: int, *, device: torch.device | str, stream: int = TARGET
) -> Tensor:
    """Standard Gumbel noise, one row per (seed, position): ``argmax(log p + row)`` is a draw from p.

    Args:
        seeds: [R] request seeds in [0, 2^64).
        positions: [R] absolute indices (prompt included) of the tokens that are drawn, in [0, 2^64).
        vocab_size: V.
        device: where the noise is made and left. The CPU uses compiled code, any other device torch integer ops;
            the bits are the same.
        stream: what the noise is for; different streams are independent.

    Returns:
        [R, V] float32. Row r depends on ``seeds[r]``, ``positions[r]`` and ``stream`` only, and its first entries do
        not depend on V.

    Raises:
        ValueError: seeds and positions differ in length, or a value is outside its range.

    Example:
        >>> noise = gumbel([7, 7], [12, 13], 32000, device="cpu")
        >>> next_ids = (logits + noise).argmax(-1)
    """
    device = torch.device(device)
    if device.type != "cpu":
        return gumbel_torch(seeds, positions, vocab_size, device=device, stream=stream)
    keys, places = _words_of("seeds", seeds), _words_of("positions", positions)
    _check(keys, places, stream)
    out = np.empty((len(keys), vocab_size), dtype=np.float32)
    _fill_gumbel(keys, places, np.uint32(stream), out)
    return torch.from_numpy(out)


def gumbel_torch(
    seeds: Keys, positions: Keys, vocab_size: int, *, device: torch.device | str, stream: int = TARGET
) -> Tensor:
    """The same noise as ``gumbel``, bit for bit, in plain torch operations on any device."""
    keys, places = _words_of("seeds", seeds), _words_of("positions", positions)
    _check(keys, places, stream)
    out = torch.empty((len(keys), vocab_size), dtype=torch.float32, device=device)
    step = max(1, _SLAB // max(vocab_size, 1))
    for start in range(0, len(keys), step):
        rows = slice(start, start + step)
        words = _bits_torch(keys[rows], places[rows], vocab_size, stream, torch.device(device))
        exponential = _log_torch(1.0 - (words.to(torch.float64) + 0.5) * _UNIT).neg_()
        out[rows] = _log_torch(exponential).neg_()
    return out


def uniforms(seeds: Keys, positions: Keys, num: int, *, device: torch.device | str, stream: int = ACCEPT) -> Tensor:
    """Uniform numbers in (0, 1), a fixed number per (seed, position, stream) however many of them are used.

    Returns:
        [R, num] float64: exact multiples of 2^-33, the same on every device.

    Raises:
        ValueError: as in ``gumbel``.
    """
    keys, places = _words_of("seeds", seeds), _words_of("positions", positions)
    _check(keys, places, stream)
    words = _bits_torch(keys, places, num, stream, torch.device(device))
    return (words.to(torch.float64) + 0.5) * _UNIT


def _words_of(name: str, values: Keys) -> _Words:
    """[R, 2] uint32: low and high word of 64-bit numbers."""
    try:
        if isinstance(values, np.ndarray) and values.dtype.kind == "i" and (values < 0).any():
            raise OverflowError
        wide = np.asarray(values, dtype=np.uint64)
    except OverflowError:
        raise ValueError(f"{name} must be in [0, 2**64), got {list(values)}") from None
    return np.stack([wide & np.uint64(_MASK), wide >> np.uint64(32)], axis=-1).astype(np.uint32)


def _check(keys: _Words, places: _Words, stream: int) -> None:
    if keys.shape != places.shape or keys.ndim != 2:
        raise ValueError(f"seeds and positions must be two lists of one length, got {len(keys)} and {len(places)}")
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream must be in [0, 2**32), got {stream}")


# ---- torch --------------------------------------------------------------------------------------------------------


def _bits_torch(keys: _Words, places: _Words, num: int, stream: int, device: torch.device) -> Tensor:
    """[R, num] int64: the Philox words as numbers in [0, 2^32)."""
    key = torch.from_numpy(keys.astype(np.int64)).to(device)[:, :, None]  # [R, 2, 1]
    place = torch.from_numpy(places.astype(np.int64)).to(device)[:, :, None]
    block = torch.arange((num + 3) // 4, device=device)[None, :]  # [1, B]
    counter = (block, torch.full_like(block, stream), place[:, 0], place[:, 1])
    words = _philox_torch(counter, (key[:, 0], key[:, 1]))
    shape = (len(keys), block.shape[1])
    return torch.stack([word.expand(shape) for word in words], dim=-1).flatten(1)[:, :num]


def _philox_torch(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 over int64 tensors that hold 32-bit words; shapes broadcast.

    A product of two words may pass 2^63: int64 wraps, and both masked halves are still those of the true product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0, ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _log_torch(x: Tensor) -> Tensor:
    """``_log`` over float64 tensors: the same operations in the same order, one torch call each."""
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
def _log(x: float) -> float:
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
def _fill_words(key: _Words, c1: int, c2: int, c3: int, out: _Words) -> None:
    """``out[4 b .. 4 b + 3]`` become the words of Philox4x32-10 at counter (b, c1, c2, c3)."""
    mask = np.uint64(_MASK)
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
def _fill_gumbel(keys: _Words, places: _Words, stream: int, out: npt.NDArray[np.float32]) -> None:
    """Write the noise of every row into ``out`` [R, V]."""
    num_rows, vocab_size = out.shape
    words = np.empty((vocab_size + 3) // 4 * 4, dtype=np.uint32)
    for row in range(num_rows):
        _fill_words(keys[row], stream, places[row, 0], places[row, 1], words)
        target = out[row]
        for index in range(vocab_size):
            exponential = -_log(1.0 - (np.float64(words[index]) + 0.5) * _UNIT)
            target[index] = np.float32(-_log(exponential))
