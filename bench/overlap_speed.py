"""Overlap forced on, against one step after the other: what it brings here, and what the costs promised.

    OMP_NUM_THREADS=1 python -m specdec.bench.overlap_speed --json OUT

The bundled model decodes some prompts with a cheap drafter (retrieval) and with a dear one (the bundled draft model),
in turn without overlap, in halves and in chunks. With one thread for torch a second core is free to draft; on a machine
whose cores all work for the target there is nothing to gain.

What halves promise is told for two machines: one on which the longer of forward and draft hides all of the shorter
(a device beside its host), and one on which it hides nothing (two threads that need one interpreter).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.measure import interleave, median_and_spread, write_json
from specdec.build import build_engine, load_drafter
from specdec.cost_model import CostModel
from specdec.engine import Engine
from specdec.overlap_costs import halves_gain
from specdec.types import Request, SamplingParams, StepEvent

__all__ = ["main"]

_BUNDLED = Path(__file__).parent
MODES = ("off", "halves", "chunks")
DRAFTERS = {
    "retrieval": "fused:suffix+ngram",
    "draft model": f"lm:{_BUNDLED / 'tiny_drafters' / 'lm'}?depth=4&min_gain=0",
}


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


class StepCosts:
    """Learns tables from steps and keeps how long each took (`specdec.protocols.Observer`)."""

    def __init__(self) -> None:
        self.tables = CostModel()
        self.steps: list[tuple[int, float, float]] = []  # (requests, drafting, forward) in ms
        self.tokens_each = 1.0

    def observe(self, events: Sequence[StepEvent]) -> None:
        trace, tokens = events[0].trace, sum(len(event.tree) for event in events)
        context = sum(event.state.num_tokens for event in events) / len(events)
        for part, ms in (("draft", trace.draft_ms), ("target", trace.target_ms), ("verify", trace.verify_ms)):
            self.tables.tables[part].observe(tokens, context, len(events), ms)
        self.tokens_each = tokens / len(events)
        self.steps.append((len(events), trace.draft_ms, trace.target_ms))

    def median_ms(self, num_requests: int) -> dict[str, float]:
        """Of the steps of so many requests; the first ones compile."""
        rows = np.array([step[1:] for step in self.steps[8:] if step[0] == num_requests])
        return dict(zip(("draft", "forward"), np.median(rows, axis=0).tolist(), strict=True))


def compare(model: Any, tokenizer: Any, drafter: str, requests: list[Request], repeats: int) -> dict[str, Any]:
    """Times of all ways, in turn; the text must be the same."""
    num, seen = len(requests), {mode: StepCosts() for mode in MODES}

    def engine(mode: str) -> Engine:
        made = load_drafter(drafter, model, tokenizer)
        return build_engine(
            model, made, budget=4, overlap=mode, kv_tokens=8000, max_prefill_tokens=4096, observers=[seen[mode]]
        )

    engines = {mode: engine(mode) for mode in MODES}
    try:
        said = {mode: texts(one.generate(requests)) for mode, one in engines.items()}
        work = {mode: partial(lambda one: texts(one.generate(requests)), one) for mode, one in engines.items()}
        seconds = interleave(work, repeats=repeats)
        plain = seen["off"]
        texts(engines["off"].generate(requests[: num // 2]))  # the tables know half batches too
    finally:
        for one in engines.values():
            one.close()
    ratios = {mode: np.array(seconds["off"]) / np.array(seconds[mode]) for mode in MODES[1:]}
    return {
        "drafter": drafter.replace(str(_BUNDLED), "bench"),
        "same_text": all(said[mode] == said["off"] for mode in MODES),
        "seconds": {mode: median_and_spread(values) for mode, values in seconds.items()},
        "gain": {
            mode: {"median": float(np.median(r)), "low": float(r.min()), "high": float(r.max())}
            for mode, r in ratios.items()
        },
        "promised": {
            name: halves_gain(plain.tables, num, 130.0, plain.tokens_each, hidden=hidden)
            for name, hidden in (("all hidden", 1.0), ("none hidden", 0.0))
        },
        "step_ms": {
            "whole batch": plain.median_ms(num),
            "half batch": plain.median_ms(num // 2),
            "half batch while the other is drafted for": seen["halves"].median_ms(num // 2),
        },
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
        for mode, gain in row["gain"].items():
            print(f"{row['drafter']}: {mode} {gain['median']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})")
        print(f"  halves were promised: {row['promised']}; {row['step_ms']}; same text: {row['same_text']}")
    if options.json:
        write_json(options.json, {"requests": options.requests, "tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
