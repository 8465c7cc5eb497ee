"""Fused drafting under the adaptive controller against every single drafter at fixed lengths, and against none.

    python -m specdec.bench.adaptive_speed --tokenizer DIR --agents FILE ... --controls FILE ... --json OUT

Recorded answers are forced onto a model with random weights, so all arms write the same text and only time differs.
Arms take turns step by step, in one process. Stores know the half of the episodes that is not
measured, and every arm has served some calls of the other half. ``NAME@8`` drafts eight tokens one after the other
wherever that drafter finds as many, its own rules of stopping off: a fixed length. Two harder rivals adapt by
themselves: ``NAME=8`` drafts the eight nodes that it believes in most, as a tree, and ``NAME~8`` at most eight, as its
own rules have it. The lengths that are timed are those that are best on the simulated clock
(``specdec.bench.paper_speed``), which tries more of them. Decoding speed leaves the
prompt's time out: where requests run alone, from the first token to the last; with several at a time, the steps in
which all of them decode.

All times, also those by which the controller decides, are by default the CPU time of the one thread that does all the
work: on an idle machine the time on the wall, on a busy one without the neighbours. So run it with OMP_NUM_THREADS=1.
``--clock wall`` is for an idle machine and any number of threads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.arms import EngineArm, Job
from specdec.bench.arrivals import read_arrivals
from specdec.bench.load_policies import LoadLimits, Policy
from specdec.bench.load_record import record_acceptance
from specdec.bench.load_validation import TimedController, fit_arrivals, prediction_errors, serve_in_turns
from specdec.bench.measure import write_json
from specdec.bench.retrieval_arms import ArmName, jobs_of, make_drafter, train_stores
from specdec.bench.scripted import serve_scripted
from specdec.bench.targets import SHAPES, random_target
from specdec.bench.turns import TurnClock, decode_seconds, run_in_turns
from specdec.bench.workload import Limits, WorkItem, Workload
from specdec.build import build_engine, model_max_length
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_measure import measure_costs
from specdec.cost_model import CostModel
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.routes import choose_route

__all__ = [
    "batch_size",
    "decode_seconds",
    "main",
    "ratio",
    "report",
    "shortened",
    "take_calls",
    "use_clock",
]

# Every arm has served so many other calls before it is timed: an engine that has just been started is another question.
_PAPER_CALLS, _PAPER_BUDGET = 24, 16


def use_clock(clock: Callable[[], float]) -> None:
    """Let the engine, the drafters, the controller and the arms read another clock, in seconds."""
    readers = ("engine", "device_work", "drafters.fusion", "bench.arms", "cost_measure")
    for module in (f"specdec.{name}" for name in readers):
        vars(importlib.import_module(module))["perf_counter"] = clock
    (AdaptiveController.__init__.__kwdefaults__ or {})["clock"] = clock


def use_cpu_clock() -> TurnClock:
    """Let everything read the CPU time of this thread, that of one arm at a time.

    Raises:
        ConfigError: torch runs several threads, whose work this clock does not see.
    """
    if torch.get_num_threads() > 1:
        raise ConfigError("CPU time of one thread is measured: set OMP_NUM_THREADS=1")
    clock = TurnClock(thread_time)
    use_clock(clock)
    return clock


def use_wall_clock() -> TurnClock:
    """Let everything read the time on the wall, that of one arm at a time."""
    clock = TurnClock(perf_counter)
    use_clock(clock)
    return clock


def small_model(vocab_size: int) -> Any:
    """46 million parameters with a vocabulary of 150 thousand: a step takes about 10 ms on two cores."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def batch_size(concurrency: int) -> int:
    """Calls that an arm answers in its turn: enough that all but the last few have company to the end."""
    return 1 if concurrency == 1 else max(2 * concurrency, 12)


