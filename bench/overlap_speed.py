"""Half batches against one engine: what drafting beside the forward brings here, and what the costs promised.

    OMP_NUM_THREADS=1 python -m specdec.bench.overlap_speed --json OUT

The bundled model decodes some prompts with a cheap drafter (retrieval) and with a dear one (the bundled draft model),
in turn by one engine and by two halves. With one thread for torch a second core is free to draft; on a machine whose
cores all work for the target there is nothing to gain.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.measure import interleave, median_and_spread, write_json
from specdec.build import build_engine, load_drafter
from specdec.controller_adaptive import AdaptiveController
from specdec.engine import Engine
from specdec.halves import HalfBatches, overlap_gain
from specdec.types import Request, SamplingParams

__all__ = ["main"]

_BUNDLED = Path(__file__).parent
DRAFTERS = {"retrieval": "fused:suffix+ngram", "draft model": f"lm:{_BUNDLED / 'tiny_drafters' / 'lm'}?depth=4"}


def requests_of(tokenizer: Any, count: int, num_new: int) -> list[Request]:
    """Prompts that differ, of one text."""
    ids = np.array(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")), dtype=np.int32)
    return [Request(f"r{i}", ids[20 * i : 20 * i + 100], SamplingParams(max_new_tokens=num_new)) for i in range(count)]


def texts(outputs: Any) -> dict[str, list[int]]:
    """Tokens by request."""
    found: dict[str, list[int]] = {}
    for output in outputs:
        found.setdefault(output.request_id, []).extend(output.new_ids)
    return found


def compare(model: Any, tokenizer: Any, drafter: str, requests: list[Request], repeats: int) -> dict[str, Any]:
    """Times of both ways, in turn; the text must be the same."""

    def engine() -> Engine:
        controller = AdaptiveController(max_budget=4)  # it learns what the parts of a step cost
        return build_engine(model, load_drafter(drafter, model, tokenizer), controller=controller, kv_tokens=8000)

    with engine() as whole, HalfBatches([engine(), engine()]) as halves:
        same = texts(whole.generate(requests)) == texts(halves.generate(requests))
        arms = {"one engine": whole, "halves": halves}
        seconds = interleave(
            {name: partial(lambda arm: texts(arm.generate(requests)), arm) for name, arm in arms.items()},
            repeats=repeats,
        )
        costs = whole.controller.costs  # type: ignore[attr-defined]
        ratios = [a / b for a, b in zip(seconds["one engine"], seconds["halves"], strict=True)]
        return {
            "drafter": drafter.replace(str(_BUNDLED), "bench"),
            "same_text": same,
            "seconds": {name: median_and_spread(values) for name, values in seconds.items()},
            "gain": {"median": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)},
            "promised": overlap_gain(costs, len(requests), 130.0, 2.0),
        }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=_BUNDLED / "tiny")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    requests = requests_of(tokenizer, options.requests, options.tokens)
    rows = [compare(model, tokenizer, drafter, requests, options.repeats) for drafter in DRAFTERS.values()]
    for row in rows:
        gain = row["gain"]
        print(f"{row['drafter']}: halves {gain['median']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f}), the costs "
              f"promised {row['promised']:.2f}x; same text: {row['same_text']}")  # fmt: skip
    if options.json:
        write_json(options.json, {"requests": options.requests, "tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
