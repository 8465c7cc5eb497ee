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

Resolution: words have 32 bits, so the noise lies in [-3.14, 22.88]. Two entries whose races end closer together than
that can tell apart, or within one float32 ulp of score + noise, are decided by their index: about V * 2^-32 + 2e-6 of
all draws, so no law is off by more than that in total variation.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.philox import MASK, UNIT, Words, bits_torch, draw, fill_gumbel, log_torch

__all__ = ["ACCEPT", "DRAFT", "RESIDUAL", "TARGET", "gumbel", "gumbel_argmax", "gumbel_torch", "uniforms"]

TARGET: Final = 0  # the target's token at a position; drafters that couple to it read the same noise
DRAFT: Final = 1  # a drafter's own choices
ACCEPT: Final = 2  # accept or reject, in the rejection rules
RESIDUAL: Final = 3  # the token after a rejection

Keys: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

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
    fill_gumbel(keys, places, np.uint32(stream), out)
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
        words = bits_torch(keys[rows], places[rows], vocab_size, stream, torch.device(device))
        exponential = log_torch(1.0 - (words.to(torch.float64) + 0.5) * UNIT).neg_()
        out[rows] = log_torch(exponential).neg_()
    return out


def gumbel_argmax(scores: Tensor, seeds: Keys, positions: Keys, *, stream: int = TARGET) -> Tensor:
    """``(scores + gumbel(seeds, positions, V)).argmax(-1)``, to the last bit, without most of the noise.

    On the CPU the double logarithm is taken only where the noise could decide: its size is first bounded from above
    by the leading bits of the word. On other devices rows with the same key share their noise.

    Args:
        scores: [R, V] float32 unnormalised log-probabilities; -inf is impossible.
        seeds: [R], as in ``gumbel``.
        positions: [R], as in ``gumbel``.
        stream: as in ``gumbel``.

    Returns:
        [R] int64 on the device of the scores: one draw per row; the first index if several are equal.

    Raises:
        ValueError: as in ``gumbel``.
    """
    keys, places = _words_of("seeds", seeds), _words_of("positions", positions)
    _check(keys, places, stream)
    if scores.is_cpu:
        rows = np.ascontiguousarray(scores.numpy())
        winners = rows.argmax(axis=-1)
        draw(rows, keys, places, np.uint32(stream), winners)
        return torch.from_numpy(winners)
    pairs = np.stack([np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64)])
    (seeds, positions), inverse = np.unique(pairs, axis=1, return_inverse=True)
    noise = gumbel_torch(seeds, positions, scores.shape[-1], device=scores.device, stream=stream)
    return (scores + noise[torch.from_numpy(inverse).to(scores.device)]).argmax(dim=-1)


def uniforms(seeds: Keys, positions: Keys, num: int, *, device: torch.device | str, stream: int = ACCEPT) -> Tensor:
    """Uniform numbers in (0, 1), a fixed number per (seed, position, stream) however many of them are used.

    Returns:
        [R, num] float64: exact multiples of 2^-33, the same on every device.

    Raises:
        ValueError: as in ``gumbel``.
    """
    keys, places = _words_of("seeds", seeds), _words_of("positions", positions)
    _check(keys, places, stream)
    words = bits_torch(keys, places, num, stream, torch.device(device))
    return (words.to(torch.float64) + 0.5) * UNIT


def _words_of(name: str, values: Keys) -> Words:
    """[R, 2] uint32: low and high word of 64-bit numbers."""
    try:
        if isinstance(values, np.ndarray) and values.dtype.kind == "i" and (values < 0).any():
            raise OverflowError
        wide = np.asarray(values, dtype=np.uint64)
    except OverflowError:
        raise ValueError(f"{name} must be in [0, 2**64), got {list(values)}") from None
    return np.stack([wide & np.uint64(MASK), wide >> np.uint64(32)], axis=-1).astype(np.uint32)


def _check(keys: Words, places: Words, stream: int) -> None:
    if keys.shape != places.shape or keys.ndim != 2:
        raise ValueError(f"seeds and positions must be two lists of one length, got {len(keys)} and {len(places)}")
    if not 0 <= stream <= MASK:
        raise ValueError(f"stream must be in [0, 2**32), got {stream}")
