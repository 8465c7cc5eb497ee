"""A load really served, beside the same load simulated: how far the simulation is off."""

from __future__ import annotations

from collections.abc import Sequence
from time import thread_time
from typing import Any

from specdec.bench.arrivals import Arrival
from specdec.bench.forcing import ForcedResponse
from specdec.bench.load_policies import LoadLimits, Policy, Served
from specdec.bench.load_sim import simulate_load, summarize_load
from specdec.bench.recorded_acceptance import RecordedAcceptance
from specdec.bench.workload import WorkItem
from specdec.cost_model import CostModel
from specdec.engine import Engine
from specdec.types import Request, SamplingParams

__all__ = ["fit_arrivals", "prediction_errors", "serve_load"]

_COMPARED = ("tokens_per_s", "tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "tokens_per_step")


def fit_arrivals(arrivals: Sequence[Arrival], items: Sequence[WorkItem], *, seconds: float) -> list[Arrival]:
    """The first arrivals, one per call, squeezed or stretched to come within ``seconds``, as long as the calls are."""
    times = [arrival.time_s for arrival in arrivals[: len(items)]]
    scale = seconds / max(times[-1] - times[0], 1e-9)
    return [
        Arrival((time - times[0]) * scale, len(item.prompt_ids), len(item.response_ids))
        for time, item in zip(times, items, strict=False)
    ]


def serve_load(engine: Engine, arrivals: Sequence[Arrival], items: Sequence[WorkItem]) -> list[Served]:
    """Serve calls when they come; their recorded answers are forced.

    The clock is the CPU time of this thread, which does all the work, and jumps to the next arrival where nothing is to
    be done: on an idle machine the clock on the wall, on a busy one without the neighbours.
    """
    waiting = list(zip(arrivals, items, strict=True))[::-1]
    served: dict[str, Served] = {}
    done: list[Served] = []
    begin = thread_time()
    while waiting or engine.has_work:
        now = thread_time() - begin
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
            one, now = served[output.request_id], thread_time() - begin
            one.first_s = one.first_s or now
            if output.finish_reason is not None:
                one.last_s, one.steps = now, output.state.num_steps
                one.drafted = output.state.num_drafted
                done.append(one)
    return done


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
