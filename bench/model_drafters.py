"""Drafters that run a model, on the bundled model: acceptance length and tokens per second against plain decoding.

    python -m specdec.bench.model_drafters --json bench/results/model_drafters.json

The draft models are the model itself (the most that a draft model can be accepted, at the price of the target), the
same in groups of layers, its first three layers (early exit, not trained for it), and the trained heads and draft model
under ``bench/tiny_drafters`` where these are there. N-gram lookup stands beside them. The bundled model has no
multi-token-prediction layers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.edit_tasks import heldout_files, heldout_tasks
from specdec.bench.measure import write_json
from specdec.bench.tiny_eval import edit_prompt, load_model
from specdec.build import build_engine
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["main", "measure"]

_TINY = Path(__file__).parent / "tiny"
_CHAIN = "top_k=1&width=1&depth=4&min_gain=0"
_BUDGET = {"chain": 4, "tree": 12}
_TRAINED = Path(__file__).parent / "tiny_drafters"


def measure(model: Any, tokenizer: Any, drafter: str, prompts: Sequence[IntArray], **options: Any) -> dict[str, float]:
    """Decode all prompts, ``batch`` at a time, and sum up."""
    batch, temperature, num_new = options.pop("batch"), options.pop("temperature"), options.pop("num_new")
    sampling = SamplingParams(max_new_tokens=num_new, temperature=temperature, seed=11)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    with build_engine(model, drafter, tokenizer=tokenizer, max_batch_size=batch, **options) as engine:
        list(engine.generate([Request("warm-up", prompts[0], SamplingParams(max_new_tokens=8))]))
        start, cpu_start = perf_counter(), process_time()
        last = {output.request_id: output.state for output in engine.generate(requests)}
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
    tokens = sum(state.num_output_tokens for state in last.values())
    steps = sum(state.num_steps for state in last.values())
    return {
        "acceptance_length": tokens / steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,  # with one thread: what a machine that is not free cannot spoil
        "steps": steps,
    }


def _arms() -> dict[str, dict[str, Any]]:
    whole = f"lm:{_TINY}?"
    short = {"drafter": f"early-exit:3?{_CHAIN}", "budget": _BUDGET["chain"]}
    trained: dict[str, dict[str, Any]] = {}
    if (_TRAINED / "eagle3").is_dir():
        head = f"eagle:{_TRAINED / 'eagle3'}"
        trained |= {
            "EAGLE-3, chain of 4": {"drafter": f"{head}?probe=0&min_gain=0&top_k=1&depth=4", "budget": 4},
            "EAGLE-3, tree of 12": {"drafter": f"{head}?probe=0&min_gain=0&top_k=4&depth=5", "budget": 12},
            "EAGLE-3, tree of 59": {"drafter": f"{head}?probe=0&min_gain=0&top_k=10&depth=7", "budget": 59},
        }
    if (_TRAINED / "dspark").is_dir():
        trained["DSpark, chain of 4"] = {"drafter": f"diffusion:{_TRAINED / 'dspark'}?probe=0&length=4", "budget": 4}
    if (_TRAINED / "lm").is_dir():
        trained["draft model, chain of 4"] = {"drafter": f"lm:{_TRAINED / 'lm'}?{_CHAIN}", "budget": 4}
    return {
        "plain": {"drafter": "none", "budget": 0},
        "n-gram, chain of 4": {"drafter": "ngram", "budget": 4},
        **trained,
        "itself, chain of 4": {"drafter": whole + _CHAIN, "budget": _BUDGET["chain"]},
        "itself, tree of 12": {"drafter": whole + "top_k=3&width=3&depth=4&min_gain=0", "budget": _BUDGET["tree"]},
        "itself, stops by gain": {"drafter": whole + "top_k=3&width=3&depth=8&min_gain=0.6", "budget": _BUDGET["tree"]},
        "itself, groups of 2": {"drafter": f"layer-parallel:{_TINY}?n=2&force=1&{_CHAIN}", "budget": _BUDGET["chain"]},
        "itself, groups of 4": {"drafter": f"layer-parallel:{_TINY}?n=4&force=1&{_CHAIN}", "budget": _BUDGET["chain"]},
        "first 3 layers": short,
        "first 3 layers, block": {**short, "verifier": "block"},
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--arms", nargs="*", help="only those whose names begin like this")
    parser.add_argument("--counts-only", action="store_true", help="no wall times: for a machine that is not free")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load_model(_TINY)
    edits = [edit_prompt(tokenizer, task.user) for task in heldout_tasks(args.prompts)]
    free = [tokenizer(file.text[:600])["input_ids"] for file in heldout_files()[: args.prompts]]
    results: list[dict[str, Any]] = []
    arms = {
        arm: options
        for arm, options in _arms().items()
        if not args.arms or any(arm.startswith(name) for name in args.arms)
    }
    for kind, prompts in (("edits", edits), ("free code", free)):
        texts = [np.array(ids[-1500:], dtype=np.int32) for ids in prompts]
        for temperature, batch, (arm, options) in itertools.product((0.0, 0.8), args.batches, arms.items()):
            shape = {"batch": batch, "temperature": temperature, "num_new": args.new_tokens}
            row = measure(model, tokenizer, prompts=texts, **options, **shape)
            if args.counts_only:
                del row["tokens_per_second"]
            results.append({"text": kind, "arm": arm, "batch": batch, "temperature": temperature, **row})
    write_json(args.json, {"what": "drafters that run a model, bundled model, float32", "rows": results})


if __name__ == "__main__":
    main()
