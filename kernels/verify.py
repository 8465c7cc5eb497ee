"""The match rule on the device: the target's token at every node of every tree, and the path that it confirms.

Whatever the batch, one launch goes over the logits once and draws every node's token: the argmax of
``logits / temperature + Gumbel noise`` with the noise of ``specdec.rng``, bit for bit, or of the logits where the
temperature is 0. The noise of a block is computed only where a bound of it could still win, as on the CPU: its
logarithms are in float64. A second launch merges, a third walks. Nothing of size [T, V] is written, nothing goes to the
host.

Processors other than the temperature are applied to the logits before.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.launch import Backend, check_tensor, uses_triton
from specdec.philox import UNIT, log_torch, philox_torch

__all__ = ["draw_tokens", "draw_tokens_reference", "verify_trees", "verify_trees_reference"]

_SPLIT = 8192  # logits of one program
_BLOCK = 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# As in specdec.philox: an upper bound of the noise from the leading bits of its word.
_BOUND_SLOPE = tl.constexpr(math.log(2) * 2.0**-23)
_BOUND_OFFSET = tl.constexpr(math.log(2) * (32 + 127) + 1e-3)
_UNIT = tl.constexpr(UNIT)
_SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e42fee00000p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
_NEVER = tl.constexpr(2147483647)


def draw_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """The target's token after every node, with the bits of ``specdec.rng.gumbel_argmax``.

    Args:
        logits: [T, V]: row i is the law of the token after node i.
        temperatures: [T] float32, of each node's request; 0: greedy.
        seeds: [T] int64, of each node's request: the bits of a seed in [0, 2^64).
        positions: [T] int64: absolute position of the token that is drawn after the node.
        backend: see ``uses_triton``.

    Returns:
        [T] int32; the first of equal scores.

    Raises:
        ValueError: a shape, dtype or device breaks its rule.
    """
    device = logits.device
    check_tensor("logits", logits, (None, None), _FLOATS, device)
    num_nodes, vocab_size = logits.shape
    check_tensor("temperatures", temperatures, (num_nodes,), (torch.float32,), device)
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        check_tensor(name, tensor, (num_nodes,), (torch.int64,), device)
    if not uses_triton(backend, device):
        return draw_tokens_reference(logits, temperatures, seeds, positions)
    splits = triton.cdiv(vocab_size, _SPLIT)
    best = torch.empty(num_nodes, splits, dtype=torch.float32, device=device)
    where = torch.empty(num_nodes, splits, dtype=torch.int32, device=device)
    target_ids = torch.empty(num_nodes, dtype=torch.int32, device=device)
    if num_nodes:
        # Without fused multiply-add: the noise must have the same bits everywhere.
        _draw[(num_nodes, splits)](
            logits, temperatures, seeds, positions, best, where, vocab_size, logits.stride(0), splits,
            SPLIT=_SPLIT, BLOCK=_BLOCK, RECIPROCAL=_multiplies(device), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _reduce[(num_nodes,)](best, where, target_ids, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return target_ids


def _multiplies(device: torch.device) -> bool:
    """On CUDA torch divides by a number as it multiplies by its reciprocal; see ``processors.base.divide_``."""
    return device.type == "cuda"


def draw_tokens_reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The same in torch: all noise at once."""
    scores = logits.float()
    sampled = temperatures > 0
    divisor = torch.where(sampled, temperatures, 1.0)[:, None]
    scores = scores * divisor.reciprocal() if _multiplies(logits.device) else scores / divisor
    noise = _noise(seeds, positions, logits.shape[1])
    return torch.where(sampled[:, None], scores + noise, scores).argmax(-1).to(torch.int32)


