"""The match rule on the device: the target's token at every node of every tree, and the path that it confirms.

Whatever the batch, one launch goes over the logits once and draws every node's token: the argmax of the processed
scores plus the noise of ``specdec.rng``, bit for bit, or of the scores alone where a request is greedy. A second launch
merges, a third walks. Where a request truncates (top-k, top-p, min-p), two more look at its rows before and after; see
``specdec.kernels.truncation``. Nothing of size [T, V] is written, nothing goes to the host.

Which processors are fused is said in ``specdec.kernels.node_laws``; others are applied to the logits before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.keyed_noise import add_noise, noise_reference
from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton
from specdec.kernels.node_laws import NUM_FIELDS, NodeLaws, scores_reference
from specdec.kernels.node_scores import node_scores
from specdec.kernels.truncation import find_floors, keep_in_nucleus

__all__ = ["draw_tokens", "draw_tokens_reference", "verify_trees", "verify_trees_reference"]

_SPLIT = 8192  # logits of one program
_BLOCK = 1024
_ROW_BLOCK = 4096  # of the kernels with one program for a row; at least MAX_TOP_K
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NEVER = tl.constexpr(2147483647)
_FIELDS = tl.constexpr(NUM_FIELDS)


@on_own_device
def draw_tokens(logits: Tensor, laws: NodeLaws, *, backend: Backend = "auto") -> Tensor:
    """The target's token after every node, with the bits of ``specdec.rng.gumbel_argmax``.

    Args:
        logits: [L, V]: ``laws`` says which row is the law of the token after which node.
        laws: of T nodes.
        backend: see ``uses_triton``.

    Returns:
        [T] int32; the first of equal scores.

    Raises:
        ValueError: a shape, dtype or device breaks its rule.
    """
    device, num_nodes, vocab_size = logits.device, laws.num_nodes, laws.vocab_size
    check_tensor("logits", logits, (None, vocab_size), _FLOATS, device)
    check_tensor("laws", laws.nodes, (6, num_nodes), (torch.int64,), device)
    if not uses_triton(backend, device):
        return draw_tokens_reference(logits, laws)
    splits = triton.cdiv(vocab_size, _SPLIT)
    best = torch.empty(num_nodes, splits, dtype=torch.float32, device=device)
    where = torch.empty(num_nodes, splits, dtype=torch.int32, device=device)
    target_ids = torch.empty(num_nodes, dtype=torch.int32, device=device)
    if not num_nodes:
        return target_ids
    tables = logits, laws.nodes, laws.numbers, laws.addresses
    shape = num_nodes, vocab_size, logits.stride(0)
    # Without fused multiply-add: noise and penalties must have the same bits everywhere.
    flags = {"TABLES": laws.has_tables, "RECIPROCAL": _multiplies(device), "enable_fp_fusion": False}
    floors = torch.empty(3 if laws.truncates else 0, num_nodes, dtype=torch.float32, device=device)
    totals = torch.empty(num_nodes if laws.has_tails else 0, dtype=torch.int64, device=device)
    if laws.truncates:
        find_floors[(num_nodes,)](*tables, floors, totals, *shape, BLOCK=_ROW_BLOCK, num_warps=8, **flags)
    _draw[(num_nodes, splits)](
        *tables, floors, best, where, *shape, splits,
        SPLIT=_SPLIT, BLOCK=_BLOCK, FLOORS=laws.truncates, num_warps=4, **flags,
    )  # fmt: skip
    _reduce[(num_nodes,)](best, where, target_ids, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    if laws.has_tails:
        keep_in_nucleus[(num_nodes,)](
            *tables, floors, totals, target_ids, *shape, BLOCK=_ROW_BLOCK, num_warps=8, **flags
        )
    return target_ids


def _multiplies(device: torch.device) -> bool:
    """On CUDA torch divides by a number as it multiplies by its reciprocal; see ``processors.base.divide_``."""
    return device.type == "cuda"


def draw_tokens_reference(logits: Tensor, laws: NodeLaws) -> Tensor:
    """The same in torch: all scores and all noise at once."""
    scores, is_drawn = scores_reference(logits, laws, multiplies=_multiplies(logits.device))
    noise = noise_reference(laws.nodes[1], laws.nodes[2], laws.vocab_size)
    return torch.where(is_drawn[:, None], scores + noise, scores).argmax(-1).to(torch.int32)


@on_own_device
def verify_trees(
    logits: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, laws: NodeLaws, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the target's token at every node and keep of each tree the path that it confirms.

    Args:
        logits: [T, V]: row i is the law of the token after node i.
        token_ids: [T] int32: the trees one after the other, root first.
        parents: [T] int32: within the node's own tree, less than the node's own index; -1 for roots.
        cu_nodes: [R + 1] int32 with a leading zero.
        laws: of the T nodes.
        backend: see ``uses_triton``.

    Returns:
        target_ids [T] int32; kept [T] int8: 1 for roots and accepted nodes; num_accepted and bonus_ids [R] int32.

    Raises:
        ValueError: a shape, dtype or device breaks its rule.
    """
    device = logits.device
    num_nodes = laws.num_nodes
    for name, tensor in (("token_ids", token_ids), ("parents", parents)):
        check_tensor(name, tensor, (num_nodes,), (torch.int32,), device)
    check_tensor("cu_nodes", cu_nodes, (None,), (torch.int32,), device)
    if not uses_triton(backend, device):
        return verify_trees_reference(logits, token_ids, parents, cu_nodes, laws)
    target_ids = draw_tokens(logits, laws, backend=backend)
    num_trees = len(cu_nodes) - 1
    kept = torch.zeros(num_nodes, dtype=torch.int8, device=device)
    num_accepted, bonus_ids = (torch.empty(num_trees, dtype=torch.int32, device=device) for _ in range(2))
    if num_nodes:
        _walk[(num_trees,)](target_ids, token_ids, parents, cu_nodes, kept, num_accepted, bonus_ids, num_warps=1)
    return target_ids, kept, num_accepted, bonus_ids


def verify_trees_reference(
    logits: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, laws: NodeLaws
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in torch, with a walk on the host."""
    target_ids = draw_tokens_reference(logits, laws)
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


@triton.jit(do_not_specialize=["num_nodes"])  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    Logits, Nodes, Numbers, Addresses, Floors, Best, Where, num_nodes, vocab_size, stride, splits,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, TABLES: tl.constexpr, FLOORS: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    node, split = tl.program_id(0), tl.program_id(1)
    law = tl.load(Nodes + 3 * num_nodes + node)
    is_sampled = tl.load(Numbers + law * _FIELDS + 1) > 0
    seed, position = tl.load(Nodes + num_nodes + node), tl.load(Nodes + 2 * num_nodes + node)
    best = tl.full([], float("-inf"), tl.float32)
    winner = tl.full([], _NEVER, tl.int32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocab_size), BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = node_scores(
            Logits, Nodes, Numbers, Addresses, node, start, num_nodes, vocab_size, stride, BLOCK, TABLES, RECIPROCAL
        )
        if FLOORS:
            x = tl.where(x < tl.load(Floors + num_nodes + node), float("-inf"), x)
        if is_sampled:
            x = add_noise(x, seed, position, start, best, BLOCK)
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
