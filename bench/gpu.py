"""Every bar that only a GPU can show, in one command of a few minutes.

    specdec bench --gpu --out bench/results/gpu.json

The parts run one after the other, the quick and telling ones first. Each has a share of the time (``SECONDS``) and
leaves out what does not fit, by name; the result is written anew after every part, so that what was measured is kept
whatever happens; a part that fails leaves its error there and the others run. ``--tiny`` runs all of it at toy sizes,
on a CPU in Triton's interpreter if need be (``TRITON_INTERPRET=1``): its figures mean nothing, but a mistake in a
benchmark shows before a GPU is there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.bench import gpu_kernels, gpu_target
from specdec.bench.gpu_clock import Clock
from specdec.bench.gpu_replay import replay
from specdec.bench.targets import Target, random_target
from specdec.build import build_engine
from specdec.kernels.launch import interpreted_in_order
from specdec.routes import Route, choose_route
from specdec.step_buffers import BUCKETS
from specdec.tree_target import TreeTarget

__all__ = ["FULL", "PARTS", "SECONDS", "TINY", "Scale", "run_gpu_bench"]

# Bars of the verdict: name -> (least, most), None where there is no such bound.
_BARS: Mapping[str, tuple[float | None, float | None]] = {
    "verify step over reading the weights": (None, 1.20),
    "verify step over plain step": (None, 1.10),
    "plain step faster than generate": (2.0, None),
    "idle between steps, us": (None, 100.0),
    "attention, least share of read bandwidth": (0.80, None),
    "attention, least gain over its peers": (1.0, None),
    "verification over reading the logits": (None, 2.0),
    "KV commit, us": (None, 30.0),
    "strict, differing requests": (None, 0.0),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Args:
        shape: of the model with random weights, see ``specdec.bench.targets``.
        strict_shape: of the one that decodes thousands of tokens.
        dtype: of both.
        read_bytes: for the bandwidth.
        heads: (query heads, KV heads, width) of the attention kernels.
        batches: requests per attention call.
        attention_contexts: cached tokens of each.
        nodes: of the trees of attention and verification.
        verify: (trees, vocabulary).
        context: of the single steps.
        verify_nodes: draft tokens of the verify step.
        sizes: tokens of the cost curve's steps.
        curve_contexts: of the cost curve.
        strict: (requests, tokens each, tokens of the shortest prompt).
        new_tokens: of the timed runs.
        repeats: of every timing.
        replay: (calls of each source, tokens of a prompt, tokens of an answer), the last two at most.
    """

    shape: str | dict[str, Any]
    strict_shape: str | dict[str, Any]
    dtype: torch.dtype
    read_bytes: int
    heads: tuple[int, int, int]
    batches: tuple[int, ...]
    attention_contexts: tuple[int, ...]
    nodes: int
    verify: tuple[int, int]
    context: int
    verify_nodes: int
    sizes: tuple[int, ...]
    curve_contexts: tuple[int, ...]
    strict: tuple[int, int, int]
    new_tokens: int
    repeats: int
    replay: tuple[int, int, int]


FULL = Scale(
    "llama-3-8b", "qwen2.5-0.5b", torch.bfloat16, 2**32, (32, 8, 128), (1, 8), (4096, 32_768, 131_072), 64,
    (8, 151_936), 2048, 32, BUCKETS, (512, 2048, 8192, 32_768), (40, 250, 24), 32, 20,
    (6, 2048, 128),
)  # fmt: skip
# Heads of 16: narrower ones end in the scalar tail of torch's vectors on a CPU, whose bits depend on the row.
_TINY_SHAPE = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
TINY = Scale(
    _TINY_SHAPE, _TINY_SHAPE, torch.float32, 2**12, (2, 1, 16), (1,), (20,), 2, (1, 50), 4, 2, (1, 3), (4,),
    (1, 2, 3), 1, 1, (1, 12, 6),
)  # fmt: skip