def verify_trees(
    logits: Tensor,
    token_ids: Tensor,
    parents: Tensor,
    cu_nodes: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the target's token at every node and keep of each tree the path that it confirms.

    Args:
        logits: [T, V]: row i is the law of the token after node i.
        token_ids: [T] int32: the trees one after the other, root first.
        parents: [T] int32: within the node's own tree, less than the node's own index; -1 for roots.
        cu_nodes: [R + 1] int32 with a leading zero.
        temperatures: [T] float32, of each node's request; 0: greedy.
        seeds: [T] int64, of each node's request: the bits of a seed in [0, 2^64).
        positions: [T] int64: absolute position of the token that is drawn after the node.
        backend: see ``uses_triton``.

    Returns:
        target_ids [T] int32; kept [T] int8: 1 for roots and accepted nodes; num_accepted and bonus_ids [R] int32.

    Raises:
        ValueError: a shape, dtype or device breaks its rule.
    """
    device = logits.device
    check_tensor("logits", logits, (None, None), _FLOATS, device)
    num_nodes = len(logits)
    for name, tensor in (("token_ids", token_ids), ("parents", parents)):
        check_tensor(name, tensor, (num_nodes,), (torch.int32,), device)
    check_tensor("cu_nodes", cu_nodes, (None,), (torch.int32,), device)
    if not uses_triton(backend, device):
        return verify_trees_reference(logits, token_ids, parents, cu_nodes, temperatures, seeds, positions)
    target_ids = draw_tokens(logits, temperatures, seeds, positions, backend=backend)
    num_trees = len(cu_nodes) - 1
    kept = torch.zeros(num_nodes, dtype=torch.int8, device=device)
    num_accepted, bonus_ids = (torch.empty(num_trees, dtype=torch.int32, device=device) for _ in range(2))
    if num_nodes:
        _walk[(num_trees,)](target_ids, token_ids, parents, cu_nodes, kept, num_accepted, bonus_ids, num_warps=1)
    return target_ids, kept, num_accepted, bonus_ids


def verify_trees_reference(
    logits: Tensor,
    token_ids: Tensor,
    parents: Tensor,
    cu_nodes: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in torch, with a walk on the host."""
    target_ids = draw_tokens_reference(logits, temperatures, seeds, positions)
    wanted_ids, ids, above = target_ids.tolist(), token_ids.tolist(), parents.tolist()
    kept = torch.zeros(len(ids), dtype=torch.int8)
    counts, bonus = [], []
    starts = cu_nodes.tolist()
    for first, last in zip(starts, starts[1:], strict=False):
        node, count = 0, 0
        kept[first] = 1
        for child in range(1, last - first):
            if above[first + child] == node and ids[first + child] == wanted_ids[first + node]:
                node, count = child, count + 1
                kept[first + child] = 1
        counts.append(count)
        bonus.append(wanted_ids[first + node])
    num_accepted, bonus_ids = (torch.tensor(x, dtype=torch.int32, device=logits.device) for x in (counts, bonus))
    return target_ids, kept.to(logits.device), num_accepted, bonus_ids


def _noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[T, V] float32: ``specdec.rng.gumbel`` of keys that lie on the device."""
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
def _draw(  # type: ignore[no-untyped-def]
    Logits, Temperatures, Seeds, Positions, Best, Where, vocab_size, stride, splits,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    node, split = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(Temperatures + node)
    is_sampled = temperature > 0
    divisor = tl.where(is_sampled, temperature, 1.0)
    seed, position = tl.load(Seeds + node), tl.load(Positions + node)
    place_0 = (position & 0xFFFFFFFF).to(tl.uint32)
    place_1 = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    best = tl.full([], float("-inf"), tl.float32)
    winner = tl.full([], _NEVER, tl.int32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab_size), BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(Logits + node.to(tl.int64) * stride + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
        if RECIPROCAL:  # noqa: SIM108 -- each branch is compiled alone
            x = x * tl.math.div_rn(1.0, divisor)
        else:
            x = tl.math.div_rn(x, tl.zeros_like(x) + divisor)
        if is_sampled:
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
        top = tl.max(x, 0)
        if (top > best) | (winner == _NEVER):
            winner = tl.min(tl.where(x == top, v, _NEVER), 0)
            best = top
    tl.store(Best + node * splits + split, best)
    tl.store(Where + node * splits + split, winner)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(Best, Where, TargetIds, splits, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    node = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    best = tl.load(Best + node * splits + s, mask=s < splits, other=float("-inf"))
    where = tl.load(Where + node * splits + s, mask=s < splits, other=_NEVER)
    tl.store(TargetIds + node, tl.min(tl.where(best == tl.max(best, 0), where, _NEVER), 0))


@triton.jit
def _walk(TargetIds, TokenIds, Parents, CuNodes, Kept, NumAccepted, BonusIds):  # type: ignore[no-untyped-def]
    tree = tl.program_id(0)
    first = tl.load(CuNodes + tree)
    count = tl.load(CuNodes + tree + 1) - first
    node = tl.full([], 0, tl.int32)
    accepted = tl.full([], 0, tl.int32)
    wanted = tl.load(TargetIds + first)
    tl.store(Kept + first, tl.full([], 1, tl.int8))
    for child in range(1, count):  # a child always stands behind its parent, so one pass finds the path
        is_next = (tl.load(Parents + first + child) == node) & (tl.load(TokenIds + first + child) == wanted)
        if is_next:
            node = child
            accepted += 1
            wanted = tl.load(TargetIds + first + child)
            tl.store(Kept + first + child, tl.full([], 1, tl.int8))
    tl.store(NumAccepted + tree, accepted)
    tl.store(BonusIds + tree, wanted)
