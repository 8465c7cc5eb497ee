"""The k most probable tokens of every row with their log-probabilities, for growing draft trees.

Two launches: blocks of the vocabulary each find their own k best and their share of the softmax's sum, then one program
per row merges them. The logits are read once and nothing of size [T, V] is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton

__all__ = ["MAX_K", "top_k", "top_k_reference"]

MAX_K = 64
_BLOCK = 4096


@on_own_device
def top_k(logits: Tensor, k: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The largest logits of every row.

    Args:
        logits: [T, V] float32, bfloat16 or float16.
        k: in [1, min(V, MAX_K)].
        backend: see ``uses_triton``.

    Returns:
        ids [T, k] int64, largest logit first, smaller id first among equals; log-probabilities [T, k] float32.

    Raises:
        ValueError: a shape, dtype or k breaks its rule.
    """
    check_tensor("logits", logits, (None, None), (torch.float32, torch.bfloat16, torch.float16), logits.device)
    num_rows, vocab_size = logits.shape
    if not 1 <= k <= min(vocab_size, MAX_K):
        raise ValueError(f"k must be in [1, {min(vocab_size, MAX_K)}], got {k}")
    if not uses_triton(backend, logits.device):
        return top_k_reference(logits, k)
    splits = triton.cdiv(vocab_size, _BLOCK)
    width = triton.next_power_of_2(k)
    device = logits.device
    values = torch.empty(num_rows, splits, width, dtype=torch.float32, device=device)
    tokens = torch.empty(num_rows, splits, width, dtype=torch.int32, device=device)
    sums = torch.empty(num_rows, splits, 2, dtype=torch.float32, device=device)
    ids = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    log_probs = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    if num_rows:
        block = min(_BLOCK, max(triton.next_power_of_2(vocab_size), 16))
        _block_top_k[(num_rows, splits)](
            logits, values, tokens, sums, vocab_size, logits.stride(0), splits, K=width, BLOCK=block, num_warps=8
        )
        _merge_top_k[(num_rows,)](
            values, tokens, sums, ids, log_probs, splits, k,
            K=width, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return ids, log_probs


def top_k_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    ids = wide.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return ids, wide.log_softmax(-1).gather(1, ids)


@triton.jit  # type: ignore[untyped-decorator]
def _block_top_k(  # type: ignore[no-untyped-def]
    Logits, Values, Tokens, Sums, vocab_size, stride, splits, K: tl.constexpr, BLOCK: tl.constexpr
):
    row, split = tl.program_id(0), tl.program_id(1)
    v = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(Logits + row.to(tl.int64) * stride + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    tl.store(Sums + (row * splits + split) * 2, top)
    tl.store(Sums + (row * splits + split) * 2 + 1, tl.sum(tl.exp(x - finite), 0))
    out = (row * splits + split) * K
    used = v >= vocab_size
    for i in range(K):
        # A used entry ranks below an unused one of -inf: rows may have less than k possible tokens.
        rank = tl.where(used, float("-inf"), x)
        best = tl.max(rank, 0)
        place = tl.min(tl.where((rank == best) & (used == 0), v, 2147483647), 0)
        tl.store(Values + out + i, best)
        tl.store(Tokens + out + i, place)
        used = used | (v == place)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_top_k(  # type: ignore[no-untyped-def]
    Values, Tokens, Sums, Ids, LogProbs, splits, k, K: tl.constexpr, SPLITS: tl.constexpr
):
    row = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    live = s < splits
    tops = tl.load(Sums + (row * splits + s) * 2, mask=live, other=float("-inf"))
    shares = tl.load(Sums + (row * splits + s) * 2 + 1, mask=live, other=0.0)
    top = tl.max(tops, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = finite + tl.log(tl.sum(shares * tl.exp(tops - finite), 0))
    c = tl.arange(0, SPLITS * K)
    inside = c < splits * K
    x = tl.load(Values + row * splits * K + c, mask=inside, other=float("-inf"))
    token = tl.load(Tokens + row * splits * K + c, mask=inside, other=2147483647)
    for i in range(k):
        best = tl.max(tl.where(token == 2147483647, float("-inf"), x), 0)
        winner = tl.min(tl.where((x == best) & (token != 2147483647), token, 2147483647), 0)
        tl.store(Ids + row * k + i, winner.to(tl.int64))
        tl.store(LogProbs + row * k + i, best - total)
        token = tl.where(token == winner, 2147483647, token)
