"""The kernels on a GPU, each against the time that reading its input once would take, and against its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.bench.gpu_clock import Clock
from specdec.kernels.kv_commit import kv_commit
from specdec.kernels.node_laws import Law, NodeLaws
from specdec.kernels.top_k import top_k
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_batch import TreeBatch, ancestor_words, path_table
from specdec.kernels.verify import verify_trees
from specdec.prompt_attention import causal_attention

__all__ = ["attention", "attention_batch", "commit", "prefill", "verify"]


def attention_batch(
    num_requests: int, num_nodes: int, context: int, device: torch.device, *, seed: int = 0, reach: int = 6
) -> tuple[TreeBatch, list[Any]]:
    """Requests of one size with random trees, their slots all over the cache.

    A node's parent is one of the ``reach`` nodes before it: with 1 the trees are chains.

    Returns:
        The batch on the device, and each request's ancestor matrix [N, N].
    """
    rng = np.random.default_rng(seed)
    matrices, positions = [], []
    for _ in range(num_requests):
        matrix, depth = np.eye(num_nodes, dtype=np.bool_), np.zeros(num_nodes, dtype=np.int32)
        for node in range(1, num_nodes):
            parent = int(rng.integers(max(0, node - reach), node))
            matrix[node] |= matrix[parent]
            depth[node] = depth[parent] + 1
        matrices.append(matrix)
        positions.append(context + depth)
    longest = max(int(matrix.sum(1).max()) for matrix in matrices)
    on_device: Callable[[Any], Tensor] = lambda x: torch.from_numpy(np.asarray(x, dtype=np.int32)).to(device)  # noqa: E731
    starts = on_device(np.arange(num_requests + 1) * num_nodes)
    num_columns = context + num_nodes
    batch = TreeBatch(
        cu_queries=starts, cu_keys=starts, contexts=on_device([context] * num_requests),
        firsts=on_device([0] * num_requests), rows=on_device(range(num_requests)),
        slots=on_device(rng.permutation(num_requests * num_columns)).view(num_requests, num_columns),
        positions=on_device(np.concatenate(positions)), ancestors=on_device(ancestor_words(matrices)),
        max_columns=num_columns, paths=on_device(path_table(matrices, longest)),
    )  # fmt: skip
    return batch, matrices


def attention(
    clock: Clock,
    *,
    read_gb_per_s: float,
    num_requests: int,
    context: int,
    num_nodes: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    has_peers: bool = True,
) -> dict[str, Any]:
    """Tree attention of one layer against masked SDPA and FlexAttention, whose K and V lie contiguously.

    Args:
        clock: of the device.
        read_gb_per_s: measured bandwidth.
        num_requests: R, each with its own tree.
        context: cached tokens of each.
        num_nodes: N of each tree.
        heads: (query heads, KV heads, width).
        dtype: of Q, K and V.
        has_peers: False: only our own.
    """
    num_heads, num_kv, width = heads
    batch, matrices = attention_batch(num_requests, num_nodes, context, clock.device)
    num_keys = context + num_nodes
    query = torch.randn(num_requests * num_nodes, num_heads, width, device=clock.device, dtype=dtype)
    keys, values = (torch.randn(num_requests * num_keys, num_kv, width, device=clock.device, dtype=dtype) for _ in "kv")
    kind = AttentionKind(scale=width**-0.5)
    row: dict[str, Any] = {"requests": num_requests, "context": context, "nodes": num_nodes}
    num_bytes = keys.nbytes + values.nbytes

    def ours(is_strict: bool = False) -> Tensor:
        return tree_attention(query, keys, values, batch, kind, is_strict=is_strict, backend="triton")

    row["ms"] = clock.median(ours)
    row["share_of_read_bandwidth"] = num_bytes / row["ms"] / 1e6 / read_gb_per_s
    row["strict_ms"] = clock.median(lambda: ours(is_strict=True))
    if has_peers:
        slots = batch.slots.long()
        q = query.unflatten(0, (num_requests, num_nodes)).transpose(1, 2).contiguous()
        k, v = (x[slots].transpose(1, 2).contiguous() for x in (keys, values))  # [R, Hkv, n, D]
        visible = torch.ones(num_requests, 1, num_nodes, num_keys, dtype=torch.bool, device=clock.device)
        visible[..., context:] = torch.from_numpy(np.stack(matrices)).to(clock.device)[:, None]
        for name, peer in _peers(q, k, v, visible, context).items():
            row[name] = _peer_row(clock, peer, ours(), row["ms"])
    return row


def prefill(
    clock: Clock, *, context: int, num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """One layer's attention of a prompt chunk: our kernel in place, against gathering K and V for flash attention.

    The engine makes the same comparison at the first chunk of every shape (``specdec.prompt_attention``).
    """
    num_heads, num_kv, width = heads
    batch, _ = attention_batch(1, num_tokens, context, clock.device, reach=1)
    query = torch.randn(num_tokens, num_heads, width, device=clock.device, dtype=dtype)
    keys, values = (torch.randn(context + num_tokens, num_kv, width, device=clock.device, dtype=dtype) for _ in "kv")
    kind, slots = AttentionKind(scale=width**-0.5), batch.slots[0].long()

    def ours() -> Tensor:
        return tree_attention(query, keys, values, batch, kind, backend="triton")

    def by_torch() -> Tensor:
        return causal_attention(query, keys, values, slots, kind.scale)

    difference = (ours() - by_torch()).abs().max()
    row = {"context": context, "tokens": num_tokens, "max_difference": float(difference)}
    row |= {"ms": clock.median(ours), "torch_ms": clock.median(by_torch)}
    return {**row, "torch_is_faster_by": row["ms"] / row["torch_ms"]}


def _peer_row(clock: Clock, peer: Callable[[], Tensor], ours: Tensor, our_ms: float) -> dict[str, Any]:
    """A peer's time and distance from us; its error where it cannot do this size."""
    try:
        theirs = peer().transpose(1, 2).reshape(ours.shape)
        ms = clock.median(peer)
    except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
        return {"error": str(error).splitlines()[0][:200]}
    return {"ms": ms, "ours_is_faster_by": ms / our_ms, "max_difference": float((ours - theirs).abs().max())}


