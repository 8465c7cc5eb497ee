"""The promises of the engine under random requests, drafts, stops, cancels, faults and pool sizes.

The target is `ToyTarget`, whose next law depends on every entry that it holds for a request: a wrong, missing or
foreign entry changes the text. What a request must say is computed without an engine, from its text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from specdec.config import EngineConfig
from specdec.controller import BackoffController, FixedController
from specdec.drafters.ngram import NgramDrafter
from specdec.engine import Engine
from specdec.overlap import StepOverlap
from specdec.protocols import Drafter, DrafterNeeds, Load
from specdec.sampling import Sampler
from specdec.toy import OracleDrafter, RandomTreeDrafter, ToyTarget
from specdec.types import DraftTree, FinishReason, Request, RequestState, SamplingParams, StepEvent, TargetOutput
from specdec.verifier.match import MatchVerifier
from tests.erratic import Erratic, Inline

VOCAB_SIZE = 5
MAX_LENGTH = 24


class Fault(Exception):
    """Raised by parts that were told to fail."""


@dataclass
class Plan:
    """One random scenario."""

    requests: list[Request]
    submit_at: list[int]  # step before which each request is submitted
    cancel_at: dict[int, int]  # request -> step before which it is cancelled, once submitted
    drafter: str
    budgets: list[int]  # used in turn
    faults: list[int]  # steps in which a part fails
    kv_tokens: int
    config: EngineConfig
    supports_trees: bool
    target_seed: int
    overlap_seed: int | None  # drafting and verification overlap as these dice fall


@dataclass
class Streams:
    """What came out, per request."""

    new_ids: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)


class CyclingController:
    """Gives the budgets it was told, in turn over requests and steps."""

    def __init__(self, budgets: Sequence[int]) -> None:
        self._budgets = budgets
        self._next = 0

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        assert load.num_running >= len(states)
        self._next += len(states)
        return [self._budgets[(self._next + i) % len(self._budgets)] for i in range(len(states))]

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""


class FailingDrafter:
    """Another drafter, except that it fails when told to; checks what every drafter may rely on."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.needs = DrafterNeeds()
        self.fails = False
        self.live: set[str] = set()

    def start(self, states: Sequence[RequestState]) -> None:
        self.live |= {state.request_id for state in states}
        self.inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        assert {state.request_id for state in states} <= self.live
        assert min(budgets) >= 0
        if self.fails:
            raise Fault
        return self.inner.propose(states, budgets)

    def observe(self, events: Sequence[StepEvent]) -> None:
        for one in events:
            assert one.state.request_id in self.live
            assert one.trace.num_emitted == len(one.emitted_ids) >= 1
            assert one.state.num_cached == one.state.num_tokens - 1  # the root is never cached, also after a cut
            assert one.state.output_ids[-len(one.emitted_ids) :].tolist() == one.emitted_ids.tolist()
        self.inner.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.live -= set(request_ids)
        self.inner.stop(request_ids)


class FailingObserver:
    """Fails when told to, after the step is committed."""

    def __init__(self) -> None:
        self.fails = False
        self.accepted: list[int] = []

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.accepted += [one.result.num_accepted for one in events]
        if self.fails:
            raise Fault


