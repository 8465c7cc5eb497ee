"""Every kernel, interpreted on the CPU, against its definition in float64 (or exactly, where it computes integers).

bfloat16 is left out: Triton's interpreter does not compute in it. Tolerances are measured, not guessed: twice the error
of the torch reference in the same precision, plus ``ATOL``, a few roundings of numbers near 1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.kernels.distillation import LOSSES, distillation_loss, distillation_loss_reference
from specdec.kernels.kv_commit import kv_commit, kv_commit_reference
from specdec.kernels.launch import uses_triton
from specdec.kernels.top_k import top_k, top_k_reference
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.tree_batch import TreeBatch, ancestor_words
from specdec.kernels.verify import verify_trees
from specdec.rng import gumbel
from specdec.verifier.match import match_walk
from tests.oracles import random_tree

ATOL = {torch.float32: 2e-6, torch.float16: 2e-3}


def make_batch(sizes, contexts, *, num_slots: int, firsts=None, seed: int = 0) -> TreeBatch:
    """Random trees behind contexts whose slots are scattered; slots beyond a request's keys point outside the cache."""
    rng = np.random.default_rng(seed)
    matrices, positions = [], []
    firsts = firsts or [0] * len(sizes)
    for size, context, first in zip(sizes, contexts, firsts, strict=True):
        matrix, depth = np.eye(size, dtype=np.bool_), np.zeros(size, dtype=np.int32)
        for node in range(1, size):
            parent = int(rng.integers(max(0, node - 6), node))
            matrix[node] |= matrix[parent]
            depth[node] = depth[parent] + 1
        matrices.append(matrix)
        positions.append(first + context + depth)
    free = rng.permutation(num_slots)
    longest = max(size + context for size, context in zip(sizes, contexts, strict=True)) + 3
    slots = np.full((len(sizes), longest), 2**30, dtype=np.int32)
    for row, (size, context) in enumerate(zip(sizes, contexts, strict=True)):
        slots[row, : size + context], free = free[: size + context], free[size + context :]
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    return TreeBatch(
        cu_queries=as_tensor([0, *np.cumsum(sizes).tolist()]),
        contexts=as_tensor(contexts),
        firsts=as_tensor(firsts),
        slots=torch.from_numpy(slots),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int32)),
        ancestors=ancestor_words(matrices),
        lengths=tuple(zip(sizes, contexts, strict=True)),
    )


# dtype, (Hq, Hkv, D, Dv), rules, sinks, sizes, contexts, first cached positions
ATTENTION = {
    "one node": (torch.float32, (4, 2, 64, 64), {}, False, [1], [0], None),
    "one block and one": (torch.float32, (8, 2, 64, 64), {}, False, [1, 33], [32, 64], None),
    "seven heads per KV head": (torch.float32, (14, 2, 64, 64), {}, False, [3, 20], [40, 3], None),
    "window smaller than the tree": (torch.float32, (8, 8, 80, 80), {"window": 5}, False, [9, 40], [90, 3], None),
    "window that forgot": (torch.float32, (4, 2, 32, 32), {"window": 9}, False, [6, 12], [20, 9], [37, 0]),
    "chunks": (torch.float32, (4, 2, 32, 32), {"chunk": 8}, False, [9, 30], [21, 3], None),
    "soft-cap": (torch.float32, (8, 1, 32, 32), {"softcap": 3.0, "window": 7}, False, [12, 40], [50, 3], None),
    "sinks": (torch.float32, (8, 4, 64, 64), {"window": 16}, True, [12, 4], [50, 3], None),
    "values narrower than keys": (torch.float32, (4, 4, 48, 32), {}, False, [12, 4], [50, 3], None),
    "wide heads": (torch.float32, (2, 1, 256, 256), {}, False, [5], [40], None),
    "half precision": (torch.float16, (8, 2, 128, 128), {}, False, [1, 33], [70, 30], None),
    "a large tree": (torch.float16, (4, 2, 64, 64), {}, False, [200], [65], None),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_tree_attention_is_as_near_to_float64_as_torch(name):
    dtype, (num_heads, num_kv, width, value_width), rules, has_sinks, sizes, contexts, firsts = ATTENTION[name]
    kind = AttentionKind(scale=width**-0.5, **rules)
    batch = make_batch(sizes, contexts, num_slots=400, firsts=firsts)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sum(sizes), num_heads, width, generator=generator).to(dtype)
    keys, values = (torch.randn(400, num_kv, w, generator=generator).to(dtype) for w in (width, value_width))
    used = torch.cat([batch.slots[r, : sum(pair)] for r, pair in enumerate(batch.lengths)]).long()
    unused = torch.ones(400, dtype=torch.bool).index_fill_(0, used, False)
    keys[unused], values[unused] = float("nan"), float("nan")  # a slot of nobody's must never be read
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    exact = tree_attention_reference(
        query.double(), keys.double(), values.double(), batch, kind, None if sinks is None else sinks.double()
    )
    for num_splits in (1, 3):
        got = tree_attention(query, keys, values, batch, kind, sinks=sinks, num_splits=num_splits, backend="triton")
        torch_error = (tree_attention_reference(query, keys, values, batch, kind, sinks).double() - exact).abs().max()
        assert (got.double() - exact).abs().max() <= 2 * torch_error + ATOL[dtype]


