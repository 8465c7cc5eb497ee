"""Host time of an engine step outside the model's forward, over batch size and context length.

    python -m specdec.bench.engine_overhead --json bench/results/engine_overhead.json

The model is a tiny Llama that repeats its last token, so that the drafter's table knows the answer: every step drafts
the same tree of 8 nodes, and the target takes its second branch, the case in which KV rows have to move.

- ``overhead_ms``: ``Engine.step`` minus the call of the Hugging Face model, in CPU time of the one thread that does it
  all: it never waits, so on an idle machine this is also the wall time, and on a busy one the neighbours stay out of
  it. Scheduling, drafting, the flat batch, slots, masks, verification, commit and events are all in it.
- ``overhead_wall_ms``: the same by the clock on the wall.
- ``attention_ms``: CPU time inside our attention function, which is a part of the model's forward; reported apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.attention import StepAttention
from specdec.bench.measure import write_json
from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.probe import probe
from specdec.protocols import DrafterNeeds
from specdec.sampling import Sampler
from specdec.tree_target import TreeTarget
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent
from specdec.verifier.match import MatchVerifier

__all__ = ["main", "measure"]

VOCAB_SIZE = 1000
# root -> 1, 2;  1 -> 3;  2 -> 4, 5;  4 -> 6;  5 -> 7, 8.  The model takes 2 -> 5 -> 8.
PARENTS = np.array([-1, 0, 0, 1, 2, 2, 4, 5, 5], dtype=np.int32)
SHIFTS = np.array([0, 1, 0, 2, 3, 0, 4, 5, 0], dtype=np.int32)  # 0: the token that the model repeats
BATCH_SIZES = (1, 2, 4, 8, 16)
CONTEXT_LENGTHS = (128, 512, 2048, 8192)
GRID_LENGTH = 512  # the context length at which all batch sizes are measured
BARS_MS = {1: 0.5, 16: 2.0}


class TableDrafter:
    """The same tree in every step."""

    needs = DrafterNeeds()

    def start(self, states: Sequence[RequestState]) -> None:
        pass

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            last = state.token_ids[-1]
            if budget < len(PARENTS) - 1:
                trees.append(DraftTree.root_only(int(last)))
            else:
                trees.append(DraftTree((last + SHIFTS) % VOCAB_SIZE, PARENTS))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        pass

    def stop(self, request_ids: Sequence[str]) -> None:
        pass


class Clock:
    """Wraps a callable and adds up the CPU and wall time spent in it."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._spent = np.zeros(2)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = _now()
        try:
            return self.function(*args, **kwargs)
        finally:
            self._spent += _now() - start

    def take_ms(self) -> Any:
        """(CPU, wall) milliseconds since the last call."""
        spent, self._spent = self._spent, np.zeros(2)
        return 1e3 * spent


def _now() -> Any:
    return np.array([thread_time(), perf_counter()])


def copying_model(max_length: int) -> LlamaForCausalLM:
    """A tiny Llama whose layers hardly move the residual stream: the next token is the last one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.mul_(0.1 if parameter.ndim > 1 else 1.0)
    return model


def measure(model: LlamaForCausalLM, batch_size: int, context_length: int, *, num_steps: int) -> dict[str, Any]:
    """Medians over ``num_steps`` decoding steps, in milliseconds."""
    num_new = 4 * (num_steps + 8)
    length = context_length + num_new
    target = TreeTarget(
        model,
        probe(model, limit=64),
        kv_tokens=batch_size * (length + TreeTarget.max_draft_tokens),
        max_length=length,
        max_batch_size=batch_size,
        max_step_tokens=512,
    )
    forward = Clock(model)
    target.model = forward
    engine = Engine(
        target,
        MatchVerifier(Sampler(VOCAB_SIZE)),
        TableDrafter(),
        FixedController(len(PARENTS) - 1),
        config=EngineConfig(max_batch_size=batch_size, max_prefill_tokens=512),
    )
    rng = np.random.default_rng(0)
    for index in range(batch_size):
        prompt = rng.integers(0, VOCAB_SIZE, context_length).astype(np.int32)
        engine.submit(Request(str(index), prompt, SamplingParams(max_new_tokens=num_new)))
    states = list(engine.scheduler.waiting)
    while any(state.num_steps < 4 for state in states):
        engine.step()
    attend, step = Clock(StepAttention.attend), Clock(engine.step)
    StepAttention.attend = lambda *args: attend(*args)  # type: ignore[method-assign]
    rows, num_tokens = [], 0
    try:
        for clock in (forward, attend):
            clock.take_ms()
        for _ in range(num_steps):
            num_tokens += sum(len(output.new_ids) for output in step())
            rows.append((step.take_ms(), forward.take_ms(), attend.take_ms()))
    finally:
        StepAttention.attend = attend.function  # type: ignore[method-assign]
    for state in states:
        engine.cancel(state.request_id)
    steps, forwards, attentions = (np.array(column) for column in zip(*rows, strict=True))  # [num_steps, (cpu, wall)]
    cpu_ms, wall_ms = (steps - forwards).T
    return {
        "batch_size": batch_size,
        "context_length": context_length,
        "num_steps": num_steps,
        "tokens_per_request_step": num_tokens / num_steps / batch_size,
        "overhead_ms": float(np.median(cpu_ms)),
        "overhead_ms_p10": float(np.percentile(cpu_ms, 10)),
        "overhead_ms_p90": float(np.percentile(cpu_ms, 90)),
        "overhead_wall_ms": float(np.median(wall_ms)),
        "model_ms": float(np.median(forwards[:, 0])),
        "attention_ms": float(np.median(attentions[:, 0])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m specdec.bench.engine_overhead", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--steps", type=int, default=200, help="measured steps of each cell")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    grid = [(size, GRID_LENGTH) for size in BATCH_SIZES]
    ends = (BATCH_SIZES[0], BATCH_SIZES[-1])
    grid += [(size, length) for length in CONTEXT_LENGTHS for size in ends if length != GRID_LENGTH]
    model = copying_model(max(CONTEXT_LENGTHS) + 8 * options.steps)
    rows = []
    print("batch context overhead ms     p10     p90 wall ms model ms attention")
    for size, length in grid:
        row = measure(model, size, length, num_steps=options.steps)
        rows.append(row)
        print(
            f"{size:5} {length:7} {row['overhead_ms']:11.3f} {row['overhead_ms_p10']:7.3f} "
            f"{row['overhead_ms_p90']:7.3f} {row['overhead_wall_ms']:7.3f} {row['model_ms']:8.2f} "
            f"{row['attention_ms']:9.2f}",
            flush=True,
        )
    missed = [
        f"batch {row['batch_size']}, context {row['context_length']}: {row['overhead_ms']:.3f} ms > {bar} ms"
        for row in rows
        if (bar := BARS_MS.get(row["batch_size"])) is not None and row["overhead_ms"] > bar
    ]
    if options.json is not None:
        write_json(options.json, {"tree_nodes": len(PARENTS) - 1, "bars_ms": BARS_MS, "rows": rows, "missed": missed})
    print("\n".join(missed) or "all bars held")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