def plain_text(target: ToyTarget, request: Request) -> tuple[list[int], FinishReason]:
    """What the request must say: token by token from the text alone, without engine, KV or trees."""
    params, sampler, state = request.sampling, Sampler(VOCAB_SIZE), RequestState(request)
    sampler.start(state)
    while True:
        logits = torch.from_numpy(target.logits(state.token_ids))[None]
        tree = DraftTree.root_only(int(state.token_ids[-1]))
        [token_id] = sampler.target_ids([state], [tree], TargetOutput(logits, np.array([0, 1], dtype=np.int32)))
        sampler.commit(state, [int(token_id)])
        state.append([int(token_id)])
        if token_id in params.stop_token_ids:
            return state.output_ids.tolist(), "stop"
        if state.num_output_tokens == params.max_new_tokens or state.num_tokens == target.max_length:
            return state.output_ids.tolist(), "length"


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    tokens = st.integers(0, VOCAB_SIZE - 1)
    requests = []
    for i in range(draw(st.sampled_from([1, 2, 3, 4, 5]))):
        sampling = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.0])),
            top_k=draw(st.sampled_from([0, 3])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
            max_new_tokens=draw(st.sampled_from([1, 2, 5, 8, 12, 30])),
            stop_token_ids=draw(st.sampled_from([(), (), (), (1,), (0, 2)])),
            seed=draw(st.integers(0, 3)),
        )
        prompt = draw(st.lists(tokens, min_size=draw(st.sampled_from([1, 6])), max_size=10))
        requests.append(Request(f"r{i}", np.array(prompt, dtype=np.int32), sampling))
    needed = max(min(len(r.prompt_ids) + r.sampling.max_new_tokens, MAX_LENGTH) for r in requests)
    return Plan(
        requests=requests,
        submit_at=[draw(st.integers(0, 6)) for _ in requests],
        cancel_at=draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 12), max_size=2)),
        drafter=draw(st.sampled_from(["random", "ngram", "oracle", "late oracle"])),
        budgets=draw(st.lists(st.sampled_from([0, 1, 2, 4, 7]), min_size=1, max_size=4)),
        faults=draw(st.lists(st.integers(0, 12), max_size=2)),
        kv_tokens=needed + draw(st.sampled_from([0, 1, 4, 12, 60])),
        config=EngineConfig(
            max_batch_size=draw(st.sampled_from([1, 2, 3, 5])), max_prefill_tokens=draw(st.sampled_from([1, 3, 8, 512]))
        ),
        supports_trees=draw(st.booleans()),
        target_seed=draw(st.integers(0, 5)),
        overlap_seed=draw(st.sampled_from([None, 0, 1, 2])),
    )


def make_drafter(kind: str, outputs: dict[str, list[int]]) -> Drafter:
    if kind == "random":
        return RandomTreeDrafter(VOCAB_SIZE)
    if kind == "ngram":
        return NgramDrafter(min_value=0)
    # The wrong siblings come first, so that accepted nodes are never the leading slots.
    return OracleDrafter(outputs, VOCAB_SIZE, num_wrong_siblings=1, wrong_from=3 if kind == "late oracle" else None)


@settings(max_examples=150)
@given(plan=plans())
def test_every_request_says_what_it_says_alone_and_leaves_nothing_behind(plan: Plan) -> None:
    target = ToyTarget(
        vocab_size=VOCAB_SIZE,
        seed=plan.target_seed,
        kv_tokens=plan.kv_tokens,
        max_length=MAX_LENGTH,
        supports_trees=plan.supports_trees,
    )
    expected = {request.request_id: plain_text(target, request) for request in plan.requests}
    outputs = {request_id: ids for request_id, (ids, _) in expected.items()}
    drafter, observer = FailingDrafter(make_drafter(plan.drafter, outputs)), FailingObserver()
    engine = Engine(
        target,
        MatchVerifier(Sampler(VOCAB_SIZE)),
        drafter,
        CyclingController(plan.budgets),
        config=plan.config,
        observers=[observer],
        overlap=None if plan.overlap_seed is None else StepOverlap(Erratic(plan.overlap_seed), Inline()),
    )
    streams, states = run(engine, plan, drafter, observer)

    for i, request in enumerate(plan.requests):
        ids, reason = expected[request.request_id]
        said = streams.new_ids[request.request_id]
        if streams.reasons[request.request_id] == "cancelled":
            assert i in plan.cancel_at
            assert said == ids[: len(said)]
            event("cancelled")
        else:
            assert (said, streams.reasons[request.request_id]) == (ids, reason)
        assert states[i].output_ids.tolist() == said
        assert states[i].finish_reason == streams.reasons[request.request_id]
    assert target.num_held_tokens == 0
    assert target.request_ids == []
    assert drafter.live == set()
    assert not engine.has_work
    assert engine.step() == []
    event(f"preempted: {any(state.num_preemptions for state in states)}")
    event(f"accepted: {any(observer.accepted)}")


