"""Does ``torch.compile`` make a plain step of the engine faster on the CPU? Dense and packed, with and without it.

    python -m specdec.bench.compile_speed --json bench/results/compile_speed.json

Compiled are the MLP and the norms of every layer: what lies between the products and attention, which our own code
computes and a compiler would have to leave. All arms decode greedily behind the same prompt, in turn, in one process; a
figure is the median gap between two tokens of a run. An arm that cannot be compiled says why.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.bench.measure import write_json
from specdec.bench.packed_speed import Decode, by_engine, step_times
from specdec.bench.targets import SHAPES, random_target
from specdec.build import build_engine
from specdec.routes import choose_route

__all__ = ["compare", "main"]

_MAX_LENGTH = 1024


def _compile(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=True)


def compare(shape: Any, dtype: str, *, num_prompt: int, num_new: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a plain step of every arm, and how much faster compiling makes it, pair by pair."""
    model = random_target(shape, dtype=dtype).model
    prompt_ids = np.random.default_rng(0).integers(10, model.config.vocab_size, num_prompt).astype(np.int32)
    options: dict[str, Any] = {
        "budget": 0, "route": choose_route(model, max_length=_MAX_LENGTH), "kv_tokens": _MAX_LENGTH,
        "max_length": _MAX_LENGTH, "max_batch_size": 1,
    }  # fmt: skip
    arms: dict[str, Decode] = {}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        for is_packed in (False, True):
            for is_compiled in (False, True):
                name = f"{'packed' if is_packed else 'dense'}{', compiled' if is_compiled else ''}"
                engine = stack.enter_context(build_engine(copy.deepcopy(model), "none", packed=is_packed, **options))
                decode = by_engine(engine)
                try:
                    if is_compiled:
                        _compile(engine.target.model)  # type: ignore[attr-defined]
                    decode(prompt_ids, 4)
                    arms[name] = decode
                except Exception as error:  # noqa: BLE001  -- whatever a compiler raises is the arm's result
                    errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        times = step_times(arms, prompt_ids, num_new=num_new, repeats=repeats)
    faster = {
        name: _spread([a / b for a, b in zip(times[name], times[f"{name}, compiled"], strict=True)])
        for name in ("dense", "packed")
        if f"{name}, compiled" in times
    }
    rows = {name: _spread(row) for name, row in times.items()}
    return {"step_ms": rows, "compiled_is_faster_by": faster, "errors": errors}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="of the randomly initialised model")
    parser.add_argument("--layers", type=int, default=6, help="of it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = {**SHAPES[args.shape], "num_hidden_layers": args.layers}
    results = {
        dtype: compare(shape, dtype, num_prompt=128, num_new=10, repeats=args.repeats)
        for dtype in ("bfloat16", "float32")
    }
    what = "one plain step of the engine on the CPU with and without torch.compile, random weights, batch 1"
    write_json(args.json, {"what": what, "shape": args.shape, "layers": args.layers, "results": results})
    for dtype, result in results.items():
        print(dtype, result)


if __name__ == "__main__":
    main()
