"""Tree attention over the pool = every root-to-node path run alone, by a plain softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from specdec.attention import IMPLEMENTATION, StepAttention, TailMasks, active
from specdec.errors import InternalError
from specdec.kv_cache import CallShape, GroupKey, Keep, KVPool
from specdec.query_layout import QueryLayout
from tests.oracles import random_tree

FULL: GroupKey = ("full", 0)
SLIDING: GroupKey = ("sliding", 6)
CHUNKED: GroupKey = ("chunked", 5)


@dataclass(frozen=True)
class Case:
    """One attention call and the requests of a step."""

    key: GroupKey = FULL
    num_kv_heads: int = 2
    per_kv: int = 2
    key_dim: int = 8
    value_dim: int = 8
    scaling: float | None = None
    softcap: float | None = None
    has_sinks: bool = False
    scattered: bool = False
    # (context, prefix, most draft tokens) of each request
    requests: tuple[tuple[int, int, int], ...] = ((11, 0, 8), (0, 3, 5), (7, 4, 0), (23, 0, 0), (3, 2, 12))


def visible(key: GroupKey, query: int, position: int) -> bool:
    """The law of a mask, between absolute positions."""
    kind, size = key
    if kind == "sliding":
        return query - size < position <= query
    return position <= query and (kind == "full" or position // size == query // size)


class Request:
    """One request's tokens: random rows for its context and its chunk."""

    def __init__(self, case: Case, rng: np.random.Generator, context: int, prefix: int, max_drafts: int) -> None:
        tree = random_tree(rng, 50, max_drafts)
        self.num_cached = context
        self.parents = [*range(-1, prefix - 1), *(tree.parents + prefix).tolist()]  # within the chunk
        self.num_tokens = len(self.parents)
        length = context + self.num_tokens

        def normal(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape))

        self.query = normal(self.num_tokens, case.num_kv_heads * case.per_kv, case.key_dim)
        self.key = normal(length, case.num_kv_heads, case.key_dim)  # context, then chunk
        self.value = normal(length, case.num_kv_heads, case.value_dim)

    def path(self, token: int) -> list[int]:
        """Chunk tokens from the first one above ``token`` down to it."""
        path = []
        while token >= 0:
            path.append(token)
            token = self.parents[token]
        return path[::-1]

    def layout(self, name: str, start: int) -> QueryLayout:
        ancestors = np.zeros((self.num_tokens, self.num_tokens), dtype=np.bool_)
        depths = np.zeros(self.num_tokens, dtype=np.int64)
        for token in range(self.num_tokens):
            ancestors[token, self.path(token)] = True
            depths[token] = len(self.path(token)) - 1
        return QueryLayout(name, start, self.num_tokens, self.num_cached, depths + self.num_cached, ancestors)

    def reference(self, case: Case, sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """[T, Hq, Dv]: every query alone over the chain that leads to it."""
        scale = case.key_dim**-0.5 if case.scaling is None else case.scaling
        out = torch.zeros(self.num_tokens, case.num_kv_heads * case.per_kv, case.value_dim, dtype=dtype)
        for token in range(self.num_tokens):
            chain = [*range(self.num_cached), *(self.num_cached + node for node in self.path(token))]
            last = len(chain) - 1
            rows = [row for position, row in enumerate(chain) if visible(case.key, last, position)]
            for head in range(out.shape[1]):
                k = self.key[rows, head // case.per_kv].to(dtype)
                v = self.value[rows, head // case.per_kv].to(dtype)
                scores = (k @ self.query[token, head].to(dtype)) * scale
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].to(dtype)))
                out[token, head] = scores.softmax(0)[: len(rows)] @ v
        return out


def make_pool(case: Case, dtype: torch.dtype) -> KVPool:
    shape = CallShape(case.num_kv_heads, case.key_dim, case.value_dim)
    return KVPool(
        [(case.key, shape)], 600, num_live_requests=8, num_step_tokens=600, dtype=dtype, device=torch.device("cpu")
    )


def fill(pool: KVPool, case: Case, name: str, request: Request, *, step: int) -> None:
    """Cache a request's context, ``step`` tokens at a time so that layers that forget do forget."""
    group = pool.groups[case.key]
    for start in range(0, request.num_cached, step):
        count = min(step, request.num_cached - start)
        assert pool.reserve(name, count, 1 if case.scattered else 600)
        slots = group.tables[name].reserved.astype(np.int64)
        group.keys[0][slots] = request.key[start : start + count].to(group.keys[0].dtype)
        group.values[0][slots] = request.value[start : start + count].to(group.values[0].dtype)
        pool.commit([Keep(name, count, np.empty(0, dtype=np.int32))])


