"""The KV pool against a plain dict: position -> the stamp of the token that was written there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specdec.kv_cache import CallShape, GroupKey, Keep, KVGroup, KVPool, first_visible
from specdec.kv_slots import TRASH_SLOT, SlotAllocator

FULL: GroupKey = ("full", 0)
SLIDING: GroupKey = ("sliding", 5)
CHUNKED: GroupKey = ("chunked", 4)


def make_pool(
    keys: list[GroupKey], num_tokens: int, *, keep_runs: bool = True, num_live: int = 4, num_step_tokens: int = 24
) -> KVPool:
    # Two geometries in one group: rows have to move in both storages.
    shapes = [(key, CallShape(1, 2, 1)) for key in keys] + [(keys[0], CallShape(2, 1, 3))]
    pool = KVPool(
        shapes,
        num_tokens,
        num_live_requests=num_live,
        num_step_tokens=num_step_tokens,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    for group in pool.groups.values():
        group.keep_runs = keep_runs
    return pool


def write(group: KVGroup, slots: np.ndarray, stamps: list[int]) -> None:
    """Stamp the rows of every call; the sign tells values from keys."""
    rows = torch.from_numpy(slots.astype(np.int64))
    column = torch.tensor(stamps, dtype=torch.float64)[:, None, None]
    for ordinal in group.keys:
        group.keys[ordinal][rows] = column
        group.values[ordinal][rows] = -column


def assert_holds(group: KVGroup, request_id: str, tokens: list[int]) -> None:
    """Every cached position holds its own token's row, in every call, and nothing else is held."""
    table = group.tables[request_id]
    first = first_visible(group.key, len(tokens))
    assert table.first == first
    assert table.num_cached == len(tokens) - first
    slots = torch.from_numpy(table.slots[: table.num_cached].astype(np.int64))
    wanted = torch.tensor(tokens[first:], dtype=torch.float64)[:, None, None]
    for ordinal in group.keys:
        assert (group.keys[ordinal][slots] == wanted).all()
        assert (group.values[ordinal][slots] == -wanted).all()


def accounting_is_right(pool: KVPool) -> None:
    for group in pool.groups.values():
        owned = np.concatenate([np.empty(0, np.int32), *(t.slots[: len(t)] for t in group.tables.values())])
        assert len(set(owned.tolist())) == len(owned), "a slot has two owners"
        assert TRASH_SLOT not in owned
        assert group.allocator.num_taken == len(owned)
        free = np.ones(group.allocator.num_slots, dtype=bool)
        free[owned] = free[TRASH_SLOT] = False
        assert (group.allocator._free == free).all()
        for table in group.tables.values():
            if table.is_run:
                assert (table.slots[: len(table)] == np.arange(table.base, table.base + len(table))).all()
        claims = np.zeros(group.allocator.num_slots, dtype=int)
        for table in group.tables.values():
            start, length = table.claim
            claims[start : start + length] += 1
        assert (group.allocator._num_claims == claims).all()


@dataclass
class Model:
    """What a request should hold."""

    tokens: list[int] = field(default_factory=list)  # stamps of the cached tokens, by position
    reserved: int = 0


