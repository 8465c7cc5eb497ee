"""The loop, over a target without a model that notices every KV mistake: its law hangs on all tokens that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.errors import ConfigError, InternalError, RequestError, UnsupportedError
from specdec.protocols import DrafterNeeds, Load
from specdec.sampling import Sampler
from specdec.toy import OracleDrafter, RandomTreeDrafter, ToyTarget
from specdec.types import DraftTree, Request, RequestOutput, RequestState, SamplingParams, StepEvent
from specdec.verifier.match import MatchVerifier

VOCAB_SIZE = 40


class Recorder:
    """Keeps what an observer, drafter or verifier was told."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.events += events


def make_engine(
    target: ToyTarget | None = None,
    drafter: Any = None,
    *,
    budget: int = 6,
    observers: Sequence[Any] = (),
    **options: int,
) -> Engine:
    target = target or ToyTarget(vocab_size=VOCAB_SIZE)
    return Engine(
        target,
        MatchVerifier(Sampler(VOCAB_SIZE)),
        drafter or RandomTreeDrafter(VOCAB_SIZE),
        FixedController(budget),
        config=EngineConfig.of(**options),
        observers=observers,
    )


def request(name: str, length: int = 5, **sampling: Any) -> Request:
    rng = np.random.default_rng(sum(map(ord, name)))
    prompt = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
    return Request(name, prompt, SamplingParams(**{"max_new_tokens": 12, **sampling}))


def collect(outputs: Any) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.request_id, []).extend(output.new_ids)
    return tokens


def plain(requests: Sequence[Request]) -> dict[str, list[int]]:
    """Each request alone, one token at a time."""
    found = {}
    for one in requests:
        found |= collect(make_engine(budget=0).generate([one]))
    return found


def run_steps(engine: Engine, *, limit: int = 1000) -> list[RequestOutput]:
    outputs = []
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine does not come to an end")


def assert_empty(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.target.num_held_tokens == 0  # type: ignore[attr-defined]
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine.verifier._sampler._live  # type: ignore[attr-defined]
    assert not engine._stops


def oracle(requests: Sequence[Request], **options: Any) -> OracleDrafter:
    return OracleDrafter(plain(requests), VOCAB_SIZE, **options)


# ---------------------------------------------------------------------------------------------- the same tokens always


def test_greedy_text_is_that_of_the_target_alone() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    one = request("a", 7)
    assert collect(make_engine(target).generate([one])) == {"a": target.greedy(one.prompt_ids, 12)}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    budget=st.integers(0, 9),
    kv_tokens=st.integers(45, 150),
    max_batch_size=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.8]),
    knows=st.booleans(),
    cancels=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=3),
)
def test_no_drafter_neighbour_preemption_or_chunk_changes_the_text(
    lengths: list[int], seed: int, budget: int, kv_tokens: int, max_batch_size: int, max_prefill_tokens: int,
    temperature: float, knows: bool, cancels: list[tuple[int, int]],
) -> None:  # fmt: skip
    requests = [
        request("abcdef"[i], length, temperature=temperature, seed=seed + i, stop_token_ids=(3,))
        for i, length in enumerate(lengths)
    ]
    expected = plain(requests)
    drafter = oracle(requests, num_wrong_siblings=1) if knows else RandomTreeDrafter(VOCAB_SIZE, seed=seed)
    engine = make_engine(
        ToyTarget(vocab_size=VOCAB_SIZE, kv_tokens=kv_tokens), drafter, budget=budget,
        max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens,
    )  # fmt: skip
    states = [engine.submit(one) for one in requests]
    outputs: list[RequestOutput] = []
    for step in range(1000):
        for when, who in cancels:
            if when == step and who < len(requests):
                engine.cancel(requests[who].request_id)
        if not engine.has_work:
            break
        outputs += engine.step()
    assert_empty(engine)
    got = collect(outputs)
    for state in states:
        name = state.request_id
        assert got.get(name, []) == state.output_ids.tolist()
        if state.finish_reason == "cancelled":
            assert got.get(name, []) == expected[name][: len(got.get(name, []))]
        else:
            assert got[name] == expected[name]
        last = [output for output in outputs if output.request_id == name]
        assert [output.finish_reason for output in last][-1] == state.finish_reason
        assert all(output.finish_reason is None for output in last[:-1])


