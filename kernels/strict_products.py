"""Matrix products and row means whose rows have the same bits however many rows there are.

A library chooses its tiles and how it splits the sum by the number of rows. Here both follow from the weight's shape
alone: one tile height, the sum in one order, no split. At up to ``ROWS`` rows the weight is read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton

__all__ = ["ROWS", "strict_matmul", "strict_mean"]

ROWS = 64  # of a tile
_BLOCK = 1024  # terms of a mean that are added at a time
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@on_own_device
def strict_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """``x @ weight.T + bias``, a row's bits depending on that row, the weight and the bias only.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        weight: [N, K], in any memory order; same dtype.
        bias: [N], same dtype.
        backend: see ``uses_triton``; torch's product makes no such promise.

    Returns:
        [M, N] in the same dtype, summed in float32.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_tensor("x", x, (None, None), _FLOATS, x.device)
    num_rows, width = x.shape
    if weight.shape[1:] != (width,) or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be [any, {width}] {x.dtype} on {x.device}, got {tuple(weight.shape)} {weight.dtype} on "
            f"{weight.device}"
        )
    num_columns = len(weight)
    if bias is not None:
        check_tensor("bias", bias, (num_columns,), (x.dtype,), x.device)
    if not uses_triton(backend, x.device):
        return torch.nn.functional.linear(x, weight, bias)
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    if out.numel():
        shape = _tiling(num_columns, width, x.dtype)
        _matmul[(triton.cdiv(num_columns, shape["BN"]), triton.cdiv(num_rows, ROWS))](
            x, weight, x if bias is None else bias, out, num_rows, num_columns, width,
            x.stride(0), weight.stride(0), weight.stride(1), BIAS=bias is not None, **shape,
        )  # fmt: skip
    return out


def _tiling(num_columns: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes and launch options, by the weight alone."""
    exact = dtype == torch.float32
    block = 32 if exact else 64
    return {
        "BM": ROWS,
        # Narrow tiles where wide ones would leave multiprocessors without work.
        "BN": 32 if num_columns <= 8192 else 64,
        "BK": min(block, max(16, triton.next_power_of_2(width))),
        "PRECISION": "tf32x3" if exact and torch.version.hip is None else "ieee",
        "num_warps": 4,
        "num_stages": 2 if exact else 4,
    }


@on_own_device
def strict_mean(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The mean over the last dimension, a row's bits depending on that row only.

    Args:
        x: [..., N] float32, bfloat16 or float16, N >= 1.
        backend: as in ``strict_matmul``.

    Returns:
        [...] in the same dtype, summed in float32.

    Raises:
        ValueError: the shape or dtype does not fit.
    """
    if x.shape[-1] < 1:
        raise ValueError("the mean of nothing is not defined")
    rows = x.reshape(-1, x.shape[-1])
    check_tensor("x", rows, (None, None), _FLOATS, x.device)
    if not uses_triton(backend, x.device):
        return x.mean(-1)
    out = torch.empty(len(rows), dtype=x.dtype, device=x.device)
    if len(rows):
        _mean[(len(rows),)](rows, out, rows.shape[1], rows.stride(0), BLOCK=_BLOCK, num_warps=4)
    return out.view(x.shape[:-1])


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _matmul(  # type: ignore[no-untyped-def]
    X, W, Bias, Out, num_rows, num_columns, width, stride_x, stride_n, stride_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    inside_m, inside_n = m < num_rows, n < num_columns
    x_at = X + m.to(tl.int64)[:, None] * stride_x
    w_at = W + n.to(tl.int64)[None, :] * stride_n
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width, BK):
        inside_k = start + k < width
        x = tl.load(x_at + (start + k)[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        w = tl.load(w_at + (start + k)[:, None] * stride_k, mask=inside_k[:, None] & inside_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(Bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out = Out + m.to(tl.int64)[:, None] * num_columns + n[None, :]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _mean(X, Out, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        total += tl.load(X + row.to(tl.int64) * stride + start + i, mask=start + i < width, other=0.0).to(tl.float32)
    tl.store(Out + row, (tl.sum(total, 0) / width).to(Out.dtype.element_ty))
