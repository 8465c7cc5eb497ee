"""Fused drafting under the controller on a simulated clock: what the decisions are worth, whatever the machine does.

    python -m specdec.bench.paper_speed --tokenizer DIR --stores DIR --agents FILE ... --controls FILE ... --json OUT

The engine, the drafters, the controller and the recorded answers are those of ``specdec.bench.adaptive_speed``; only
time is made up: a forward takes what a cost table says, a drafter what was measured of it once, and everything else
nothing. So two runs give the same figures to the last digit, and a loss to plain decoding is the controller's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from specdec.bench.adaptive_speed import (
    batch_size,
    decode_seconds,
    ratio,
    report,
    shortened,
    take_calls,
    use_clock,
)
from specdec.bench.arms import EngineArm
from specdec.bench.measure import write_json
from specdec.bench.retrieval_arms import FUSED, ArmName, jobs_of, single_drafter
from specdec.bench.scripted import ScriptedTarget, scripted_engine
from specdec.bench.workload import WorkItem
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_model import CostModel, line_of
from specdec.drafters.fusion import FusedDrafter
from specdec.engine import Engine
from specdec.protocols import Drafter, PrunesDrafts
from specdec.types import Chunk, DraftTree, RequestState, StepEvent, TargetOutput

__all__ = ["PaperClock", "PricedDrafter", "PricedTarget", "main", "paper_engine"]

# Sizes that may be the best: large ones where requests run alone, small ones where many share a step. Chains (@), trees
# (=), and most nodes of drafters that stop by rules of their own (~).
ALONE = (
    "suffix@3,suffix@4,suffix@6,suffix@8,ppm@3,ppm@4,ppm@6,ppm@8,ngram@4,ngram@8,suffix=4,suffix=8,ppm=4,ppm=8,ppm=16,"
    "lookahead=4,lookahead=8,suffix~4,suffix~8,suffix~16,ppm~4,ppm~8"
)
TOGETHER = (
    "suffix@1,suffix@2,suffix@3,ppm@1,ppm@2,ppm@3,ngram@2,suffix=2,ppm=2,ppm=3,lookahead=2,suffix~1,suffix~2,ppm~2"
)
# Milliseconds of a call and of each of its requests, on one core.
PRICES = {"suffix": (0.05, 0.12), "lookahead": (0.02, 0.06), "ngram": (0.02, 0.02), "ppm": (0.05, 0.12)}


class PaperClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, ms: float) -> None:
        """Let milliseconds pass."""
        self.now += ms / 1e3


class PricedTarget(ScriptedTarget):
    """Recites, and takes the time of a cost table for it."""

    def __init__(self, vocab_size: int, costs: CostModel, clock: PaperClock) -> None:
        super().__init__(vocab_size)
        self._costs, self._clock = costs, clock

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        decoding = [chunk.state.num_tokens for chunk in chunks if chunk.tree is not None]
        tokens = sum(chunk.num_tokens for chunk in chunks)
        self._clock.spend(self._costs.step_ms(tokens, float(np.mean(decoding or [1])), max(len(decoding), 1)))
        return super().forward(chunks)


class PricedDrafter:
    """A drafter whose calls take a known time (`specdec.protocols.Drafter`)."""

    def __init__(self, inner: Drafter, prices: tuple[float, float], clock: PaperClock) -> None:
        self.inner, self.needs, self._prices, self._clock = inner, inner.needs, prices, clock

    @property
    def min_value(self) -> float:
        """The inner drafter's."""
        return getattr(self.inner, "min_value", 0.0)

    @min_value.setter
    def min_value(self, value: float) -> None:
        if isinstance(self.inner, PrunesDrafts):
            self.inner.min_value = value

    def start(self, states: Sequence[RequestState]) -> None:
        self.inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        if any(budgets):
            self._clock.spend(self._prices[0] + self._prices[1] * len(states))
        return self.inner.propose(states, budgets)

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.inner.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.inner.stop(request_ids)


def paper_engine(
    drafter: Drafter, *, vocab_size: int, costs: CostModel, clock: PaperClock, is_known: bool = True, **options: Any
) -> Engine:
    """An engine on the simulated clock; a controller knows the table from the start, or learns it."""
    engine = scripted_engine(
        vocab_size, drafter, target=PricedTarget(vocab_size, costs, clock), max_prefill_tokens=512, **options
    )
    if is_known and isinstance(engine.controller, AdaptiveController):
        engine.controller.costs.take(CostModel.of_dict(costs.as_dict()))
    return engine


