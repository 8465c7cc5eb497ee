"""A load really served, beside the same load simulated: how far the simulation is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from specdec.bench.arrivals import Arrival
from specdec.bench.forcing import ForcedResponse
from specdec.bench.load_policies import LoadLimits, Policy, Served
from specdec.bench.load_sim import simulate_load, summarize_load
from specdec.bench.recorded_acceptance import RecordedAcceptance
from specdec.bench.turns import TurnClock
from specdec.bench.workload import WorkItem
from specdec.cost_model import CostModel
from specdec.engine import Engine
from specdec.protocols import Controller, Load
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent

__all__ = ["TimedController", "fit_arrivals", "prediction_errors", "serve_in_turns"]

_COMPARED = ("tokens_per_s", "tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "tokens_per_step")


def fit_arrivals(arrivals: Sequence[Arrival], items: Sequence[WorkItem], *, seconds: float) -> list[Arrival]:
    """The first arrivals, one per call, squeezed or stretched to come within ``seconds``, as long as the calls are."""
    times = [arrival.time_s for arrival in arrivals[: len(items)]]
    scale = seconds / max(times[-1] - times[0], 1e-9)
    return [
        Arrival((time - times[0]) * scale, len(item.prompt_ids), len(item.response_ids))
        for time, item in zip(times, items, strict=False)
    ]


class TimedController:
    """Passes a controller's decisions through and tells a table what every step took (`specdec.protocols.Controller`).

    Args:
        inner: decides.
        costs: learns; several engines may share it.
        clock: in seconds; the one that the engine's times are read from.
        drafts: False: this engine's drafter does nothing, which is no drafting time.
    """

    def __init__(self, inner: Controller, costs: CostModel, clock: Callable[[], float], *, drafts: bool) -> None:
        self.inner = inner
        self._costs, self._clock, self._drafts = costs, clock, drafts
        self._observed_at: float | None = None
        self._host_ms = 0.0
        self._num_fixed, self._context = 0, 1.0

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        self._host_ms = 0.0 if self._observed_at is None else 1e3 * (self._clock() - self._observed_at)
        self._num_fixed = len(states) + load.num_prefill_tokens
        self._context = sum(state.num_tokens for state in states) / max(len(states), 1)
        return self.inner.plan(states, load)

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return self.inner.admit(states, trees)

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.inner.observe(events)
        if events:
            trace = events[0].trace
            parts = {"target": trace.target_ms, "verify": trace.verify_ms, "commit": trace.commit_ms,
                     "host": self._host_ms}  # fmt: skip
            if self._drafts:
                parts["draft"] = trace.draft_ms
            tokens = self._num_fixed + sum(event.trace.num_draft_tokens for event in events)
            for part, ms in parts.items():
                self._costs.tables[part].observe(tokens, self._context, len(events), ms)
        self._observed_at = self._clock() if events else None


def serve_in_turns(
    engines: Mapping[str, Engine], arrivals: Sequence[Arrival], items: Sequence[WorkItem], clock: TurnClock
) -> dict[str, list[Served]]:
    """Serve calls when they come, by each engine for itself, a step of one after a step of the other.

    Recorded answers are forced. Each engine has its own time, which jumps to the next arrival where nothing is to be
    done, so that what disturbs the machine meanwhile disturbs all of them, and the table that they share, alike.
    """
    done: dict[str, list[Served]] = {name: [] for name in engines}
    for name, engine in engines.items():
        clock.turn(name)
        _compile(engine)
    running = {name: _serve(engine, arrivals, items, clock, done[name]) for name, engine in engines.items()}
    while running:
        for name in list(running):
            clock.turn(name)
            if next(running[name], "over") == "over":
                del running[name]
    clock.turn("")
    return done


def _compile(engine: Engine) -> None:
    """What a first call compiles, so that no request waits for it."""
    prompts = [np.arange(64, dtype=np.int32) % (7 + row) for row in range(2)]
    for _ in engine.generate(
        Request(f"warm-{i}", ids, SamplingParams(max_new_tokens=12)) for i, ids in enumerate(prompts)
    ):
        pass


def _serve(
    engine: Engine, arrivals: Sequence[Arrival], items: Sequence[WorkItem], clock: Callable[[], float],
    done: list[Served],
) -> Iterator[None]:  # fmt: skip
    waiting = list(zip(arrivals, items, strict=True))[::-1]
    served: dict[str, Served] = {}
    begin = clock()
    while waiting or engine.has_work:
        now = clock() - begin
        while waiting and waiting[-1][0].time_s <= now:
            arrival, item = waiting.pop()
            name = f"load-{len(served)}"
            forced = ForcedResponse([item.response_ids], len(item.prompt_ids))
            sampling = SamplingParams(max_new_tokens=len(item.response_ids), logits_processors=(forced,))
            served[name] = Served(arrival.time_s, arrival.prompt_tokens, arrival.response_tokens)
            engine.submit(Request(name, item.prompt_ids, sampling))
        if not engine.has_work:
            begin -= max(waiting[-1][0].time_s - now, 0.0)
            continue
        for output in engine.step():
            one, now = served[output.request_id], clock() - begin
            one.first_s = one.first_s or now
            if output.finish_reason is not None:
                one.last_s, one.steps = now, output.state.num_steps
                one.drafted = output.state.num_drafted
                done.append(one)
        yield


def prediction_errors(
    real: Sequence[Served],
    arrivals: Sequence[Arrival],
    costs: CostModel,
    acceptance: RecordedAcceptance,
    policy: Policy,
    limits: LoadLimits,
) -> dict[str, Any]:
    """Figures of the served load, of its simulation, and the relative error of each.

    Args:
        real: what was served.
        arrivals: what was asked.
        costs: of the machine that served it.
        acceptance: the same answers, in the same order.
        policy: that was in force.
        limits: of the engine.
    """
    simulated, _ = simulate_load(arrivals, costs, acceptance, policy, limits=limits, seed=None)
    pairs = (("real", real), ("simulated", simulated))
    figures = {name: summarize_load(served, ttft_ms=1e9, tpot_ms=1e9) for name, served in pairs}
    return {
        "policy": policy.name,
        **{name: {key: found[key] for key in _COMPARED} for name, found in figures.items()},
        "error": {key: figures["simulated"][key] / figures["real"][key] - 1 for key in _COMPARED},
    }