def test_a_chain_only_target_gets_chains() -> None:
    requests = [request("a"), request("b", 9)]
    engine = make_engine(ToyTarget(vocab_size=VOCAB_SIZE, supports_trees=False), oracle(requests, num_wrong_siblings=2))
    assert collect(engine.generate(requests)) == plain(requests)


def test_what_is_drafted_right_is_accepted_whole() -> None:
    requests = [request("a", max_new_tokens=12)]
    engine = make_engine(drafter=oracle(requests), budget=5)
    outputs = list(engine.generate(requests))
    assert [len(output.new_ids) for output in outputs] == [6, 6]
    assert (outputs[-1].state.num_steps, outputs[-1].state.num_drafted, outputs[-1].state.num_accepted) == (2, 10, 10)


# ------------------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize("stop_at", range(7))
def test_nothing_after_the_first_stop_inside_a_block_stays(stop_at: int) -> None:
    """All of seven tokens are drafted right; one of them is a stop token."""
    [text] = plain([request("a", max_new_tokens=7)]).values()
    one = request("a", max_new_tokens=7, stop_token_ids=(text[stop_at],))
    first = text.index(text[stop_at])  # it may have come earlier
    recorder = Recorder()
    held: list[int] = []
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    commit = target.commit

    def spy(chunks: Any, keep: Any) -> None:
        commit(chunks, keep)
        held.append(target.num_held_tokens)

    target.commit = spy  # type: ignore[method-assign]
    engine = make_engine(target, OracleDrafter({"a": text}, VOCAB_SIZE), budget=6, observers=[recorder])
    [output] = engine.generate([one])
    assert output.new_ids == text[: first + 1]
    assert output.finish_reason == ("stop" if stop_at < 7 else "length")
    assert output.state.token_ids.tolist() == [*one.prompt_ids.tolist(), *output.new_ids]
    # The last token's KV is not kept, not even where it was a draft token: it would be the next root.
    assert held == [len(one.prompt_ids) + first]
    [event] = recorder.events
    assert event.emitted_ids.tolist() == output.new_ids
    assert event.trace.num_emitted == first + 1
    assert event.trace.num_accepted == 6
    assert output.state.num_accepted == min(6, first + 1)
    assert_empty(engine)


def test_the_last_token_is_never_drafted() -> None:
    seen: list[tuple[int, ...]] = []

    class Watch(RandomTreeDrafter):
        def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
            seen.append(tuple(budgets))
            return [DraftTree.root_only(int(state.token_ids[-1])) for state in states]

    engine = make_engine(ToyTarget(vocab_size=VOCAB_SIZE, max_draft_tokens=4), Watch(VOCAB_SIZE), budget=9)
    list(engine.generate([request("a", max_new_tokens=6)]))
    assert seen == [(4,), (4,), (3,), (2,), (1,), (0,)]


def test_the_context_length_ends_a_request() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE, max_length=10)
    engine = make_engine(target)
    outputs = list(engine.generate([request("a", 9), request("b", 4, max_new_tokens=50)]))
    assert {name: len(ids) for name, ids in collect(outputs).items()} == {"a": 1, "b": 6}
    assert {output.finish_reason for output in outputs if output.finish_reason} == {"length"}


# ------------------------------------------------------------------------------------------------ order and accounting


def test_outputs_come_in_order_of_admission() -> None:
    engine = make_engine(max_batch_size=3)
    for name in "cab":
        engine.submit(request(name))
    assert [output.request_id for output in engine.step()] == ["c", "a", "b"]


def test_events_carry_the_numbers_of_the_step() -> None:
    requests = [request("a", max_new_tokens=20), request("b", 9, max_new_tokens=20)]
    recorder = Recorder()
    engine = make_engine(drafter=oracle(requests, wrong_from=3), budget=5, observers=[recorder])
    engine.submit(requests[0])
    engine.submit(requests[1])
    engine.step()
    first, second = recorder.events
    assert [event.row for event in recorder.events] == [0, 1]
    assert first.output.cu_nodes.tolist() == [0, 6, 12]
    for event, length in ((first, 5), (second, 9)):
        trace = event.trace
        assert (trace.request_id, trace.step, trace.position) == (event.state.request_id, 1, length)
        assert (trace.num_draft_tokens, trace.num_accepted, trace.num_emitted, trace.batch_size) == (5, 2, 3, 2)
        assert len(event.tree) == 6
        assert event.result.acceptance_length == 3
        assert event.emitted_ids.tolist() == event.state.output_ids.tolist()
        assert min(trace.draft_ms, trace.target_ms, trace.verify_ms, trace.commit_ms) >= 0
    engine.step()
    assert recorder.events[2].trace.position == 5 + 3
    assert recorder.events[2].trace.step == 2