class _Bench:
    """What the parts share."""

    def __init__(self, scale: Scale, device: torch.device, traces: Sequence[Path] = ()) -> None:
        self.scale = scale
        self.traces = traces
        self.clock = Clock(device, repeats=scale.repeats)
        self.device = device
        self.read_gb_per_s = self.clock.read_gb_per_s(scale.read_bytes)
        self.ends_at = float("inf")  # of the part that runs
        self.left_out: list[str] = []

    def has_time(self, what: str) -> bool:
        """False if the part's time is up: ``what`` is then left out, and the result says so."""
        if perf_counter() < self.ends_at:
            return True
        self.left_out.append(what)
        return False

    @cached_property
    def target(self) -> Target:
        """The large model."""
        return self.make(self.scale.shape)

    @property
    def model(self) -> PreTrainedModel:
        """The large model itself."""
        return self.target.model

    @cached_property
    def route(self) -> Route:
        """Of the large model."""
        return choose_route(self.model, max_length=self.max_length, self_test=False)

    @property
    def max_length(self) -> int:
        """Most tokens of a request of any part."""
        return max(self.scale.curve_contexts) + 4 * max(self.scale.sizes)

    def make(self, shape: str | dict[str, Any]) -> Target:
        """A model with random weights, made where it runs."""
        dtype = str(self.scale.dtype).removeprefix("torch.")
        return random_target(shape, dtype=dtype, device=str(self.device))

    def options(self, **more: Any) -> dict[str, Any]:
        """Of an engine."""
        return {"kernels": "triton", "max_length": self.max_length, "max_batch_size": 4, **more}


def _attention(bench: _Bench) -> list[dict[str, Any]]:
    scale = bench.scale
    return [
        gpu_kernels.attention(
            bench.clock, read_gb_per_s=bench.read_gb_per_s, num_requests=batch, context=context,
            num_nodes=scale.nodes, heads=scale.heads, dtype=scale.dtype,
        )
        for context in scale.attention_contexts
        for batch in scale.batches
        if bench.has_time(f"attention, {batch} x {context}")
    ]  # fmt: skip


def _prefill(bench: _Bench) -> list[dict[str, Any]]:
    scale = bench.scale
    return [
        gpu_kernels.prefill(
            bench.clock, context=context, num_tokens=8 * scale.nodes, heads=scale.heads, dtype=scale.dtype
        )
        for context in (0, scale.context)
    ]


def _verify(bench: _Bench) -> dict[str, Any]:
    num_trees, vocab_size = bench.scale.verify
    return gpu_kernels.verify(
        bench.clock, read_gb_per_s=bench.read_gb_per_s, num_trees=num_trees, num_nodes=bench.scale.nodes,
        vocab_size=vocab_size, dtype=bench.scale.dtype,
    )  # fmt: skip


def _commit(bench: _Bench) -> dict[str, Any]:
    return gpu_kernels.commit(bench.clock, num_requests=8, num_reserved=bench.scale.nodes, num_columns=4096)


def _steps(bench: _Bench) -> dict[str, Any]:
    scale, model = bench.scale, bench.model
    begin = bench.clock.wait()
    with build_engine(
        model, "none", budget=0, route=bench.route, **bench.options(kv_tokens=bench.max_length)
    ) as engine:
        seconds = bench.clock.wait() - begin
        target = engine.target
        assert isinstance(target, TreeTarget)
        timer = gpu_target.StepTimer(target, bench.clock)
        timer.set_context(scale.context)
        plain, drafted = timer.ms(1), timer.ms(1 + scale.verify_nodes)
        timer.close()
        weight_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
        weight_bytes -= model.get_input_embeddings().weight.nbytes  # a step reads a few rows of it
        read_ms = weight_bytes / bench.read_gb_per_s / 1e6
        row: dict[str, Any] = {
            "context": scale.context, "weight_bytes": weight_bytes, "read_weights_ms": read_ms, "plain_step_ms": plain,
            "verify_step_ms": drafted, "start_s": seconds,
            "graph_bytes": target.runner.graph_bytes if target.runner is not None else 0,
        }  # fmt: skip
        row["engine"] = gpu_target.idle_us(engine, bench.clock, context=scale.context, num_new=4 * scale.new_tokens)
        contexts = [context for context in scale.curve_contexts if bench.has_time(f"cost curve at {context}")]
        row["curve"] = gpu_target.curve(timer, sizes=scale.sizes, contexts=contexts)
    if bench.has_time("generate"):
        row["generate_step_ms"] = gpu_target.generate_ms(
            model, bench.clock, context=scale.context, num_new=scale.new_tokens
        )
    return row


def _eager(bench: _Bench) -> dict[str, Any]:
    """What the graphs bring: the same steps launched one kernel at a time."""
    options = bench.options(kv_tokens=bench.max_length, graphs=False)
    with build_engine(bench.model, "none", budget=0, route=bench.route, **options) as engine:
        assert isinstance(engine.target, TreeTarget)
        timer = gpu_target.StepTimer(engine.target, bench.clock)
        timer.set_context(bench.scale.context)
        row = {"plain_step_ms": timer.ms(1), "verify_step_ms": timer.ms(1 + bench.scale.verify_nodes)}
        timer.close()
    return row