def test_the_float64_definition_is_a_softmax_over_each_path():
    batch = make_batch([7], [5], num_slots=12)
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(n, 2, 8, generator=generator, dtype=torch.float64) for n in (7, 12, 12))
    out = tree_attention_reference(query, keys, values, batch, AttentionKind(scale=0.3))
    for node in range(7):
        path = [i for i in range(7) if (int(batch.ancestors[node, 0]) >> i) & 1]
        slots = batch.slots[0, [*range(5), *(5 + i for i in path)]].long()
        weights = torch.einsum("hd,nhd->hn", query[node], keys[slots]).mul(0.3).softmax(-1)
        torch.testing.assert_close(out[node], torch.einsum("hn,nhd->hd", weights, values[slots]))


def test_what_attention_would_read_wrongly_is_refused():
    batch = make_batch([3], [4], num_slots=9)
    query, keys = torch.zeros(3, 4, 16), torch.zeros(9, 2, 16)
    kind = AttentionKind(scale=1.0)
    cases = [
        ((query[:2], keys, keys, batch, kind), r"query must have shape \(3, any, any\), got \(2, 4, 16\)"),
        ((query, keys[:, :, :8], keys, batch, kind), r"keys must have shape \(any, any, 16\)"),
        ((query, keys.half(), keys, batch, kind), r"keys must be torch\.float32, got torch\.float16"),
        ((query, keys, keys[:, :1], batch, kind), r"values must have shape \(9, 2, any\)"),
        ((query[:, :3], keys, keys, batch, kind), "multiple of the KV heads, got 3 and 2"),
        ((torch.zeros(3, 16, 4).transpose(1, 2), keys, keys, batch, kind), "query must be contiguous in its last"),
        ((query, keys, keys, batch, AttentionKind(scale=1.0, window=2, chunk=2)), "not both window and chunk"),
        ((query, keys[:5], keys[:5], batch, kind), r"slots must be in \[0, 5\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            tree_attention(*arguments, backend="triton")
    with pytest.raises(ValueError, match=r"ancestors must be int32 of shape \(3, 1\)"):
        TreeBatch(batch.cu_queries, batch.contexts, batch.firsts, batch.slots, batch.positions,
                  batch.ancestors.repeat(1, 2), batch.lengths)  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "sizes"), [(5, [1]), (1000, [1, 4, 30]), (1031, [7, 1]), (17001, [3, 9])])
def test_verification_draws_the_engine_s_tokens_and_walks_as_the_engine_does(vocab_size, sizes):
    rng = np.random.default_rng(vocab_size)
    trees = [random_tree(rng, vocab_size, size - 1) for size in sizes]
    cu_nodes = np.cumsum([0, *map(len, trees)]).astype(np.int32)
    num_nodes = int(cu_nodes[-1])
    logits = torch.from_numpy(rng.standard_normal((num_nodes, vocab_size)).astype(np.float32)) * 3
    logits[rng.integers(0, num_nodes), : vocab_size // 2] = float("-inf")
    temperatures = torch.from_numpy(np.repeat(rng.choice([0.0, 0.7, 1.0], len(trees)), np.diff(cu_nodes))).float()
    seeds = np.repeat(rng.integers(0, 2**64, len(trees), dtype=np.uint64), np.diff(cu_nodes))
    positions = rng.integers(0, 2**40, num_nodes)
    scores = logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    noise = gumbel(seeds, positions, vocab_size, device="cpu")
    wanted = torch.where(temperatures[:, None] > 0, scores + noise, scores).argmax(-1).int().numpy()
    token_ids = np.concatenate([tree.token_ids for tree in trees])
    parents = np.concatenate([tree.parents for tree in trees])
    for node in range(num_nodes):  # make acceptance likely
        if parents[node] >= 0 and rng.random() < 0.6:
            tree = int(np.searchsorted(cu_nodes, node, side="right")) - 1
            token_ids[node] = wanted[cu_nodes[tree] + parents[node]]
    nodes, cu_accepted, bonus = match_walk(wanted, token_ids, parents, cu_nodes)
    kept = np.zeros(num_nodes, dtype=np.int8)
    for tree, first in enumerate(cu_nodes[:-1]):
        kept[first + np.array([0, *nodes[cu_accepted[tree] : cu_accepted[tree + 1]]])] = 1
    for backend in ("triton", "torch"):
        got = verify_trees(
            logits, torch.from_numpy(token_ids), torch.from_numpy(parents), torch.from_numpy(cu_nodes), temperatures,
            torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions), backend=backend,
        )  # fmt: skip
        for have, want in zip(got, (wanted, kept, np.diff(cu_accepted), bonus), strict=True):
            assert np.array_equal(have.numpy(), want), backend


