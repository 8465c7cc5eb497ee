"""The engine's Gumbel noise, keyed by (seed, position), in Triton and in torch: the bits of ``specdec.rng.gumbel``."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.philox import UNIT, log_torch, philox_torch

__all__ = ["add_noise", "noise_reference"]

# As in specdec.philox: an upper bound of the noise from the leading bits of its word.
_BOUND_SLOPE = tl.constexpr(math.log(2) * 2.0**-23)
_BOUND_OFFSET = tl.constexpr(math.log(2) * (32 + 127) + 1e-3)
_UNIT = tl.constexpr(UNIT)
_SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e42fee00000p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))


def noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[T, V] float32: ``specdec.rng.gumbel`` of keys [T] int64 that lie on the device."""
    mask = 0xFFFFFFFF
    block = torch.arange((vocab_size + 3) // 4, device=seeds.device)[None]
    key = (seeds[:, None] & mask, (seeds[:, None] >> 32) & mask)
    counter = (block, torch.zeros_like(block), positions[:, None] & mask, (positions[:, None] >> 32) & mask)
    shape = (len(seeds), block.shape[1])
    words = torch.stack([word.expand(shape) for word in philox_torch(counter, key)], dim=-1).flatten(1)[:, :vocab_size]
    return log_torch(log_torch(1.0 - (words.to(torch.float64) + 0.5) * UNIT).neg_()).neg_().float()


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """specdec.philox.log, the same operations in the same order."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    f = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = z * (2 / 21) + 2 / 19
    series = series * z + 2 / 17
    series = series * z + 2 / 15
    series = series * z + 2 / 13
    series = series * z + 2 / 11
    series = series * z + 2 / 9
    series = series * z + 2 / 7
    series = series * z + 2 / 5
    series = series * z + 2 / 3
    series = series * z
    half_square = f * 0.5 * f
    k = exponent.to(tl.float64)
    return k * _LN2_HIGH - ((half_square - (s * (half_square + series) + k * _LN2_LOW)) - f)


@triton.jit  # type: ignore[untyped-decorator]
def add_noise(x, seed, position, start, best, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores [BLOCK] of the tokens from ``start`` on, plus noise; all -inf where none of them could reach ``best``.

    The logarithms are in float64, so they are computed only for a block whose bound could still win.
    """
    place_0 = (position & 0xFFFFFFFF).to(tl.uint32)
    place_1 = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    group = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, zero, zero + place_0, zero + place_1)
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    lead = word.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    bound = x + (_BOUND_OFFSET - _BOUND_SLOPE * lead)
    if tl.max(bound, 0) >= best:
        unit = 1.0 - (word.to(tl.float64) + 0.5) * _UNIT
        x = x + (-_log(-_log(unit))).to(tl.float32)
    else:
        x = tl.full([BLOCK], float("-inf"), tl.float32)
    return x
