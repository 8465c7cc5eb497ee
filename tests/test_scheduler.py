"""Who runs: admission, chunked prefill, preemption. The target only counts slots here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.config import EngineConfig
from specdec.errors import InternalError
from specdec.scheduler import Scheduler
from specdec.toy import ToyTarget
from specdec.types import Chunk, DraftTree, Request, RequestState


def make(kv_tokens: int = 100, **options: int) -> tuple[Scheduler, ToyTarget]:
    target = ToyTarget(vocab_size=10, kv_tokens=kv_tokens)
    return Scheduler(target, EngineConfig.of(**options)), target


def add(scheduler: Scheduler, *lengths: int) -> list[RequestState]:
    names = "abcdefgh"
    states = [
        RequestState(Request(names[i], np.ones(length, dtype=np.int32))) for i, length in enumerate(lengths)
    ]  # fmt: skip
    for state in states:
        scheduler.add(state)
    return states


def ids(states: list[RequestState]) -> str:
    return "".join(state.request_id for state in states)


def step(scheduler: Scheduler, target: ToyTarget, *, num_drafts: int = 0) -> list[Chunk]:
    """One step as the engine does it; everyone who decodes gets one token."""
    scheduler.admit()
    parts = scheduler.plan()
    trees = {
        part.state.request_id: DraftTree.chain(int(part.state.token_ids[-1]), list(range(num_drafts)))
        for part in parts
        if part.decodes
    }
    chunks = scheduler.reserve(parts, trees)
    target.forward(chunks)
    keep: list[list[int]] = [[0] if chunk.tree is not None else [] for chunk in chunks]
    target.commit(chunks, keep)
    for chunk, nodes in zip(chunks, keep, strict=True):
        chunk.state.num_cached += len(chunk.prefix_ids) + len(nodes)
        if nodes:
            chunk.state.append([1])
    return chunks


def test_requests_are_admitted_in_order_up_to_the_batch_size() -> None:
    scheduler, _ = make(max_batch_size=2)
    add(scheduler, 3, 3, 3)
    assert ids(scheduler.admit()) == "ab"
    assert ids(scheduler.admit()) == ""
    assert ids(list(scheduler.waiting)) == "c"
    scheduler.remove(scheduler.running[0])
    assert ids(scheduler.admit()) == "c"
    assert ids(scheduler.running) == "bc"


def test_nobody_overtakes_a_request_that_has_no_room_yet() -> None:
    scheduler, _ = make(kv_tokens=20)
    add(scheduler, 10, 15, 2)
    assert ids(scheduler.admit()) == "a"
    assert ids(list(scheduler.waiting)) == "bc"


def test_admission_counts_the_prompts_that_running_requests_have_still_to_cache() -> None:
    scheduler, target = make(kv_tokens=100, max_prefill_tokens=10)
    add(scheduler, 60)
    step(scheduler, target)  # 10 of 60 are cached: 90 slots are free, but 50 of them are spoken for
    scheduler.add(RequestState(Request("late", np.ones(60, dtype=np.int32))))
    assert scheduler.admit() == []


def test_prompt_tokens_share_the_step_in_order_of_seniority_and_decoding_goes_on() -> None:
    scheduler, target = make(kv_tokens=1000, max_prefill_tokens=8)
    add(scheduler, 3, 20, 6)
    plans = []
    for _ in range(5):
        chunks = step(scheduler, target)
        plans.append([(chunk.state.request_id, len(chunk.prefix_ids), chunk.tree is not None) for chunk in chunks])
    assert plans == [
        [("a", 2, True), ("b", 6, False)],
        [("a", 0, True), ("b", 8, False)],
        [("a", 0, True), ("b", 5, True), ("c", 3, False)],
        [("a", 0, True), ("b", 0, True), ("c", 2, True)],
        [("a", 0, True), ("b", 0, True), ("c", 0, True)],
    ]


def test_a_prompt_of_exactly_the_chunk_size_decodes_at_once() -> None:
    scheduler, target = make(max_prefill_tokens=8)
    add(scheduler, 9)
    [chunk] = step(scheduler, target)
    assert (len(chunk.prefix_ids), chunk.tree is not None) == (8, True)


def test_the_load_counts_running_waiting_and_prompt_tokens() -> None:
    scheduler, _ = make(max_batch_size=2, max_prefill_tokens=5)
    add(scheduler, 3, 9, 4)
    scheduler.admit()
    load = scheduler.load(scheduler.plan())
    assert (load.num_running, load.num_waiting, load.num_prefill_tokens) == (2, 1, 5)


def test_drafts_get_what_is_left_and_preempt_nobody() -> None:
    scheduler, target = make(kv_tokens=24)
    add(scheduler, 10, 10)
    chunks = step(scheduler, target, num_drafts=3)
    assert [chunk.tree.num_draft_tokens for chunk in chunks if chunk.tree] == [3, 0]
    assert ids(scheduler.running) == "ab"
    assert all(state.num_preemptions == 0 for state in scheduler.running)


def test_the_newest_is_preempted_keeps_its_tokens_and_comes_back_first() -> None:
    scheduler, target = make(kv_tokens=24)
    a, b, c = add(scheduler, 10, 10, 5)
    assert ids(scheduler.admit()) == "ab"
    for _ in range(3):
        step(scheduler, target)
    assert target.num_held_tokens == 24
    chunks = step(scheduler, target)
    assert ids([chunk.state for chunk in chunks]) == "a"
    assert ids(list(scheduler.waiting)) == "bc"
    assert (b.num_preemptions, b.num_cached, b.num_tokens) == (1, 0, 13)
    assert (a.num_preemptions, c.num_preemptions) == (0, 0)
    assert target.request_ids == ["a"]
    scheduler.remove(a)
    assert ids(scheduler.admit()) == "bc"  # at once: nobody runs who could send it back again


def test_a_preempted_request_is_not_admitted_in_the_next_step() -> None:
    scheduler, target = make(kv_tokens=30)
    add(scheduler, 14, 14)
    for _ in range(2):
        step(scheduler, target)
    assert ids([chunk.state for chunk in step(scheduler, target)]) == "a"
    assert scheduler.admit() == []


def test_a_request_that_runs_alone_and_has_no_room_is_an_error_not_a_livelock() -> None:
    scheduler, _ = make(kv_tokens=5)
    add(scheduler, 9)
    scheduler.admit()
    with pytest.raises(InternalError, match="no room for 9 tokens of request 'a', although it runs alone"):
        scheduler.reserve(scheduler.plan(), {})


def test_removing_a_waiting_a_running_and_an_unknown_request() -> None:
    scheduler, target = make(max_batch_size=1)
    a, b = add(scheduler, 5, 5)
    step(scheduler, target)
    scheduler.remove(b)
    assert not scheduler.waiting
    scheduler.remove(a)
    assert not scheduler.running
    assert target.num_held_tokens == 0
    scheduler.remove(a)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    kv_tokens=st.integers(50, 90),
    max_prefill=st.integers(1, 40),
    num_drafts=st.integers(0, 5),
    num_new=st.integers(1, 20),
)
def test_everyone_finishes_and_the_oldest_gains_in_every_step(
    lengths: list[int], kv_tokens: int, max_prefill: int, num_drafts: int, num_new: int
) -> None:
    scheduler, target = make(kv_tokens=kv_tokens, max_prefill_tokens=max_prefill, max_batch_size=4)
    states = add(scheduler, *lengths)
    unfinished = list(states)
    for _ in range(5000):
        if not unfinished:
            break
        before = scheduler.running[0] if scheduler.running else unfinished[0]
        progress = before.num_cached
        step(scheduler, target, num_drafts=num_drafts)
        assert before.num_cached > progress
        for state in list(unfinished):
            if state.num_output_tokens >= num_new:
                scheduler.remove(state)
                unfinished.remove(state)
    assert not unfinished
    assert target.num_held_tokens == 0
    assert states[0].num_preemptions == 0