def build_arms(names: Sequence[str], model: Any, stores: Path, concurrency: int, longest: int) -> list[EngineArm]:
    """One for each name; see ``ArmName``. Requests have at most ``longest`` tokens."""
    arms = []
    route = choose_route(model, max_length=model_max_length(model))  # once: it is the same for all
    make = partial(build_engine, model, route=route, kv_tokens=concurrency * (longest + 128), costs="measure")
    for name in names:
        told = ArmName.of(name)
        guesser = "none" if told.base == "plain" else partial(make_drafter, told.base, stores, form=told.form)
        arms.append(EngineArm(name, make, guesser, budget=told.budget, concurrency=concurrency))
    return arms


def run_arms(
    arms: Sequence[EngineArm], warm: Sequence[Job], batches: Sequence[Sequence[Job]], concurrency: int,
    limit_s: float, clock: TurnClock,
) -> dict[str, Any]:  # fmt: skip
    """Every arm answers every batch, in turn, until the time is up; ``warm`` is not timed."""
    spent: dict[str, list[tuple[int, float]]] = {arm.name: [] for arm in arms}
    steps: dict[str, list[int]] = {arm.name: [0, 0, 0] for arm in arms}
    run_in_turns(arms, warm, clock)  # compile, allocate, and see what the sources are worth
    seconds = thread_time if torch.get_num_threads() == 1 else perf_counter
    begin = seconds()
    for number, batch in enumerate(batches):
        if number and seconds() - begin > limit_s * number / (number + 1):
            break  # another turn would not fit
        found = run_in_turns(arms, batch, clock)
        for arm in arms:
            results = found[arm.name]
            spent[arm.name].append(decode_seconds(results, concurrency))
            for one in results:
                counts = (len(one.emitted), sum(one.accepted), sum(one.drafted))
                steps[arm.name] = [a + b for a, b in zip(steps[arm.name], counts, strict=True)]
    return {
        name: {
            "tokens_per_s": sum(t for t, _ in parts) / sum(s for _, s in parts),
            "tokens": [t for t, _ in parts],
            "seconds": [round(s, 5) for _, s in parts],
            "steps": steps[name][0],
            "acceptance_length": 1 + steps[name][1] / max(steps[name][0], 1),
            "drafted_per_step": steps[name][2] / max(steps[name][0], 1),
        }
        for name, parts in spent.items()
    }


def ratio(arms: dict[str, Any], ours: str, base: str, *, seed: int = 0) -> dict[str, float]:
    """Speed of one arm over another, pooled, with a 95 % bootstrap interval over the batches."""
    seconds = {name: np.array(arms[name]["seconds"]) for name in (ours, base)}
    tokens = {name: np.array(arms[name]["tokens"]) for name in (ours, base)}
    rng = np.random.default_rng(seed)

    def of(rows: Any) -> float:
        speed = {name: tokens[name][rows].sum() / seconds[name][rows].sum() for name in (ours, base)}
        return float(speed[ours] / speed[base])

    count = len(seconds[ours])
    draws = [of(rng.integers(0, count, count)) for _ in range(2000)]
    return {
        "ratio": of(np.arange(count)),
        "low": float(np.percentile(draws, 2.5)),
        "high": float(np.percentile(draws, 97.5)),
    }


def fused_details(arm: EngineArm) -> dict[str, Any]:
    """What the fused drafter learned: costs and gains of its sources, how well its values are calibrated."""
    drafter = arm.engine.drafter
    if not isinstance(drafter, FusedDrafter):
        return {}
    costs: CostModel = drafter.costs
    return {
        "sources": drafter.costs_and_gains(),
        "calibration_error": drafter.acceptance.calibration_error(),
        "reliability": [
            {"sources": point.sources, "count": point.count, "predicted": point.predicted, "observed": point.observed}
            for point in drafter.reliability()
        ],
        "step_ms": {str(n): costs.step_ms(n, 512, 1) for n in (1, 2, 4, 8, 16, 32, 64)},
    }