def attend(
    pool: KVPool,
    case: Case,
    requests: dict[str, Request],
    masks: dict[tuple[GroupKey, int], TailMasks],
    sinks: torch.Tensor | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """One step through the attention function that models call; request -> [T, Hq, Dv]."""
    layouts, start = [], 0
    for name, request in requests.items():
        assert pool.reserve(name, request.num_tokens, 600)
        layouts.append(request.layout(name, start))
        start += request.num_tokens
    step = StepAttention(pool, layouts, [case.per_kv], dtype=dtype, device=torch.device("cpu"), masks=masks)

    def flat(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(rows).to(dtype).transpose(0, 1)[None]  # [1, H, T, D]

    function = AttentionInterface()[IMPLEMENTATION]
    with active(step):
        out, _ = function(
            torch.nn.Module(),
            flat([r.query for r in requests.values()]),
            flat([r.key[r.num_cached :] for r in requests.values()]),
            flat([r.value[r.num_cached :] for r in requests.values()]),
            None,
            scaling=case.scaling,
            softcap=case.softcap,
            s_aux=None if sinks is None else sinks.to(dtype),
        )
    assert out.shape == (1, start, case.num_kv_heads * case.per_kv, case.value_dim)
    return {
        name: out[0, layout.start : layout.start + layout.num_tokens]
        for name, layout in zip(requests, layouts, strict=True)
    }


def assert_equal_to_paths_alone(case: Case, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    sinks = torch.from_numpy(rng.standard_normal(case.num_kv_heads * case.per_kv)) if case.has_sinks else None
    requests = {str(i): Request(case, rng, *sizes) for i, sizes in enumerate(case.requests)}
    for dtype in (torch.float64, torch.float32):
        pool = make_pool(case, dtype)
        if case.scattered:  # every other slot is taken, and nobody moves
            pool.groups[case.key].keep_runs = False
            allocator = pool.groups[case.key].allocator
            for slot in range(2, allocator.num_slots, 2):
                assert allocator.take_run(slot, 1)
        for name, request in requests.items():
            fill(pool, case, name, request, step=4)
        tables = pool.groups[case.key].tables.values()
        assert not case.scattered or not any(table.is_run for table in tables)
        found = attend(pool, case, requests, {}, sinks, dtype)
        for name, request in requests.items():
            exact = request.reference(case, sinks, torch.float64)
            error = (found[name].double() - exact).abs().max().item()
            if dtype == torch.float64:
                # The same sums in another order: a few hundred roundings of values near 1.
                assert error < 1e-13, name
            else:
                plain = (request.reference(case, sinks, torch.float32).double() - exact).abs().max().item()
                # Twice what the plain float32 softmax of one path loses; 1e-6 = 8 roundings of a value near 1, for
                # paths of few keys, where the plain error happens to be almost nothing.
                assert error <= 2 * plain + 1e-6, name


CASES = {
    "one head per KV head": Case(per_kv=1),
    "two heads per KV head": Case(),
    "four heads per KV head": Case(num_kv_heads=1, per_kv=4),
    "values narrower than keys": Case(key_dim=12, value_dim=5),
    "values wider than keys": Case(key_dim=4, value_dim=16, per_kv=1),
    "scaled": Case(scaling=0.3),
    "soft-capped": Case(softcap=2.0),
    "sinks": Case(has_sinks=True),
    "sinks and soft cap": Case(has_sinks=True, softcap=3.0, scaling=0.5),
    "scattered": Case(scattered=True),
    "scattered sinks": Case(scattered=True, has_sinks=True, key=SLIDING),
    "sliding": Case(key=SLIDING),
    "sliding, soft-capped": Case(key=SLIDING, softcap=2.0, per_kv=4),
    "sliding, scattered": Case(key=SLIDING, scattered=True, per_kv=1),
    "chunked": Case(key=CHUNKED),
    "chunked, scattered": Case(key=CHUNKED, scattered=True),
    "chunked with sinks": Case(key=CHUNKED, has_sinks=True),
    "long chunks, unpacked": Case(requests=((9, 40, 8), (0, 33, 0), (2, 1, 4))),
    "long chunks, unpacked, sliding": Case(key=SLIDING, requests=((9, 40, 8), (0, 33, 0), (2, 1, 4))),
    "long chunks, unpacked, sinks": Case(has_sinks=True, requests=((9, 40, 8), (0, 33, 0))),
    "on both sides of the packing limit": Case(requests=((3, 32, 0), (3, 31, 0), (3, 33, 0))),
    "one big tree": Case(per_kv=1, requests=((5, 0, 200),)),
    "a chunk too large to keep its mask": Case(per_kv=1, num_kv_heads=1, key_dim=4, requests=((5, 270, 0),)),
    "a lone request, one token": Case(requests=((17, 0, 0),)),
    "a lone request without context": Case(requests=((0, 0, 0),)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_tree_is_scored_as_each_of_its_paths_alone(case: Case) -> None:
    assert_equal_to_paths_alone(case)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    key=st.sampled_from([FULL, SLIDING, CHUNKED, ("sliding", 1), ("sliding", 40), ("chunked", 1), ("chunked", 40)]),
    per_kv=st.sampled_from([1, 2, 4]),
    special=st.booleans(),
    scattered=st.booleans(),
    requests=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6), st.integers(0, 10)), min_size=1, max_size=4).map(
        tuple
    ),
)
def test_random_ragged_batches_are_scored_as_paths_alone(
    seed: int, key: GroupKey, per_kv: int, special: bool, scattered: bool, requests: tuple[tuple[int, int, int], ...]
) -> None:
    case = Case(
        key=key, num_kv_heads=1, per_kv=per_kv, has_sinks=special, softcap=2.0 if special else None,
        scattered=scattered, requests=requests, key_dim=4, value_dim=4,
    )  # fmt: skip
    assert_equal_to_paths_alone(case, seed)


@pytest.mark.parametrize("key", [FULL, SLIDING, CHUNKED])
def test_masks_of_earlier_steps_leave_no_trace(key: GroupKey) -> None:
    """Trees and contexts that shrink and grow, over the same mask buffers and changing batch rows."""
    rng = np.random.default_rng(5)
    case = Case(key=key)
    masks: dict[tuple[GroupKey, int], TailMasks] = {}
    for sizes in [
        ((11, 0, 12), (30, 0, 3)),
        ((12, 0, 2),),
        ((3, 5, 9), (2, 0, 20), (9, 0, 0)),
        ((60, 0, 15), (1, 0, 1)),
        ((61, 0, 4), (4, 0, 6)),
        ((8, 0, 7), (80, 0, 9)),
    ]:
        pool = make_pool(case, torch.float64)
        requests = {str(i): Request(case, rng, *size) for i, size in enumerate(sizes)}
        for name, request in requests.items():
            fill(pool, case, name, request, step=3)
        found = attend(pool, case, requests, masks, None, torch.float64)
        for name, request in requests.items():
            assert (found[name] - request.reference(case, None, torch.float64)).abs().max() < 1e-13


def test_a_mask_costs_nothing_for_a_longer_context() -> None:
    masks = TailMasks()
    tail = ~torch.eye(4, dtype=torch.bool)
    first = masks.view(0, 600, tail, None, repeats=2, dtype=torch.float32)
    second = masks.view(0, 1000, tail, None, repeats=2, dtype=torch.float32)
    assert second.shape == (8, 1000)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert (second[:, :-4] == 0).all()
    assert (second[:, -4:] == 0).equal(~tail.repeat(2, 1))


def test_masks_of_prompt_chunks_are_not_kept() -> None:
    masks = TailMasks()
    masks.view(0, 1000, torch.zeros(500, 500, dtype=torch.bool), None, repeats=1, dtype=torch.float32)
    assert not masks._buffers


def test_a_call_outside_a_step_is_an_error() -> None:
    function = AttentionInterface()[IMPLEMENTATION]
    row = torch.zeros(1, 1, 1, 2)
    with pytest.raises(InternalError, match="was called outside a step of the engine"):
        function(torch.nn.Module(), row, row, row, None)


def test_more_calls_than_the_probe_saw_are_an_error() -> None:
    case = Case(requests=((0, 0, 0),), per_kv=1)
    rng = np.random.default_rng(0)
    requests = {"0": Request(case, rng, 0, 0, 0)}
    pool = make_pool(case, torch.float64)
    attend(pool, case, requests, {}, None, torch.float64)
    step = StepAttention(pool, [requests["0"].layout("0", 0)], [1], dtype=torch.float64, device=torch.device("cpu"),
                         masks={})  # fmt: skip
    row = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    pool.commit([Keep("0", 0, np.empty(0, dtype=np.int32))])
    pool.reserve("0", 1, 1)
    step.attend(row, row, row, None, None, None)
    with pytest.raises(InternalError, match="more than the 1 attention calls that the probe saw"):
        step.attend(row, row, row, None, None, None)