def run_paper(
    items: Sequence[WorkItem], names: Sequence[str], concurrency: int, stores: Path, make: Any, clock: PaperClock
) -> dict[str, Any]:
    """Every arm answers every call; as ``adaptive_speed`` has it, without turns, for nothing disturbs."""
    found: dict[str, Any] = {}
    jobs = jobs_of(items)
    size = batch_size(concurrency)
    fused: dict[str, Any] = {}
    for name in names:
        told = ArmName.of(name)
        guesser = "none" if told.base == "plain" else partial(_drafter, told, stores, clock)
        arm = EngineArm(name, make, guesser, budget=told.budget, concurrency=concurrency)
        spent, steps, accepted, drafted = [], 0, 0, 0
        for at in range(0, len(jobs), size):
            results = arm.run(jobs[at : at + size])
            spent.append(decode_seconds(results, concurrency))
            steps += sum(len(one.emitted) for one in results)
            accepted += sum(sum(one.accepted) for one in results)
            drafted += sum(sum(one.drafted) for one in results)
        found[name] = {
            "tokens_per_s": sum(t for t, _ in spent) / sum(s for _, s in spent),
            "tokens": [t for t, _ in spent],
            "seconds": [s for _, s in spent],
            "steps": steps,
            "acceptance_length": 1 + accepted / steps,
            "drafted_per_step": drafted / steps,
        }
        drafter = arm.engine.drafter
        if isinstance(drafter, FusedDrafter):
            fused = {"sources": drafter.costs_and_gains(), "calibration_error": drafter.acceptance.calibration_error()}
        arm.close()
    over = {name: ratio(found, "fused", name) for name in found if name != "fused"}
    return {
        "concurrency": concurrency, "batches": len(found["plain"]["tokens"]), "arms": found, "fused": fused,
        "fused_over": over,
    }  # fmt: skip


def _drafter(told: ArmName, stores: Path, clock: PaperClock) -> Drafter:
    if told.base == "fused":
        return FusedDrafter(
            [(part, PricedDrafter(single_drafter(part, stores), PRICES[part], clock)) for part in FUSED]
        )
    drafter = single_drafter(told.base, stores, form=told.form)
    return PricedDrafter(drafter, PRICES[told.base], clock)


def main() -> None:
    """Simulate and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--agents", nargs="*", type=Path, default=[])
    parser.add_argument("--controls", nargs="*", type=Path, default=[])
    parser.add_argument("--calls", type=int, default=3, help="of each agent source")
    parser.add_argument("--control-calls", type=int, default=24, help="of each control source")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=80)
    parser.add_argument("--agent-concurrency", default="1,16")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32", help="of the controls")
    parser.add_argument("--alone", default=ALONE, help="single drafters that agents' calls alone are timed by")
    parser.add_argument("--together", default=TOGETHER, help="and several at a time")
    parser.add_argument("--stores", type=Path, required=True, help="as adaptive_speed --prepare made them")
    parser.add_argument("--costs", type=Path, help="a measured cost table; without: 10 ms a step, and the next two")
    parser.add_argument("--free", type=int, default=4, help="tokens that a step takes at no further cost")
    parser.add_argument("--token-ms", type=float, default=0.6, help="milliseconds of each token above these")
    parser.add_argument("--learn", action="store_true", help="the controller begins without the table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    clock = PaperClock()
    use_clock(clock)
    line = line_of(10.0, options.token_ms, free=options.free)
    costs = CostModel.load(options.costs) if options.costs else CostModel({"target": line})
    make = partial(paper_engine, vocab_size=len(words) + 128, costs=costs, clock=clock, is_known=not options.learn)
    result: dict[str, Any] = {"step_ms": {str(n): costs.step_ms(n, 512, 1) for n in (1, 2, 4, 8, 16, 32, 64)}}
    groups = (
        ("agents", options.agents, options.agent_concurrency, options.calls),
        ("controls", options.controls, options.concurrency, options.control_calls),
    )
    for group, paths, numbers, calls in groups:
        if not paths:
            continue
        items = take_calls(paths, words, calls=calls, prompt=options.prompt, response=options.response, half=1)
        result[group] = []
        for number in map(int, numbers.split(",")):
            names = ["plain", "fused"]
            if group == "agents":
                names += (options.alone if number == 1 else options.together).split(",")
            if group == "controls":
                mine = items[: max(4 * number, 16)]
            else:
                mine = items if number == 1 else [shortened(item) for item in items]
            result[group].append(run_paper(mine, names, number, options.stores / group, make, clock))
            report(result[group][-1])
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