def measure_group(
    model: Any, items: Sequence[WorkItem], stores: Path, names: Sequence[str], concurrency: int, limit_s: float,
    clock: TurnClock,
) -> dict[str, Any]:  # fmt: skip
    """One group of sources at one number of requests at a time."""
    longest = max(len(item.prompt_ids) + len(item.response_ids) for item in items)
    arms = build_arms(names, model, stores, concurrency, longest)
    served = [(item.prompt_ids, item.response_ids) for item in items[-_PAPER_CALLS:]]
    items = items[:-_PAPER_CALLS]
    num_warm = max(concurrency, 3)
    jobs, size = jobs_of(items[:-num_warm]), batch_size(concurrency)
    batches = [jobs[at : at + size] for at in range(0, len(jobs) - size + 1, size)]
    try:
        for arm in arms:
            serve_scripted(arm.engine.drafter, served, model.config.vocab_size, arm.budget or _PAPER_BUDGET)
        found = run_arms(arms, jobs_of(items[-num_warm:]), batches, concurrency, limit_s, clock)
        details = fused_details(next((arm for arm in arms if arm.name == "fused"), arms[0]))
    finally:
        for arm in arms:
            arm.close()
    result: dict[str, Any] = {
        "concurrency": concurrency,
        "batches": len(found["plain"]["tokens"]),
        "arms": found,
        "fused": details,
    }
    if "fused" in found:
        result["fused_over"] = {name: ratio(found, "fused", name) for name in found if name != "fused"}
    return result


def take_calls(
    paths: Sequence[Path], words: Any, *, calls: int, prompt: int, response: int, half: int, per_episode: int = 1
) -> list[WorkItem]:
    """Calls of each file: the sources in turn, so that a batch holds all of them."""
    encode = partial(words.encode, add_special_tokens=False)
    work = Workload.from_paths(paths, encode, Limits(calls, prompt, response, half, per_episode))
    by_source: dict[str, list[WorkItem]] = {}
    for item in work.items:
        by_source.setdefault(item.source, []).append(item)
    mixed = []
    for row in range(max(map(len, by_source.values()))):
        mixed += [items[row] for items in by_source.values() if row < len(items)]
    return mixed