def run(
    engine: Engine, plan: Plan, drafter: FailingDrafter, observer: FailingObserver
) -> tuple[Streams, list[RequestState]]:
    """Drive the scenario to its end, and check on the way what must hold in every step."""
    streams, states = Streams(), dict[int, RequestState]()
    target = engine.target
    assert isinstance(target, ToyTarget)
    for step in range(1000):
        for i, request in enumerate(plan.requests):
            if plan.submit_at[i] == step:
                states[i] = engine.submit(request)
            if i in states and plan.cancel_at.get(i) == step:
                was_live = not states[i].is_finished
                assert engine.cancel(request.request_id) == was_live
        drafter.fails = step in plan.faults and step % 2 == 0
        observer.fails = step in plan.faults and step % 2 == 1
        try:
            new = engine.step()
        except Fault:
            event("fault")
            continue
        for output in new:
            assert output.request_id not in streams.reasons, "an output after the last one"
            assert output.new_ids or output.finish_reason is not None
            streams.new_ids.setdefault(output.request_id, []).extend(output.new_ids)
            if output.finish_reason is not None:
                streams.reasons[output.request_id] = output.finish_reason
        # Between steps only what states say is cached is held: no draft, no reservation, no finished request.
        live = [state for state in states.values() if not state.is_finished]
        assert target.num_held_tokens == sum(state.num_cached for state in live)
        if step >= max(plan.submit_at) and not engine.has_work:
            return streams, [states[i] for i in range(len(plan.requests))]
    pytest.fail("the engine does not come to an end")


@pytest.mark.parametrize("controller", [FixedController(0), FixedController(6), BackoffController(max_budget=8)])
def test_neighbours_and_budgets_change_no_token_of_a_sampled_batch(controller: FixedController) -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE, kv_tokens=60)
    requests = []
    for i in range(6):
        sampling = SamplingParams(temperature=1.0, seed=i, max_new_tokens=20)
        requests.append(Request(f"r{i}", np.arange(i + 1, dtype=np.int32) % VOCAB_SIZE, sampling))
    engine = Engine(target, MatchVerifier(Sampler(VOCAB_SIZE)), RandomTreeDrafter(VOCAB_SIZE), controller)
    said: dict[str, list[int]] = {}
    for output in engine.generate(requests):
        said.setdefault(output.request_id, []).extend(output.new_ids)
    assert said == {r.request_id: plain_text(target, r)[0] for r in requests}
    assert target.num_held_tokens == 0


def test_a_perfect_draft_is_accepted_whole() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    request = Request("a", np.array([1], dtype=np.int32), SamplingParams(max_new_tokens=21))
    ids, _ = plain_text(target, request)
    engine = Engine(
        target, MatchVerifier(Sampler(VOCAB_SIZE)), OracleDrafter({"a": ids}, VOCAB_SIZE), FixedController(6)
    )
    outputs = list(engine.generate([request]))
    assert [output.new_ids for output in outputs] == [ids[:7], ids[7:14], ids[14:]]
    assert (outputs[-1].state.num_accepted, outputs[-1].state.num_steps) == (18, 3)


def test_closing_the_stream_cancels_what_is_left() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    requests = [Request(name, np.array([1], dtype=np.int32)) for name in "ab"]
    engine = Engine(target, MatchVerifier(Sampler(VOCAB_SIZE)), RandomTreeDrafter(VOCAB_SIZE), FixedController(2))
    stream = engine.generate(requests)
    next(stream)
    stream.close()
    assert target.num_held_tokens == 0
    assert not engine.has_work
    assert engine.step() == []  # nobody waits for the outputs of a closed stream


def test_requests_that_crowd_each_other_out_lose_nothing() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE, kv_tokens=26, max_length=MAX_LENGTH)
    requests = []
    for i in range(5):
        sampling = SamplingParams(temperature=i % 2, seed=i, max_new_tokens=20)
        requests.append(Request(f"r{i}", np.array([i, 1], dtype=np.int32), sampling))
    engine = Engine(target, MatchVerifier(Sampler(VOCAB_SIZE)), RandomTreeDrafter(VOCAB_SIZE), FixedController(5))
    said: dict[str, list[int]] = {}
    num_preemptions = 0
    for output in engine.generate(requests):
        said.setdefault(output.request_id, []).extend(output.new_ids)
        num_preemptions = max(num_preemptions, output.state.num_preemptions)
        assert target.num_held_tokens <= 26
    assert said == {r.request_id: plain_text(target, r)[0] for r in requests}
    assert num_preemptions > 0
