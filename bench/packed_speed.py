"""A plain step on the CPU: this engine, dense, packed and strict, against transformers eager, static and compiled.

    python -m specdec.bench.packed_speed --dtype bfloat16 --json bench/results/packed_speed_bfloat16.json

All decode greedily behind the same prompt, in turn, in one process; a run's figure is the median gap between two of
its tokens, as a streamer sees them, so each side's whole loop is in it. transformers' arms and the dense engine share
one model, the other engines have one each. After that, the cost of an engine step by the number of tokens in it: dense,
packed, and packed with strict numerics.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from specdec.bench.cost_curve import step_costs
from specdec.bench.measure import write_json
from specdec.bench.targets import random_target
from specdec.build import build_engine
from specdec.engine import Engine
from specdec.packed_linear import PackedLinear
from specdec.routes import choose_route
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["main", "step_times"]

_STEP_SIZES = (1, 2, 3, 5, 9, 17, 33)
_MAX_LENGTH = 2048
_NUM_WARM = 2  # gaps that are not counted: the first token waits for the prompt, the next may wait for a compiler

Decode = Callable[[IntArray, int], list[float]]  # (prompt, new tokens) -> when each token was there


class _Stamps:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.at.append(perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


def by_transformers(model: PreTrainedModel, **config: Any) -> Decode:
    """``model.generate`` with these fields of its ``GenerationConfig``."""

    def decode(prompt_ids: IntArray, num_new: int) -> list[float]:
        stamps = _Stamps()
        ids = torch.from_numpy(prompt_ids.astype(np.int64))[None]
        wanted = GenerationConfig(do_sample=False, max_new_tokens=num_new, pad_token_id=0, **config)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted, streamer=stamps)
        return stamps.at[1:]  # the first one is the prompt

    return decode


def by_engine(engine: Engine) -> Decode:
    """An engine whose budget is 0."""

    def decode(prompt_ids: IntArray, num_new: int) -> list[float]:
        request = Request("one", prompt_ids, SamplingParams(max_new_tokens=num_new))
        return [perf_counter() for _ in engine.generate([request])]

    return decode


def step_times(
    arms: Mapping[str, Decode], prompt_ids: IntArray, *, num_new: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of a step of every arm, one figure per round; the arms in turn, after one untimed round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for round_index in range(repeats + 1):
        for name, decode in arms.items():
            gaps = np.diff(decode(prompt_ids, num_new))[_NUM_WARM:]
            if round_index:
                found[name].append(1e3 * float(np.median(gaps)))
    return found


def _summary(times: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    rows = {
        name: {"median_ms": statistics.median(row), "min_ms": min(row), "max_ms": max(row)}
        for name, row in times.items()
    }
    ratios = {}
    for name, row in times.items():
        if name != ours:
            pairs = [other / own for other, own in zip(row, times[ours], strict=True)]
            ratios[name] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    return {"step_ms": rows, "speedup_of_packed_over": ratios}


def _bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights of all linear layers, packed ones as oneDNN pads them."""
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    packed = [m for m in layers if m.weight.is_mkldnn]
    return {
        "num_packed_layers": len(packed),
        "packed_bytes": sum(torch.ops.mkldnn._nbytes(m.weight) for m in packed),
        "bytes_when_dense": sum(m.weight.numel() * m.weight.itemsize for m in packed),
    }


def _read_bandwidth() -> float:
    """GB/s of summing 1 GiB, the best of five: what a step that only read its weights would get."""
    block = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = perf_counter()
        block.sum()
        seconds.append(perf_counter() - start)
    return block.nbytes / min(seconds) / 1e9


def _compare(shape: str, dtype: str, num_prompt: int, num_new: int, repeats: int) -> dict[str, Any]:
    model = random_target(shape, dtype=dtype).model
    route = choose_route(model, max_length=_MAX_LENGTH)
    prompt_ids = np.random.default_rng(0).integers(10, model.config.vocab_size, num_prompt).astype(np.int32)
    compiled = CompileConfig(fullgraph=False, dynamic=False, mode="default")
    compiled._compile_all_devices = True  # else transformers compiles on a GPU only
    options: dict[str, Any] = {
        "budget": 0, "route": route, "kv_tokens": _MAX_LENGTH, "max_length": _MAX_LENGTH, "max_batch_size": 1,
    }  # fmt: skip
    with ExitStack() as stack:
        dense = stack.enter_context(build_engine(model, "none", packed=False, **options))
        own = copy.deepcopy(model)
        start = perf_counter()
        packed = stack.enter_context(build_engine(own, "none", packed=True, **options))
        seconds = perf_counter() - start
        strict = stack.enter_context(build_engine(copy.deepcopy(model), "none", numerics="strict", **options))
        arms = {
            "transformers eager": by_transformers(model),
            "transformers static cache": by_transformers(model, cache_implementation="static", disable_compile=True),
            "transformers compiled": by_transformers(model, cache_implementation="static", compile_config=compiled),
            "engine": by_engine(dense),
            "engine packed": by_engine(packed),
            "engine strict": by_engine(strict),
        }
        times = step_times(arms, prompt_ids, num_new=num_new, repeats=repeats)
        curves = {
            name: {
                str(size): statistics.median(row)
                for size, row in step_costs(engine, prompt_ids, _STEP_SIZES, repeats=repeats).items()
            }
            for name, engine in (("engine", dense), ("engine packed", packed), ("engine strict", strict))
        }
        return {
            "prompt_tokens": num_prompt,
            "new_tokens": num_new,
            "repeats": repeats,
            **_summary(times, "engine packed"),
            "target_ms_by_tokens_in_the_step": curves,
            "weights": _bytes(own),
            "packing_seconds": seconds,
            "weight_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="of the randomly initialised model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    result = _compare(args.shape, args.dtype, args.prompt_tokens, args.new_tokens, args.repeats)
    result["read_gb_per_s"] = _read_bandwidth()
    what = "one plain step on the CPU, random weights, batch 1"
    write_json(args.json, {"what": what, "shape": args.shape, "dtype": args.dtype, **result})
    for name, row in result["step_ms"].items():
        ratio = result["speedup_of_packed_over"].get(name)
        text = (
            f", packed is {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) times as fast"
            if ratio
            else ""
        )
        print(f"{name:27} {row['median_ms']:7.1f} ms{text}")


if __name__ == "__main__":
    main()