def shortened(item: WorkItem) -> WorkItem:
    """With a quarter of the prompt: many at a time would spend the benchmark reading."""
    return replace(item, prompt_ids=item.prompt_ids[-len(item.prompt_ids) // 4 :])


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--agents", nargs="*", type=Path, default=[])
    parser.add_argument("--controls", nargs="*", type=Path, default=[])
    parser.add_argument("--calls", type=int, default=2, help="of each agent source")
    parser.add_argument("--control-calls", type=int, default=32, help="of each control source")
    parser.add_argument("--train-calls", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=60, help="of CPU time, for each group and concurrency")
    parser.add_argument("--agent-concurrency", default="1,16")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32", help="of the controls")
    parser.add_argument(
        "--alone", default="suffix@6,ppm@8,ppm=8,suffix~8", help="single drafters that agents' calls alone are timed by"
    )
    parser.add_argument("--together", default="suffix@1,ppm@1,ppm@2,ppm=2,suffix~2", help="and several at a time")
    parser.add_argument("--model", default="small", help=f"the target: small, or {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", help="of its random weights")
    parser.add_argument("--clock", default="cpu", choices=("cpu", "wall"))
    parser.add_argument("--stores", type=Path, default=Path(tempfile.gettempdir()) / "specdec-adaptive-stores")
    parser.add_argument("--prepare", action="store_true", help="train the stores and stop")
    parser.add_argument(
        "--arrivals", type=Path, help="serve the agents' calls as they come here, and simulate the same"
    )
    parser.add_argument("--load-calls", type=int, default=8, help="of each agent source, for that")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    options.stores.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        for group, paths in (("agents", options.agents), ("controls", options.controls)):
            if paths:
                kept = take_calls(paths, words, calls=options.train_calls, prompt=options.prompt, response=400, half=0,
                                  per_episode=0)  # fmt: skip
                train_stores(kept, options.stores / group)
        return
    clock = use_cpu_clock() if options.clock == "cpu" else use_wall_clock()
    if options.model == "small":
        model = small_model(len(words) + (-len(words)) % 128)
    else:
        model = random_target(options.model, dtype=options.dtype).model
    size = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {
        "model": {"name": options.model, "parameters": size, "dtype": str(model.dtype).removeprefix("torch.")},
        "clock": options.clock,
    }
    if options.agents and options.agent_concurrency:
        items = take_calls(
            options.agents, words, calls=options.calls, prompt=options.prompt, response=options.response, half=1
        )
        result["agents"] = []
        for number in map(int, options.agent_concurrency.split(",")):
            names = ["plain", "fused", *(options.alone if number == 1 else options.together).split(",")]
            mine = items if number == 1 else [shortened(item) for item in items]
            result["agents"].append(
                measure_group(model, mine, options.stores / "agents", names, number, options.seconds, clock)
            )
            keep(result, options.json)
    if options.arrivals:
        items = take_calls(options.agents, words, calls=options.load_calls, prompt=256, response=48, half=1)
        result["validation"] = validate(model, items, options, clock)
        print(json.dumps(result["validation"], indent=1), flush=True)
        if options.json:
            write_json(options.json, result)
    if options.controls:
        limits = {"calls": options.control_calls, "response": options.response, "prompt": 128}
        items, result["controls"] = take_calls(options.controls, words, half=1, **limits), []
        for number in map(int, options.concurrency.split(",")):
            mine = items[: max(6 * number, 51) + _PAPER_CALLS]
            result["controls"].append(
                measure_group(
                    model, mine, options.stores / "controls", ["plain", "fused"], number, options.seconds, clock
                )
            )
            keep(result, options.json)


def validate(
    model: Any, items: Sequence[WorkItem], options: argparse.Namespace, clock: TurnClock
) -> list[dict[str, Any]]:
    """The simulator against served loads of three policies that take turns; the costs are those of all their steps."""
    limits = LoadLimits(max_batch_size=8, max_prefill_tokens=256)
    arrivals = fit_arrivals(list(islice(read_arrivals(options.arrivals), 5000)), items, seconds=options.seconds)
    route = choose_route(model, max_length=model_max_length(model))
    make = partial(build_engine, model, route=route, kv_tokens=8 * 1400, max_batch_size=8, max_prefill_tokens=256)
    record = record_acceptance(items, make_drafter("fused", options.stores / "agents"), budget=32)
    costs, engines = CostModel(), dict[str, Engine]()
    for name, drafter, budget in (("adaptive", "fused", None), ("none", "none", 0), ("static-4", "fused", 4)):
        guesser = NoDrafter() if drafter == "none" else make_drafter("fused", options.stores / "agents")
        engine = engines[name] = make(guesser, budget=budget)
        if isinstance(engine.controller, AdaptiveController):
            measured = measure_costs(engine.target, batches=(1, 4, 8), contexts=(128, 512))
            costs = CostModel.of_dict(measured.as_dict())
            engine.controller.costs.take(measured)
    for name, engine in engines.items():
        engine.controller = TimedController(engine.controller, costs, clock, drafts=name != "none")
    try:
        served = serve_in_turns(engines, arrivals, items, clock)
    finally:
        for engine in engines.values():
            engine.close()
    return [prediction_errors(real, arrivals, costs, record, Policy(name), limits) for name, real in served.items()]


def keep(result: dict[str, Any], path: Path | None) -> None:
    """Show the newest group and write what there is."""
    report([*result.get("agents", []), *result.get("controls", [])][-1])
    if path:
        write_json(path, result)


def report(group: dict[str, Any]) -> None:
    """The figures of one group as text."""
    print(f"x{group['concurrency']}, {group['batches']} batches")
    for name, arm in sorted(group["arms"].items(), key=lambda pair: -pair[1]["tokens_per_s"]):
        over = group.get("fused_over", {}).get(name)
        text = f"fused is {over['ratio']:.3f} of it ({over['low']:.3f} to {over['high']:.3f})" if over else ""
        print(f"  {name:14} {arm['tokens_per_s']:8.1f} tok/s  tau {arm['acceptance_length']:.2f}"
              f"  drafted {arm['drafted_per_step']:.1f}  {text}")  # fmt: skip
    print("  ", {k: v for k, v in group["fused"].items() if k != "reliability"}, flush=True)


if __name__ == "__main__":
    main()