def test_prefill_steps_are_observed_without_events_and_count_as_no_step() -> None:
    calls: list[int] = []

    class Count:
        def observe(self, events: Sequence[StepEvent]) -> None:
            calls.append(len(events))

    engine = make_engine(observers=[Count()], max_prefill_tokens=4)
    state = engine.submit(request("a", 10))
    assert engine.step() == []
    assert engine.step() == []
    assert state.num_cached == 8
    assert state.num_steps == 0
    assert len(engine.step()) == 1
    assert state.num_steps == 1
    assert calls == [0, 0, 1]


def test_cached_tokens_are_all_but_the_root_after_every_step() -> None:
    requests = [request("a", max_new_tokens=20), request("b", 9, max_new_tokens=20)]
    engine = make_engine(drafter=oracle(requests, num_wrong_siblings=1, wrong_from=3))
    states = [engine.submit(one) for one in requests]
    while not any(state.is_finished for state in states):
        engine.step()
        live = [state for state in states if not state.is_finished]
        assert all(state.num_cached == state.num_tokens - 1 for state in live)
        assert engine.target.num_held_tokens == sum(state.num_cached for state in live)  # type: ignore[attr-defined]


def test_preemption_in_the_middle_loses_nothing() -> None:
    requests = [request(name, 12, max_new_tokens=20, temperature=1.0, seed=4) for name in "abcd"]
    engine = make_engine(ToyTarget(vocab_size=VOCAB_SIZE, kv_tokens=60), oracle(requests, wrong_from=3))
    outputs = list(engine.generate(requests))
    states = {output.request_id: output.state for output in outputs}
    assert sum(state.num_preemptions for state in states.values()) >= 1
    assert states["a"].num_preemptions == 0
    assert collect(outputs) == plain(requests)
    assert_empty(engine)


# ---------------------------------------------------------------------------------------------------------- cancelling


def test_cancel_waiting_mid_prefill_and_running() -> None:
    engine = make_engine(max_batch_size=2, max_prefill_tokens=6)
    running, prefilling, waiting = (engine.submit(request(n, length)) for n, length in (("a", 4), ("b", 30), ("c", 4)))
    engine.step()
    assert running.num_output_tokens > 0
    assert 0 < prefilling.num_cached < 29
    assert waiting in engine.scheduler.waiting
    for name in "abc":
        assert engine.cancel(name)
        assert not engine.cancel(name)
    assert engine.has_work  # three outputs wait
    outputs = engine.step()
    assert [(output.request_id, output.new_ids, output.finish_reason) for output in outputs] == [
        ("a", [], "cancelled"), ("b", [], "cancelled"), ("c", [], "cancelled"),
    ]  # fmt: skip
    assert_empty(engine)


def test_cancelling_an_unknown_request_says_so() -> None:
    assert not make_engine().cancel("nobody")


def test_closing_the_iterator_cancels_the_rest() -> None:
    engine = make_engine()
    stream = engine.generate([request("a"), request("b")])
    next(stream)
    stream.close()
    assert_empty(engine)
    assert engine.step() == []


def test_a_closed_iterator_does_not_end_a_later_request_of_the_same_id() -> None:
    engine = make_engine()
    stream = engine.generate([request("a")])
    next(stream)
    stream.close()
    assert collect(engine.generate([request("a")])) == plain([request("a")])


def test_two_iterators_on_one_engine_get_their_own_tokens() -> None:
    requests = [request(name, max_new_tokens=n) for name, n in (("a", 9), ("b", 25), ("c", 14))]
    engine = make_engine()
    first, second = engine.generate(requests[:2]), engine.generate(requests[2:])
    own: dict[int, list[RequestOutput]] = {0: [], 1: []}
    streams = {0: first, 1: second}
    while streams:
        for index, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[index]
            else:
                own[index].append(output)
    assert collect([*own[0], *own[1]]) == plain(requests)
    assert set(collect(own[0])) == {"a", "b"}
    assert set(collect(own[1])) == {"c"}
    assert_empty(engine)


def test_outputs_of_submitted_requests_are_not_swallowed_by_an_iterator() -> None:
    requests = [request("a"), request("b")]
    engine = make_engine()
    engine.submit(requests[0])
    assert collect(engine.generate(requests[1:])) == {"b": plain(requests)["b"]}
    assert collect(run_steps(engine)) == {"a": plain(requests)["a"]}


