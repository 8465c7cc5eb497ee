"""Prompt chunks by torch's attention or by the kernel: the same result, and the faster of the two after one look."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec import prompt_attention
from specdec.build import build_engine
from specdec.device_tables import DeviceTables
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kv_cache import CallShape, Keep, KVPool
from specdec.prompt_attention import PromptAttention, device_timer
from specdec.query_layout import QueryLayout
from specdec.step_buffers import Step, StepBuffers
from tests.test_kernel_target import make, script, target_of

FULL = ("full", 0)


class FakeTimer:
    """Says that the works given to it in turn took ``ms``, and runs them."""

    def __init__(self, *ms: float) -> None:
        self.ms, self.num_asked = ms, 0

    def __call__(self, work) -> float:
        work()
        self.num_asked += 1
        return self.ms[(self.num_asked - 1) % len(self.ms)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(prompt_attention, "LEAST_TOKENS", 4)


@pytest.fixture
def by_torch(monkeypatch) -> list[int]:
    """The lengths of the chunks that torch's attention was given."""
    seen, real = [], prompt_attention.causal_attention
    monkeypatch.setattr(
        prompt_attention, "causal_attention", lambda query, *rest: (seen.append(len(query)), real(query, *rest))[1]
    )
    return seen


def make_step():
    """A chunk behind 9 tokens, a tree behind 7, and a chunk that begins its prompt, in scattered slots."""
    pool = KVPool([(FULL, CallShape(2, 32, 32))], 120, num_live_requests=3, num_step_tokens=20, dtype=torch.float32,
                  device=torch.device("cpu"), keep_runs=False)  # fmt: skip
    tables, rng = DeviceTables(pool, 4, 64, pool.device), np.random.default_rng(0)
    for name, length in (("a", 9), ("b", 7)) * 2:  # each reserves twice as much as it keeps, so that holes are filled
        assert pool.reserve(name, length, 30)
        pool.commit([Keep(name, 0, np.sort(rng.permutation(length)[: -(-length // 2)]).astype(np.int32))])
    cached = {name: pool.groups[FULL].tables[name].num_cached for name in "ab"} | {"c": 0}
    tree = np.eye(4, dtype=np.bool_)
    tree[:, 0] = tree[3, 2] = True
    layouts, start = [], 0
    for name, shape in (("a", np.tri(11, dtype=np.bool_)), ("b", tree), ("c", np.tri(6, dtype=np.bool_))):
        assert pool.reserve(name, len(shape), 30)
        positions = cached[name] + shape.sum(1) - 1
        layouts.append(QueryLayout(name, start, len(shape), cached[name], positions, shape))
        start += len(shape)
    step = Step(layouts, np.arange(start), np.concatenate([one.positions for one in layouts]), np.arange(start))
    edits = tables.edits(["a", "b", "c"])
    buffers = StepBuffers(step.sizes(len(edits[0]), has_paths=False), pool, tables)
    buffers.put(step, edits)
    tables.write(buffers.device["edit_places"], buffers.device["edit_slots"])
    return layouts, buffers.batches(64)[FULL]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_both_ways_are_as_near_to_float64_as_torch(dtype, by_torch):
    layouts, batch = make_step()
    generator, kind = torch.Generator().manual_seed(0), AttentionKind(scale=0.2)
    query, keys, values = (
        torch.randn(n, h, 32, generator=generator).to(dtype) for n, h in ((21, 6), (121, 2), (121, 2))
    )
    own = [batch.slots[int(batch.rows[i]), : one.num_cached + one.num_tokens] for i, one in enumerate(layouts)]
    unused = torch.ones(121, dtype=torch.bool).index_fill_(0, torch.cat(own).long(), False)
    keys[unused], values[unused] = float("nan"), float("nan")
    exact = tree_attention_reference(query.double(), keys.double(), values.double(), batch, kind)
    error = (tree_attention_reference(query, keys, values, batch, kind).double() - exact).abs().max()
    for ms, lengths in (((1.0, 2.0), [11]), ((2.0, 1.0), [11, 11, 6])):  # measured, then used
        choice = PromptAttention(FakeTimer(*ms))
        got = choice.chunks_of(layouts).attend(
            query, keys, values, batch, kind.scale,
            lambda some, part: tree_attention(some, keys, values, part, kind, backend="triton"),
        )  # fmt: skip
        assert (got.double() - exact).abs().max() <= 2 * error + (2e-6 if dtype == torch.float32 else 2e-3)
        assert by_torch == lengths
        by_torch.clear()


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3", "gpt_oss"))]
)
def test_a_target_gives_the_same_logits_with_torch_s_attention_in_its_chunks(kind, by_torch):
    model, timer = make(kind), FakeTimer(2.0, 1.0)
    target = target_of(model, kernels="triton")
    target.runner.prompts = PromptAttention(timer)
    for have, want in zip(script(target), script(target_of(model)), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    has_plain_calls = kind != "gpt_oss"  # all of its calls have sinks
    assert (len(by_torch) > len(target.runner.prompts.by_torch)) == has_plain_calls
    assert timer.num_asked == 2 * len(target.runner.prompts.by_torch), "each shape is timed once"


def test_only_long_chains_of_no_earlier_nodes_are_chunks():
    chain, tree = np.tri(4, dtype=np.bool_), np.tri(4, dtype=np.bool_)
    tree[3, 2] = False
    short = QueryLayout("s", 0, 3, 5, np.arange(5, 8), np.tri(3, dtype=np.bool_))
    branched = QueryLayout("t", 3, 4, 5, np.array([5, 6, 7, 7]), tree)
    grown = QueryLayout("g", 7, 4, 5, np.arange(5, 10), np.tri(4, 5, 1, dtype=np.bool_), 1)
    choice = PromptAttention(FakeTimer(1.0))
    assert choice.chunks_of([short, branched, grown]) is None
    assert choice.chunks_of([short, QueryLayout("c", 3, 4, 5, np.arange(5, 9), chain)]) is not None


def test_the_timer_takes_the_median_of_runs_that_compile_nothing(monkeypatch):
    times = iter([0.0, 9.0, 0.0, 9.0, 0.0, 0.003, 0.0, 0.001, 0.0, 0.002])
    monkeypatch.setattr("specdec.device_work.perf_counter", lambda: next(times))
    assert device_timer(torch.device("cpu"))(lambda: torch.zeros(1)) == pytest.approx(2.0)


def test_without_a_gpu_and_by_name_all_is_the_kernel_s():
    assert target_of(make("llama"), kernels="triton").runner.prompts is None
    with build_engine(make("llama"), "none", max_length=32, kv_tokens=64, kernels="auto") as engine:
        assert engine.target.runner is None


def test_a_verdict_outlives_the_process_that_measured_it(tmp_path, caplog):
    file = tmp_path / "costs" / "verdicts.json"
    shapes = [(torch.float16, 8, 64, 2, 64, 128, keys) for keys in (256, 512)]

    def nothing() -> torch.Tensor:
        return torch.empty(0)

    first = PromptAttention(FakeTimer(2.0, 1.0), file)
    assert first.prefers_torch(shapes[0], nothing, nothing)
    opposite = FakeTimer(1.0, 2.0)
    other = PromptAttention(opposite, file)
    assert other.prefers_torch(shapes[0], nothing, nothing), "as it was measured first"
    assert opposite.num_asked == 0
    assert not other.prefers_torch(shapes[1], nothing, nothing)
    assert not first.prefers_torch(shapes[1], nothing, nothing), "two that live side by side agree, too"
    assert PromptAttention(opposite).prefers_torch(shapes[0], nothing, nothing) is False, "without a file it is its own"

    file.write_text('{"a shape": "fast"}')
    assert not PromptAttention(opposite, file).prefers_torch(shapes[0], nothing, nothing)
    assert "measured again" in caplog.text
    blocked = PromptAttention(opposite, file / "below a file")
    assert not blocked.prefers_torch(shapes[0], nothing, nothing)
    assert "cannot be kept" in caplog.text