def _strict(bench: _Bench) -> dict[str, Any]:
    model = bench.make(bench.scale.strict_shape).model
    num_requests, num_new, num_prompt = bench.scale.strict
    max_length = num_prompt + 8 + 5 * num_requests + num_new
    route = choose_route(model, max_length=max_length, self_test=False)
    options = bench.options(max_length=max_length, max_batch_size=16, kv_tokens=max(16 * max_length, 200), route=route)
    with interpreted_in_order():  # on a GPU that is the way of all products
        return gpu_target.strict(
            model, bench.clock, num_requests=num_requests, num_new=num_new, num_prompt=num_prompt, options=options,
            has_time=bench.has_time,
        )  # fmt: skip


def _replay(bench: _Bench) -> list[dict[str, Any]]:
    calls, max_prompt, max_response = bench.scale.replay
    return replay(bench.target, traces=bench.traces, calls=calls, max_prompt=max_prompt, max_response=max_response)


PARTS: Mapping[str, Callable[[_Bench], Any]] = {
    "verify": _verify,
    "commit": _commit,
    "attention": _attention,
    "prefill": _prefill,
    "steps": _steps,
    "steps_without_graphs": _eager,
    "replay": _replay,
    "strict": _strict,
}
# What a part may take, estimated for an H100: making 8B random weights and capturing 14 graphs is most of the steps'.
SECONDS: Mapping[str, float] = {
    "verify": 25, "commit": 5, "attention": 80, "prefill": 5, "steps": 125, "steps_without_graphs": 20, "replay": 40,
    "strict": 100,
}  # fmt: skip


def run_gpu_bench(
    scale: Scale,
    device: torch.device,
    *,
    parts: Sequence[str] = tuple(PARTS),
    traces: Sequence[Path] = (),
    seconds: float = 420.0,
    on_progress: Callable[[str], None] = lambda what: None,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run the parts that fit into the time.

    Args:
        scale: ``FULL`` or ``TINY``.
        device: a CUDA device, or for ``TINY`` the CPU.
        parts: of ``PARTS``.
        traces: that are replayed; none: edits of this machine's standard library.
        seconds: for all parts.
        on_progress: told what begins.
        on_result: given what there is after every part.

    Returns:
        The parts' results, their errors and seconds, what was left out, and each bar with its figure: ready for
        ``write_json``.
    """
    begin = perf_counter()
    bench = _Bench(scale, device, traces)
    results: dict[str, Any] = {"what": "bars of the GPU path", "read_gb_per_s": bench.read_gb_per_s}
    errors: dict[str, str] = {}
    took: dict[str, float] = {}
    report: dict[str, Any] = {}
    for name in parts:
        start = perf_counter()
        left = begin + seconds - start
        if left < 0:
            errors[name] = f"did not begin: {seconds:.0f} s were over"
        else:
            on_progress(name)
            bench.ends_at = start + min(left, SECONDS.get(name, left))
            try:
                results[name] = PARTS[name](bench)
            except Exception:  # noqa: BLE001  -- the other parts' figures are worth having
                errors[name] = traceback.format_exc(limit=-4)
            took[name] = perf_counter() - start
        report = {
            **results, "errors": errors, "seconds": took, "left_out": bench.left_out, "bars": _judged(results),
        }  # fmt: skip
        on_result(report)
    return report


def _judged(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bar that has a figure: the figure, the bounds, and whether it holds."""
    judged = {}
    for name, figure in _figures(results).items():
        least, most = _BARS[name]
        holds = (least is None or figure >= least) and (most is None or figure <= most)
        judged[name] = {"figure": figure, "at_least": least, "at_most": most, "holds": holds}
    return judged


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if steps := results.get("steps"):
        found["verify step over reading the weights"] = steps["verify_step_ms"] / steps["read_weights_ms"]
        found["verify step over plain step"] = steps["verify_step_ms"] / steps["plain_step_ms"]
        if "generate_step_ms" in steps:
            found["plain step faster than generate"] = steps["generate_step_ms"] / steps["engine"]["step_ms"]
        found["idle between steps, us"] = steps["engine"]["idle_us"]
    if rows := results.get("attention"):
        found["attention, least share of read bandwidth"] = min(row["share_of_read_bandwidth"] for row in rows)
        gains = [
            row[peer]["ours_is_faster_by"]
            for row in rows
            for peer in ("masked_sdpa", "flex_attention")
            if "ours_is_faster_by" in row.get(peer, {})
        ]
        if gains:
            found["attention, least gain over its peers"] = min(gains)
    if verify := results.get("verify"):
        found["verification over reading the logits"] = max(
            verify[kind]["times_reading"] for kind in ("greedy", "sampled")
        )
    if commit := results.get("commit"):
        found["KV commit, us"] = commit["us"]
    if strict := results.get("strict"):
        found["strict, differing requests"] = sum(
            row["differing_requests"] for name, row in strict.items() if name.startswith("strict")
        )
    return found
