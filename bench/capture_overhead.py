"""What capturing traces costs a server: the same requests with and without it, pair after pair, in one engine.

    python -m specdec.bench.capture_overhead --json bench/results/capture_overhead.json

The bundled model decodes held-out edit tasks, four at a time, with the n-gram drafter, on one thread; traces go to a
spool on disk, a shard every ``--shard-s`` seconds, text looked through for what must not be kept. Three figures:

- wall: seconds of a block of requests with capture over those without, the same block in the same pair, the order of
  the two drawn at random; ``tokens per second`` is its inverse. Geometric mean over pairs, 95 % interval by bootstrap.
- CPU: the same for the CPU seconds of the whole process, here with everything on disk before the clock stops, so that
  the capture's own thread is counted in full.
- attributed: CPU seconds that the engine's thread spends inside ``TraceCapture.observe``, over those of its blocks; no
  difference between runs, so next to no noise. What stands beside it, the capture's thread, runs on another core where
  there is one, and shares Python's lock with the engine.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, process_time, thread_time
from typing import Any

import numpy as np
import torch

from specdec.bench.edit_tasks import heldout_tasks
from specdec.bench.measure import write_json
from specdec.bench.tiny_eval import edit_prompt, load_model
from specdec.build import build_engine
from specdec.engine import Engine
from specdec.online_training.capture import CaptureOptions, TraceCapture
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.privacy import Consent, KeyedHash, Redactor
from specdec.online_training.spool import Spool
from specdec.types import Request, SamplingParams, StepEvent

__all__ = ["main", "relative_cost"]

_TINY = Path(__file__).parent / "tiny"
_RESAMPLES = 4000


@dataclass(slots=True)
class _Timed:
    """A capture whose time on the engine's thread is added up (an ``Observer``)."""

    capture: TraceCapture
    seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)

    def observe(self, events: Sequence[StepEvent]) -> None:
        start = thread_time()
        self.capture.observe(events)
        spent = thread_time() - start
        self.seconds += spent
        self.step_ms.append(1e3 * spent)


def relative_cost(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Percent that the first of each pair is above the second: geometric mean and its 95 % bootstrap interval."""
    logs = np.log([first / second for first, second in pairs])
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (_RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "percent": round(100 * float(np.expm1(logs.mean())), 3),
        "interval_95_percent": [round(100 * float(np.expm1(bound)), 3) for bound in (low, high)],
    }


def _block(engine: Engine, requests: list[Request]) -> tuple[float, int]:
    start, tokens = perf_counter(), 0
    for output in engine.generate(requests):
        tokens += len(output.new_ids)
    return perf_counter() - start, tokens


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, tokenizer = load_model(_TINY)
    tasks = heldout_tasks(args.requests, min_lines=8, max_lines=25)
    prompts = [np.array(edit_prompt(tokenizer, task.user), dtype=np.int32) for task in tasks]
    law, names = SamplingParams(max_new_tokens=args.new_tokens), itertools.count()
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    target = fingerprint(model)  # before the engine packs the weights
    with build_engine(model, "ngram", tokenizer=tokenizer, max_batch_size=4) as engine:
        capture = TraceCapture(
            Spool(folder), consent=Consent(frozenset({"bench"})), hashes=KeyedHash(bytes(32)),
            target=target, options=CaptureOptions(shard_s=args.shard_s), redactor=Redactor(),
            decode=lambda ids: str(tokenizer.decode(ids)),
        )  # fmt: skip
        timed, end = _Timed(capture), monotonic() + args.seconds
        for index in itertools.count():
            row: dict[str, Any] = {"with_first": bool(rng.integers(2))}
            for arm in ("with", "without") if row["with_first"] else ("without", "with"):
                requests = [Request(f"r{next(names)}", prompt, law, "bench") for prompt in prompts]
                engine.observers[:] = [timed] if arm == "with" else []
                cpu, own, inside = process_time(), thread_time(), timed.seconds
                seconds, row["tokens"] = _block(engine, requests)
                row |= {f"wall_{arm}": seconds, f"engine_cpu_{arm}": thread_time() - own}
                row["observe_cpu"] = max(row.get("observe_cpu", 0.0), timed.seconds - inside)
                capture.flush()
                row[f"cpu_{arm}"] = process_time() - cpu
            if index:  # the first pair warms up
                rows.append(row)
            if monotonic() > end and len(rows) >= 2:
                break
        capture.close()
    counts = dict(capture.counts)
    per_step = sorted(timed.step_ms)
    return {"rows": rows, "counts": counts, "observe_ms_median": per_step[len(per_step) // 2],
            "observe_ms_p99": per_step[int(0.99 * len(per_step))], "steps": len(per_step)}  # fmt: skip


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--requests", type=int, default=8, help="of a block")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--shard-s", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(args, Path(folder))
    rows = found.pop("rows")
    tokens = sum(row["tokens"] for row in rows)
    summary: dict[str, Any] = {
        "pairs": len(rows),
        "wall": relative_cost([(row["wall_with"], row["wall_without"]) for row in rows]),
        "cpu": relative_cost([(row["cpu_with"], row["cpu_without"]) for row in rows]),
        "engine_thread_cpu": relative_cost([(row["engine_cpu_with"], row["engine_cpu_without"]) for row in rows]),
        "attributed": relative_cost(
            [(row["engine_cpu_with"], row["engine_cpu_with"] - row["observe_cpu"]) for row in rows]
        ),
        "tokens_per_second_without": round(tokens / sum(row["wall_without"] for row in rows), 1),
        "tokens_per_second_with": round(tokens / sum(row["wall_with"] for row in rows), 1),
        **found,
    }
    what = "cost of capturing traces in token mode, bundled model, float32, one thread"
    write_json(args.json, {"what": what, "settings": vars(args) | {"json": None}, **summary, "rows": rows})
    print(summary)


if __name__ == "__main__":
    main()