def test_the_first_of_equal_logits_wins_across_blocks():
    logits = torch.zeros(1, 20000)
    logits[0, [9000, 1500, 17000]] = 2.0
    one = torch.zeros(1, dtype=torch.int32)
    arguments = (one, one - 1, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1), one.long(), one.long())
    assert verify_trees(logits, *arguments, backend="triton")[0].tolist() == [1500]


@pytest.mark.parametrize("counts", [[1], [3, 0, 17], [32, 1], [200]])
def test_committing_moves_kept_slots_to_the_front_and_loses_none(counts):
    rng = np.random.default_rng(len(counts))
    lengths = torch.tensor(rng.integers(0, 40, len(counts)), dtype=torch.int32)
    slots = torch.from_numpy(rng.permutation(len(counts) * 300).astype(np.int32).reshape(len(counts), 300))
    kept = torch.from_numpy((rng.random(sum(counts)) < 0.4).astype(np.int8))
    cu_reserved = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    expected = slots.clone(), lengths.clone()
    kv_commit_reference(*expected, kept, cu_reserved)
    before = slots.clone()
    kv_commit(slots, lengths, kept, cu_reserved, max_reserved=max(counts), backend="triton")
    assert torch.equal(slots, expected[0])
    assert torch.equal(lengths, expected[1])
    assert torch.equal(slots.sort(dim=1).values, before.sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (5, 5), (1000, 8), (4097, 3), (9001, 20)])
def test_top_k_finds_what_a_stable_sort_finds(vocab_size, k, dtype):
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(k)).mul(4).to(dtype)
    logits[1] = logits[1].round()  # many equal ones
    logits[2, vocab_size // 3 :] = float("-inf") if vocab_size > 5 else 1.0
    ids, log_probs = top_k(logits, k, backend="triton")
    exact_ids, exact = top_k_reference(logits.double(), k)
    possible = exact > float("-inf")
    assert torch.equal(ids[possible], exact_ids[possible])
    torch.testing.assert_close(log_probs.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocab_size", [2, 1000, 4097])
def test_distillation_losses_and_gradients(loss, vocab_size, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    student = torch.randn(3, vocab_size, generator=generator).mul(3).to(dtype)
    teacher = torch.randn(3, vocab_size, generator=generator).mul(3).to(dtype)
    teacher[0] = student[0] if loss != "total_variation" else teacher[0]
    weights = torch.tensor([1.0, -2.0, 0.5])
    found = []
    for run, wide in (
        (lambda s, t: distillation_loss(s, t, loss, backend="triton"), dtype),
        (lambda s, t: distillation_loss_reference(s, t, loss), torch.float64),
    ):
        inputs = student.detach().clone().to(wide).detach().requires_grad_()
        losses = run(inputs, teacher.to(wide))
        (losses * weights.to(losses.dtype)).sum().backward()
        found.append((losses.detach().double(), inputs.grad.double()))
    (losses, gradient), (exact_losses, exact_gradient) = found
    torch.testing.assert_close(losses, exact_losses, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(
        gradient, exact_gradient, rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=ATOL[dtype]
    )


def test_a_device_without_triton_says_so_once_or_raises_if_asked_by_name(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not uses_triton("auto", torch.device("cpu"))
    assert not caplog.records
    for _ in range(2):
        assert not uses_triton("auto", torch.device("meta"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(RuntimeError, match="asked for by name, but it cannot run on cpu"):
        uses_triton("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="backend must be auto, triton or torch, got 'cuda'"):
        uses_triton("cuda", torch.device("cpu"))