class PoolMachine(RuleBasedStateMachine):
    """Random lives of a few requests in a pool that is too small for them."""

    @initialize(
        keys=st.sampled_from([[FULL], [FULL, SLIDING, CHUNKED], [SLIDING], [CHUNKED, FULL], [SLIDING, CHUNKED]]),
        num_tokens=st.sampled_from([7, 20, 45, 200]),
        keep_runs=st.booleans(),
    )
    def start(self, keys: list[GroupKey], num_tokens: int, keep_runs: bool) -> None:
        self.pool = make_pool(keys, num_tokens, keep_runs=keep_runs)
        self.requests: dict[str, Model] = {}
        self.next_stamp = 1
        self.num_moves = 0

    @rule(request=st.sampled_from("abcd"), count=st.integers(1, 12), expected=st.integers(1, 60))
    def reserve(self, request: str, count: int, expected: int) -> None:
        def snapshot() -> list[object]:
            return [
                (key, name, table.slots[: len(table)].tolist(), table.first, table.num_cached, table.base, table.claim)
                for key, group in self.pool.groups.items()
                for name, table in group.tables.items()
            ]

        before = snapshot()
        least_free = min(group.allocator.num_free for group in self.pool.groups.values())
        done = self.pool.reserve(request, count, expected)
        assert done == (count <= least_free)
        if done:
            self.requests.setdefault(request, Model()).reserved += count
        else:
            assert snapshot() == before

    @precondition(lambda self: any(model.reserved for model in self.requests.values()))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(r for r, model in self.requests.items() if model.reserved)))
        model = self.requests[request]
        stamps = list(range(self.next_stamp, self.next_stamp + model.reserved))
        self.next_stamp += model.reserved
        for group in self.pool.groups.values():
            write(group, group.tables[request].reserved, stamps)
        num_leading = data.draw(st.integers(0, model.reserved))
        others = (
            sorted(data.draw(st.sets(st.integers(num_leading, model.reserved - 1))))
            if (num_leading < model.reserved)
            else []
        )
        self.pool.commit([Keep(request, num_leading, np.array(others, dtype=np.int32))])
        model.tokens += stamps[:num_leading] + [stamps[index] for index in others]
        model.reserved = 0

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        self.pool.release(request)
        del self.requests[request]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), to=st.sampled_from("abcdefgh"), expected=st.integers(1, 60))
    def copy_prefix(self, data: st.DataObject, to: str, expected: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.requests)))
        length = data.draw(st.integers(0, len(self.requests[source].tokens)))
        if to in self.requests or not self._holds(source, length):
            return
        needed = {key: length - first_visible(key, length) for key in self.pool.groups}
        has_room = all(group.allocator.num_free >= needed[key] for key, group in self.pool.groups.items())
        assert self.pool.copy_prefix(source, to, length, expected) == has_room
        if has_room:
            self.requests[to] = Model(self.requests[source].tokens[:length])

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), to=st.sampled_from("abcdefgh"))
    def rename(self, data: st.DataObject, to: str) -> None:
        source = data.draw(st.sampled_from(sorted(self.requests)))
        if to not in self.requests:
            self.pool.rename(source, to)
            self.requests[to] = self.requests.pop(source)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), expected=st.integers(0, 60))
    def expect(self, data: st.DataObject, expected: int) -> None:
        self.pool.expect(data.draw(st.sampled_from(sorted(self.requests))), expected)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        length = data.draw(st.integers(0, len(self.requests[request].tokens)))
        if self._holds(request, length):
            self.pool.cut(request, length)
            del self.requests[request].tokens[length:]

    def _holds(self, request: str, length: int) -> bool:
        model = self.requests[request]
        visible = all(first_visible(key, len(model.tokens)) <= first_visible(key, length) for key in self.pool.groups)
        assert self.pool.holds(request, length) == (visible and not model.reserved)
        return visible and not model.reserved

    @rule()
    def releasing_a_stranger_is_no_error(self) -> None:
        self.pool.release("stranger")

    @invariant()
    def every_position_holds_its_token(self) -> None:
        if not hasattr(self, "pool"):
            return
        accounting_is_right(self.pool)
        for group in self.pool.groups.values():
            assert set(group.tables) == set(self.requests)
            for request, model in self.requests.items():
                assert group.tables[request].num_reserved == model.reserved
                assert_holds(group, request, model.tokens)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for request in self.requests:
                self.pool.release(request)
            assert self.pool.num_used == 0
            accounting_is_right(self.pool)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def grow(pool: KVPool, request: str, tokens: list[int], steps: int, *, expected: int = 10) -> None:
    """Decode with trees of three drafts of which the second branch is accepted."""
    for _ in range(steps):
        assert pool.reserve(request, 4, expected)
        stamps = [len(tokens) + 1000, -7, len(tokens) + 1001, -8]
        for group in pool.groups.values():
            write(group, group.tables[request].reserved, stamps)
        pool.commit([Keep(request, 0, np.array([0, 2], dtype=np.int32))])
        tokens += [stamps[0], stamps[2]]


def test_a_blocked_request_moves_to_a_longer_run_and_keeps_its_rows() -> None:
    pool = make_pool([FULL], 120)
    first, second = [], []
    grow(pool, "a", first, 5, expected=10)
    grow(pool, "b", second, 1, expected=10)  # right behind the claim of "a"
    table = pool.groups[FULL].tables["a"]
    base = table.base
    grow(pool, "a", first, 12)
    assert table.is_run
    assert table.base != base
    assert_holds(pool.groups[FULL], "a", first)
    assert_holds(pool.groups[FULL], "b", second)


