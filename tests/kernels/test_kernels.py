"""Every kernel, interpreted on the CPU, against its definition in float64 (or exactly, where it computes integers).

bfloat16 is left out: Triton's interpreter does not compute in it. Tolerances are measured, not guessed: twice the error
of the torch reference in the same precision, plus ``ATOL``, a few roundings of numbers near 1.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specdec.kernels.distillation import distillation_loss
from specdec.kernels.distillation_reference import LOSSES, distillation_loss_reference
from specdec.kernels.kv_commit import kv_commit, kv_commit_reference
from specdec.kernels.launch import on_own_device, uses_triton
from specdec.kernels.top_k import top_k, top_k_reference
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.tree_batch import TreeBatch, ancestor_words

ATOL = {torch.float32: 2e-6, torch.float16: 2e-3}


def make_batch(sizes, contexts, *, num_slots: int, firsts=None, earlier=None, fillers: int = 0, seed: int = 0):
    """Random trees behind contexts whose slots are scattered; all other slots of the table point outside the cache.

    ``earlier`` of each request's tree keys are no queries any more; ``fillers`` are tokens and requests of nobody.
    """
    rng = np.random.default_rng(seed)
    matrices, positions, paths = [], [], []
    firsts, earlier = firsts or [0] * len(sizes), earlier or [0] * len(sizes)
    free = rng.permutation(num_slots)
    num_columns = max(map(sum, zip(sizes, contexts, earlier, strict=True))) + 3
    slots = np.full((len(sizes) + 2, num_columns), 2**30, dtype=np.int32)
    rows = rng.permutation(len(slots))[: len(sizes)]
    for row, size, context, first, old in zip(rows, sizes, contexts, firsts, earlier, strict=True):
        matrix, depth = np.eye(size + old, dtype=np.bool_), np.zeros(size + old, dtype=np.int32)
        for node in range(1, size + old):
            parent = int(rng.integers(max(0, node - 6), node))
            matrix[node] |= matrix[parent]
            depth[node] = depth[parent] + 1
        matrices.append(matrix[old:])
        positions.append(context + depth)
        paths += [np.flatnonzero(line) for line in matrix[old:]]
        count = context + size + old - first
        slots[row, first : first + count], free = free[:count], free[count:]
    keys = [size + old for size, old in zip(sizes, earlier, strict=True)]
    table = np.zeros((sum(sizes) + fillers, max(map(len, paths))), dtype=np.int32)
    for line, path in zip(table, paths, strict=False):
        line[: len(path)] = path
    words = ancestor_words(matrices)

    def padded(values):
        return torch.tensor(np.concatenate([values, np.zeros(fillers)]), dtype=torch.int32)

    def cumulated(counts):
        return torch.tensor([0, *np.cumsum(counts), *[sum(counts)] * fillers], dtype=torch.int32)

    return TreeBatch(
        cu_queries=cumulated(sizes),
        cu_keys=cumulated(keys),
        contexts=padded(contexts),
        firsts=padded(firsts),
        rows=padded(rows),
        slots=torch.from_numpy(slots),
        positions=padded(np.concatenate(positions)),
        ancestors=torch.from_numpy(np.concatenate([words, np.zeros((fillers, words.shape[1]), dtype=np.int32)])),
        max_columns=num_columns,
        paths=torch.from_numpy(table),
    )


def used_slots(batch: TreeBatch) -> torch.Tensor:
    """Every slot that a request of the batch owns."""
    spans = zip(batch.sizes(), batch.rows.tolist(), strict=True)
    return torch.cat([batch.slots[row, first : context + keys] for (n, keys, first, context), row in spans if n]).long()


# dtype, (Hq, Hkv, D, Dv), rules, sinks, sizes, contexts, first cached positions; then more of make_batch
ATTENTION = {
    "one node": (torch.float32, (4, 2, 64, 64), {}, False, [1], [0], None),
    "one block and one": (torch.float32, (4, 2, 64, 64), {}, False, [1, 33], [32, 64], None),
    "seven heads per KV head": (torch.float32, (7, 1, 64, 64), {}, False, [3, 12], [40, 3], None),
    "window smaller than the tree": (torch.float32, (3, 3, 80, 80), {"window": 5}, False, [9, 30], [70, 3], None),
    "window that forgot": (torch.float32, (4, 2, 32, 32), {"window": 9}, False, [6, 12], [57, 9], [37, 0]),
    "chunks": (torch.float32, (4, 2, 32, 32), {"chunk": 8}, False, [9, 30], [21, 3], None),
    "soft-cap": (torch.float32, (8, 1, 32, 32), {"softcap": 3.0, "window": 7}, False, [9, 20], [40, 3], None),
    "sinks": (torch.float32, (8, 4, 64, 64), {"window": 16}, True, [12, 4], [50, 3], None),
    "values narrower than keys": (torch.float32, (4, 4, 48, 32), {}, False, [12, 4], [50, 3], None),
    "wide heads": (torch.float32, (2, 1, 256, 256), {}, False, [5], [40], None),
    "half precision": (torch.float16, (8, 2, 128, 128), {}, False, [1, 33], [70, 30], None),
    "a large tree": (torch.float16, (2, 1, 32, 32), {}, False, [200], [65], None),
    "grown by levels": (torch.float32, (4, 2, 32, 32), {"window": 6}, False, [6, 3], [20, 9], None, [5, 40]),
    "fillers": (torch.float32, (4, 2, 32, 32), {}, True, [6, 1, 3], [20, 0, 64], None, None, 7),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_tree_attention_is_as_near_to_float64_as_torch(name):
    dtype, (num_heads, num_kv, width, value_width), rules, has_sinks, sizes, contexts, firsts, *more = ATTENTION[name]
    kind = AttentionKind(scale=width**-0.5, **rules)
    extra = dict(zip(("earlier", "fillers"), more, strict=False))
    batch = make_batch(sizes, contexts, num_slots=400, firsts=firsts, **extra)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch.num_queries, num_heads, width, generator=generator).to(dtype)
    keys, values = (torch.randn(400, num_kv, w, generator=generator).to(dtype) for w in (width, value_width))
    unused = torch.ones(400, dtype=torch.bool).index_fill_(0, used_slots(batch), False)
    keys[unused], values[unused] = float("nan"), float("nan")  # a slot of nobody's must never be read
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    exact = tree_attention_reference(
        query.double(), keys.double(), values.double(), batch, kind, None if sinks is None else sinks.double()
    )
    torch_error = (tree_attention_reference(query, keys, values, batch, kind, sinks).double() - exact).abs().max()
    for options in ({"num_splits": 3}, {"is_strict": True}):
        got = tree_attention(query, keys, values, batch, kind, sinks=sinks, backend="triton", **options)
        assert (got.double() - exact).abs().max() <= 2 * torch_error + ATOL[dtype], options
        assert not got[sum(sizes) :].any(), "tokens of nobody are zero"


@pytest.mark.parametrize("rules", [{}, {"window": 21}, {"chunk": 16}], ids=["full", "window", "chunks"])
def test_strict_attention_gives_a_path_the_bits_that_it_has_alone(rules, fixed_order_products):
    kind = AttentionKind(scale=0.2, **rules)
    batch = make_batch([25, 3], [60, 9], num_slots=200, seed=3)
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (torch.randn(n, h, 32, generator=generator) for n, h in ((28, 6), (200, 2), (200, 2)))
    drafted = tree_attention(query, keys, values, batch, kind, is_strict=True, backend="triton")
    usual = tree_attention(query, keys, values, batch, kind, backend="triton")
    differs = False
    for node in range(0, 25, 4):
        path = np.flatnonzero([(int(batch.ancestors[node, 0]) >> i) & 1 for i in range(25)])
        row = int(batch.rows[0])
        slots = torch.cat([batch.slots[row, :60], batch.slots[row, 60 + path]])[None]
        # As if the path before the node had been committed, its K and V in other slots.
        order = torch.randperm(200, generator=generator)
        place = torch.empty(200, dtype=torch.int64).index_copy_(0, order, torch.arange(200))
        one = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)  # noqa: E731
        context = 60 + len(path) - 1
        alone = TreeBatch(
            one(0, 1), one(0, 1), one(context), one(0), one(0), place[slots.long()].int(), one(context),
            one(1)[None], context + 1, one(0)[None],
        )  # fmt: skip
        arguments = (query[node : node + 1], keys[order], values[order], alone, kind)
        assert torch.equal(tree_attention(*arguments, is_strict=True, backend="triton")[0], drafted[node])
        differs |= not torch.equal(tree_attention(*arguments, backend="triton")[0], usual[node])
    assert differs, "the default mode has no such bits, so the comparison above can fail"


def test_the_float64_definition_is_a_softmax_over_each_path():
    batch = make_batch([7], [5], num_slots=12)
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(n, 2, 8, generator=generator, dtype=torch.float64) for n in (7, 12, 12))
    out = tree_attention_reference(query, keys, values, batch, AttentionKind(scale=0.3))
    for node in range(7):
        path = [i for i in range(7) if (int(batch.ancestors[node, 0]) >> i) & 1]
        slots = batch.slots[int(batch.rows[0]), [*range(5), *(5 + i for i in path)]].long()
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
    with pytest.raises(ValueError, match=r"strict attention needs the batch's paths"):
        tree_attention(query, keys, keys, replace(batch, paths=None), kind, is_strict=True, backend="triton")
    bad = replace(batch, cu_keys=torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="8 tree keys and 4 cached tokens, but the batch is for 32 tree keys and 10"):
        tree_attention(query, keys, keys, bad, kind, backend="triton")
    for change, message in (
        ({"firsts": batch.firsts.long()}, r"firsts must be int32 of shape \(1,\), got torch.int64"),
        ({"positions": batch.positions[:2]}, "positions must hold at least 3 tree keys, got 2"),
        ({"max_columns": 99}, r"max_columns must be in \[1, 10\], got 99"),
        ({"paths": batch.paths[:2]}, "paths must be int32 with 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(batch, **change)


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


def test_a_launcher_runs_where_its_first_tensor_lies(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: (entered.append(device.index), nullcontext())[1])
    launch = on_own_device(lambda tensor, more: more)
    for name in ("cpu", "cuda:0", "cuda:1"):
        assert launch(SimpleNamespace(device=torch.device(name)), name) == name
    assert entered == [1]