def test_a_bad_request_among_many_starts_none_of_them() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="unique"):
        list(engine.generate([request("a"), request("a")]))
    assert_empty(engine)


# ----------------------------------------------------------------------------------------------------------- bad input

BAD_REQUESTS = [
    (request("live"), r"request_id must be unique among live requests, got 'live' again"),
    (Request("a", np.array([1, 40])), r"prompt token ids must be in \[0, 40\), got 40"),
    (request("a", 30), r"the prompt must be shorter than the context of 30 tokens, got 30"),
    (request("a", 8, max_new_tokens=21), r"one request must fit the KV pool, but this one may need 29 tokens"),
    (request("a", 8, logit_bias={99: 1.0}), r"logit_bias"),
    (request("a", stop_strings=("x",)), r"stop_strings need the model's tokenizer"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS, ids=[m for _, m in BAD_REQUESTS])
def test_a_bad_request_is_refused_and_nothing_of_it_is_kept(bad: Request, message: str) -> None:
    engine = make_engine(ToyTarget(vocab_size=VOCAB_SIZE, max_length=30, kv_tokens=28))
    engine.submit(request("live"))
    with pytest.raises(RequestError, match=message):
        engine.submit(bad)
    assert collect(run_steps(engine)) == plain([request("live")])
    assert_empty(engine)


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ConfigError, match="max_batch_size: .* greater than or equal to 1, got 0"):
        EngineConfig.of(max_batch_size=0)
    with pytest.raises(ConfigError, match="no_such_option"):
        EngineConfig.of(no_such_option=1)


def test_a_drafter_that_needs_hidden_states_is_refused() -> None:
    drafter = RandomTreeDrafter(VOCAB_SIZE)
    drafter.needs = DrafterNeeds(hidden_layers=(3,))
    with pytest.raises(UnsupportedError, match="RandomTreeDrafter reads hidden states"):
        make_engine(drafter=drafter)


def test_a_drafter_that_fails_to_start_leaves_no_trace() -> None:
    class Fails(RandomTreeDrafter):
        def start(self, states: Sequence[RequestState]) -> None:
            raise RuntimeError("boom")

    engine = make_engine(drafter=Fails(VOCAB_SIZE))
    with pytest.raises(RuntimeError, match="boom"):
        engine.submit(request("a"))
    assert_empty(engine)


def bad_tree(*token_ids: int, parents: Sequence[int] | None = None) -> Callable[[int], DraftTree]:
    def make(root: int) -> DraftTree:
        ids = np.array([root, *token_ids], dtype=np.int32)
        return DraftTree(ids, np.array(parents if parents is not None else range(-1, len(token_ids)), dtype=np.int32))

    return make


BAD_DRAFTS = [
    (bad_tree(1, 2, 3, 4), "the drafter was allowed 3 draft tokens and proposed 4"),
    (bad_tree(1, 2, parents=[-1, 0]), "proposed 2, with 2 parents"),
    (lambda root: DraftTree.chain((root + 1) % VOCAB_SIZE, [1]), "the root of a draft must be the last token"),
    (bad_tree(1, VOCAB_SIZE), r"draft token ids must be in \[0, 40\)"),
    (bad_tree(-1), r"draft token ids must be in \[0, 40\)"),
]


@pytest.mark.parametrize(("tree_of", "message"), BAD_DRAFTS, ids=[m for _, m in BAD_DRAFTS])
def test_a_bad_draft_is_named_and_costs_no_token(tree_of: Callable[[int], DraftTree], message: str) -> None:
    class Bad(RandomTreeDrafter):
        is_bad = False

        def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
            if self.is_bad:
                return [tree_of(int(state.token_ids[-1])) for state in states]
            return super().propose(states, budgets)

    drafter = Bad(VOCAB_SIZE)
    engine = make_engine(drafter=drafter, budget=3)
    engine.submit(request("a"))
    outputs = engine.step()
    drafter.is_bad = True
    with pytest.raises(InternalError, match=message):
        engine.step()
    drafter.is_bad = False
    assert collect([*outputs, *run_steps(engine)]) == plain([request("a")])


@pytest.mark.parametrize("budgets", [[-1], [], [1, 1]])
def test_bad_budgets_are_named(budgets: list[int]) -> None:
    engine = make_engine()
    engine.controller.plan = lambda states, load: budgets  # type: ignore[method-assign]
    engine.submit(request("a"))
    with pytest.raises(InternalError, match="the controller must plan a budget >= 0 for each of 1 requests"):
        engine.step()