def test_without_a_long_enough_run_a_request_goes_on_scattered() -> None:
    pool = make_pool([FULL], 24)
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(5):
        for request, own in tokens.items():
            grow(pool, request, own, 1, expected=1)
    assert any(not table.is_run for table in pool.groups[FULL].tables.values())
    for request, own in tokens.items():
        assert_holds(pool.groups[FULL], request, own)


def test_a_blocked_request_is_moved_once_per_growth_not_once_per_token() -> None:
    pool = make_pool([FULL], 4000)
    group = pool.groups[FULL]
    moved: list[int] = []
    move = group._move
    group._move = lambda source, target: (moved.append(len(source)), move(source, target))[1]  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {name: [] for name in "abcd"}
    for _ in range(200):
        for request, own in tokens.items():
            grow(pool, request, own, 1, expected=1)  # nobody expects to grow: everyone is in everyone's way
    committed = sum(map(len, tokens.values()))
    # One row per step closes the hole of the tree; relocations at a growth of 1.25 move 1 / 0.25 rows per token.
    assert sum(moved) <= committed * (0.5 + 1 / 0.25)
    for request, own in tokens.items():
        assert_holds(group, request, own)


@pytest.mark.parametrize("key", [SLIDING, CHUNKED])
def test_a_forgetting_group_keeps_a_few_slots_however_long_the_text(key: GroupKey) -> None:
    pool = make_pool([FULL, key], 5000, num_live=1)
    tokens: list[int] = []
    grow(pool, "a", tokens, 1000, expected=3000)
    assert pool.groups[FULL].allocator.num_taken == 2000
    assert pool.groups[key].allocator.num_taken <= key[1]
    assert pool.groups[key].allocator.num_slots < 100
    assert_holds(pool.groups[key], "a", tokens)


def test_a_newcomer_is_placed_behind_the_claims_of_others() -> None:
    pool = make_pool([FULL], 100)
    assert pool.reserve("a", 2, 40)
    assert pool.reserve("b", 2, 40)
    a, b = (pool.groups[FULL].tables[name] for name in "ab")
    assert b.base >= a.base + 40


def test_a_newcomer_in_a_pool_full_of_claims_does_not_stand_in_the_way_of_the_owner() -> None:
    pool = make_pool([FULL], 100)
    tokens: list[int] = []
    grow(pool, "a", tokens, 1, expected=100)
    assert pool.reserve("b", 2, 40)
    base = pool.groups[FULL].tables["a"].base
    grow(pool, "a", tokens, 10)
    assert pool.groups[FULL].tables["a"].base == base


def test_the_pool_reports_its_bytes() -> None:
    pool = make_pool([FULL], 10)
    rows = 11  # and the trash slot
    assert pool.nbytes == rows * 8 * (1 * 2 + 1 * 1 + 2 * 1 + 2 * 3)


def test_slots_are_searched_around_the_end_and_promised_ones_come_last() -> None:
    allocator = SlotAllocator(11)
    assert allocator.take_any(7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    allocator.give(np.array([2, 3], dtype=np.int32))
    allocator.claim(8, 2)
    assert allocator.take_any(2).tolist() == [10, 2]
    assert sorted(allocator.take_any(3).tolist()) == [3, 8, 9]
    assert allocator.num_free == 0
    assert allocator.take_any(0).tolist() == []


def test_overlapping_claims_are_counted() -> None:
    allocator = SlotAllocator(21)
    allocator.claim(1, 10)
    allocator.claim(5, 10)
    allocator.unclaim(5, 10)
    assert allocator.find_run(8, 1) == (11, 8)


def test_first_visible_agrees_with_the_masks() -> None:
    """By brute force over the laws of the probe: sliding shows q - W < k <= q, chunked k // C == q // C."""
    for position in range(30):
        sliding = [k for k in range(position + 1) if position - 5 < k]
        chunked = [k for k in range(position + 1) if k // 4 == position // 4]
        assert first_visible(SLIDING, position) == sliding[0]
        assert first_visible(CHUNKED, position) == chunked[0]
        assert first_visible(FULL, position) == 0
