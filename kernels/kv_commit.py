"""Accepting paths of draft trees as an edit of slot tables: kept slots move to the front, no K/V is copied.

With page size 1 a request's reserved slots stand behind its cached ones in its row of the table. After verification the
kept nodes' slots come first, in order, and those of rejected nodes last, where the next step finds them free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton

__all__ = ["MAX_RESERVED", "kv_commit", "kv_commit_reference"]

MAX_RESERVED = 1024  # reserved slots of one request: one program holds them all


@on_own_device
def kv_commit(
    slots: Tensor, lengths: Tensor, kept: Tensor, cu_reserved: Tensor, *, max_reserved: int, backend: Backend = "auto"
) -> None:
    """Keep some reserved slots of every request; ``slots`` and ``lengths`` change in place.

    For every request r and its reserved slots i, in order: a kept one goes to place ``lengths[r] + (kept before i)`` of
    row r, a dropped one behind all kept ones; then ``lengths[r] += number kept``.

    Args:
        slots: [R, L] int32: cached slots, then reserved ones.
        lengths: [R] int32: how many are cached.
        kept: [N] int8: 1 for every reserved slot that stays, request after request.
        cu_reserved: [R + 1] int32 with a leading zero: request r reserved ``cu_reserved[r]`` to ``cu_reserved[r + 1]``.
        max_reserved: at least the largest number that one request reserved; a bound that needs no synchronisation.
        backend: see ``uses_triton``.

    Raises:
        ValueError: a tensor has another shape, dtype or device, or ``max_reserved`` is outside [1, MAX_RESERVED].
    """
    device, num_requests = slots.device, slots.shape[0]
    check_tensor("slots", slots, (None, None), (torch.int32,), device)
    check_tensor("lengths", lengths, (num_requests,), (torch.int32,), device)
    check_tensor("kept", kept, (None,), (torch.int8,), device)
    check_tensor("cu_reserved", cu_reserved, (num_requests + 1,), (torch.int32,), device)
    if not 1 <= max_reserved <= min(MAX_RESERVED, slots.shape[1]):
        raise ValueError(f"max_reserved must be in [1, {min(MAX_RESERVED, slots.shape[1])}], got {max_reserved}")
    if not uses_triton(backend, device):
        kv_commit_reference(slots, lengths, kept, cu_reserved)
    elif num_requests:
        block = triton.next_power_of_2(max_reserved)
        _kv_commit[(num_requests,)](slots, lengths, kept, cu_reserved, slots.stride(0), BLOCK=block, num_warps=4)


def kv_commit_reference(slots: Tensor, lengths: Tensor, kept: Tensor, cu_reserved: Tensor) -> None:
    """The same, request by request."""
    starts = cu_reserved.tolist()
    for row, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        stays = kept[first:last].bool()
        begin = int(lengths[row])
        own = slots[row, begin : begin + last - first].clone()
        slots[row, begin : begin + last - first] = torch.cat((own[stays], own[~stays]))
        lengths[row] += int(stays.sum())


@triton.jit  # type: ignore[untyped-decorator]
def _kv_commit(Slots, Lengths, Kept, CuReserved, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    first = tl.load(CuReserved + row)
    count = tl.load(CuReserved + row + 1) - first
    length = tl.load(Lengths + row)
    i = tl.arange(0, BLOCK)
    live = i < count
    own = Slots + row.to(tl.int64) * stride + length + i
    slot = tl.load(own, mask=live, other=0)
    kept = tl.load(Kept + first + i, mask=live, other=0).to(tl.int32)
    num_kept = tl.sum(kept, 0)
    before = tl.cumsum(kept, 0) - kept
    target = tl.where(kept != 0, before, num_kept + i - before)
    tl.debug_barrier()  # every slot is in a register before the first one is overwritten
    tl.store(Slots + row.to(tl.int64) * stride + length + target, slot, mask=live)
    tl.store(Lengths + row, length + num_kept)