def test_the_wrong_number_of_trees_is_named() -> None:
    engine = make_engine()
    engine.drafter.propose = lambda states, budgets: []  # type: ignore[method-assign]
    engine.submit(request("a"))
    with pytest.raises(InternalError, match="one tree for each of 1 requests: 0"):
        engine.step()


# --------------------------------------------------------------------------------------------- exceptions of user code


class Fuse:
    """User code that fails at its n-th call, and only then."""

    def __init__(self, fails_at: int) -> None:
        self.num_left = fails_at

    def blow(self) -> None:
        self.num_left -= 1
        if self.num_left == 0:
            raise RuntimeError("boom")


class FusedProcessor(Fuse):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.blow()
        return scores


class FusedCriterion(Fuse):
    def __call__(self, input_ids: Any, scores: Any) -> bool:
        self.blow()
        return False


class FusedObserver(Fuse):
    def observe(self, events: Sequence[StepEvent]) -> None:
        self.blow()


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("where", ["processor", "criterion", "observer", "target", "drafter.stop", "verifier.commit"])
def test_an_exception_loses_no_token_and_leaves_the_engine_usable(where: str, fails_at: int) -> None:
    sampling: dict[str, Any] = {"max_new_tokens": 10}
    observers: list[Any] = []
    if where == "processor":
        sampling["logits_processors"] = (FusedProcessor(fails_at),)
    if where == "criterion":
        sampling["stopping_criteria"] = (FusedCriterion(fails_at),)
    if where == "observer":
        observers = [FusedObserver(fails_at)]
    clean = [request(name, max_new_tokens=10) for name in "abc"]
    requests = [clean[0], request("b", **sampling), clean[2]]
    engine = make_engine(drafter=oracle(clean, wrong_from=3), observers=observers)
    fuse = Fuse(fails_at)

    def fused(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            fuse.blow()
            return function(*args)

        return call

    if where == "target":
        engine.target.forward = fused(engine.target.forward)  # type: ignore[method-assign]
    if where == "drafter.stop":
        engine.drafter.stop = fused(engine.drafter.stop)  # type: ignore[method-assign]
    if where == "verifier.commit":
        engine.verifier.commit = fused(engine.verifier.commit)  # type: ignore[method-assign]
    for one in requests:
        engine.submit(one)
    outputs: list[RequestOutput] = []
    errors: list[RuntimeError] = []
    for _ in range(100):
        if not engine.has_work:
            break
        try:
            outputs += engine.step()
        except RuntimeError as error:
            errors.append(error)
    assert len(errors) == 1 or (not errors and fails_at > 1)
    assert all(str(error) == "boom" for error in errors)
    if where == "criterion" and errors:
        assert errors[0].__notes__ == ["raised by the stopping criteria of request 'b'"]
    if where == "processor" and errors:
        assert errors[0].__notes__ == ["raised by a logits processor of request 'b'"]
    assert collect(outputs) == plain(clean)
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"] * 3
    assert_empty(engine)


def test_an_observer_may_cancel_a_request_even_one_that_just_ended() -> None:
    class Canceller:
        def observe(self, events: Sequence[StepEvent]) -> None:
            for event in events:
                if event.trace.step == 2 and event.state.request_id == "a":
                    engine.cancel("a")
                if event.state.num_output_tokens == 12 and event.state.request_id == "b":
                    engine.cancel("b")

    engine = make_engine(observers=[Canceller()], budget=0)
    engine.submit(request("a"))
    engine.submit(request("b"))
    outputs = run_steps(engine)
    assert len(collect(outputs)["a"]) == 2
    assert len(collect(outputs)["b"]) == 12
    assert_empty(engine)


def test_the_controller_hears_the_load_and_every_event() -> None:
    loads: list[Load] = []

    class Listening(FixedController):
        def __init__(self) -> None:
            super().__init__(2)
            self.num_events = 0

        def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
            loads.append(load)
            return super().plan(states, load)

        def observe(self, events: Sequence[StepEvent]) -> None:
            self.num_events += len(events)

    engine = make_engine(max_batch_size=1)
    engine.controller = controller = Listening()
    list(engine.generate([request("a", 7, max_new_tokens=1), request("b", max_new_tokens=1)]))
    assert [(load.num_running, load.num_waiting, load.num_prefill_tokens) for load in loads] == [(1, 1, 6), (1, 0, 4)]
    assert controller.num_events == 2
