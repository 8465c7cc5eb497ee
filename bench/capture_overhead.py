"""What capturing traces costs a server in tokens per second: the same requests with and without, in turn.

    python -m specdec.bench.capture_overhead --json bench/results/capture_overhead.json

The bundled model decodes held-out edit tasks, four at a time, with the n-gram drafter; traces go to a spool on disk,
one shard a second, text looked through for what must not be kept. Arms alternate within one process; the figure is the
median over rounds of the ratio between neighbours.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
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
from specdec.types import Request, SamplingParams

__all__ = ["main"]

_TINY = Path(__file__).parent / "tiny"


def _seconds(engine: Engine, requests: list[Request]) -> tuple[float, int]:
    start, tokens = perf_counter(), 0
    for output in engine.generate(requests):
        tokens += len(output.new_ids)
    return perf_counter() - start, tokens


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(_TINY)
    tasks = heldout_tasks(args.requests, min_lines=8, max_lines=25)
    prompts = [np.array(edit_prompt(tokenizer, task.user), dtype=np.int32) for task in tasks]
    names = itertools.count()

    def asked() -> list[Request]:
        law = SamplingParams(max_new_tokens=args.new_tokens)
        return [Request(f"r{next(names)}", prompt, law, "bench") for prompt in prompts]

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        target = fingerprint(model)
        with build_engine(model, "ngram", tokenizer=tokenizer, max_batch_size=4) as engine:
            capture = TraceCapture(
                Spool(Path(folder)), consent=Consent(frozenset({"bench"})), hashes=KeyedHash(bytes(32)), target=target,
                options=CaptureOptions(shard_s=1.0), redactor=Redactor(), decode=lambda ids: str(tokenizer.decode(ids)),
            )  # fmt: skip
            for index in range(args.rounds + 1):
                seconds: dict[str, float] = {}
                for arm in ("without", "with") if index % 2 else ("with", "without"):
                    engine.observers[:] = [capture] if arm == "with" else []
                    seconds[arm], tokens = _seconds(engine, asked())
                if index:  # the first round warms up
                    rows.append({**seconds, "tokens": tokens, "ratio": seconds["with"] / seconds["without"]})
            capture.close()
        written = capture.counts["written"]
    ratios = sorted(row["ratio"] for row in rows)
    summary = {
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "quartiles_percent": [100 * (ratios[len(ratios) // 4] - 1), 100 * (ratios[3 * len(ratios) // 4] - 1)],
        "tokens_per_second_without": statistics.median(row["tokens"] / row["without"] for row in rows),
        "tokens_per_second_with": statistics.median(row["tokens"] / row["with"] for row in rows),
        "requests_written": written,
    }
    what = "cost of capturing traces in token mode, bundled model, float32, one thread"
    write_json(args.json, {"what": what, "settings": vars(args) | {"json": None}, **summary, "rounds": rows})
    print(summary)


if __name__ == "__main__":
    main()