def _peers(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, context: int) -> dict[str, Callable[[], Tensor]]:
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, float("-inf"))
    found = {"masked_sdpa": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)}
    if q.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        tree = visible[:, 0, :, context:].contiguous()

        def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < context) | tree[b, query, (key - context).clamp_min(0)]

        sizes = (len(q), None, q.shape[2], k.shape[2])
        block_mask = create_block_mask(rule, *sizes, device=str(q.device))
        flex = torch.compile(flex_attention)
        found["flex_attention"] = lambda: flex(q, k, v, block_mask=block_mask, enable_gqa=True)
    return found


def verify(
    clock: Clock, *, read_gb_per_s: float, num_trees: int, num_nodes: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Verification of a batch of trees, and top-k of the same logits, against reading the logits once."""
    device = clock.device
    num_rows = num_trees * num_nodes
    logits = torch.randn(num_rows, vocab_size, device=device).mul_(2).to(dtype)
    parents = torch.arange(-1, num_nodes - 1, dtype=torch.int32, device=device).repeat(num_trees)
    starts = torch.arange(num_trees + 1, dtype=torch.int32, device=device) * num_nodes
    token_ids = torch.randint(0, vocab_size, (num_rows,), dtype=torch.int32, device=device)
    positions = np.tile(np.arange(num_nodes), num_trees) + 2000
    seen = torch.arange(vocab_size, device=device) % 7 == 0
    kinds = {
        "greedy": Law(),
        "sampled": Law(1, temperature=0.8),
        "top-k, top-p": Law(1, temperature=0.8, top_k=min(20, vocab_size), tail=0.1),
        "penalties": Law(1, repetition=1.1, seen=seen, frequency=0.2, presence=0.1, counts=seen.float()),
    }
    read_ms = logits.nbytes / read_gb_per_s / 1e6
    row: dict[str, Any] = {"trees": num_trees, "nodes": num_nodes, "vocabulary": vocab_size, "read_ms": read_ms}
    flat_parents = (parents + (starts[:-1].repeat_interleave(num_nodes)) * (parents >= 0)).cpu().numpy()
    for name, law in kinds.items():
        laws = NodeLaws(
            [law] * num_trees, [num_nodes] * num_trees, positions, vocab_size, device,
            token_ids=token_ids.cpu().numpy(), parents=flat_parents,
        )  # fmt: skip
        arguments = (logits, token_ids, parents, starts, laws)
        ms = clock.median(lambda arguments=arguments: verify_trees(*arguments, backend="triton"))  # type: ignore[misc]
        row[name] = {"ms": ms, "times_reading": ms / read_ms}
    ms = clock.median(lambda: top_k(logits, min(16, vocab_size), backend="triton"))
    row["top_16"] = {"ms": ms, "times_reading": ms / read_ms}
    return row


def commit(clock: Clock, *, num_requests: int, num_reserved: int, num_columns: int) -> dict[str, Any]:
    """One edit of all requests' slot tables on the device."""
    device = clock.device
    slots = torch.arange(num_requests * num_columns, dtype=torch.int32, device=device).view(num_requests, num_columns)
    lengths = torch.zeros(num_requests, dtype=torch.int32, device=device)
    kept = (torch.arange(num_requests * num_reserved, device=device) % 3 == 0).to(torch.int8)
    starts = torch.arange(num_requests + 1, dtype=torch.int32, device=device) * num_reserved

    def edit() -> None:
        lengths.zero_()
        kv_commit(slots, lengths, kept, starts, max_reserved=num_reserved, backend="triton")

    return {"requests": num_requests, "reserved": num_reserved, "us": 1e3 * clock.median(edit)}
