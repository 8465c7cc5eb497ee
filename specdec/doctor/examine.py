"""The whole examination: path, attention, memory, costs, problems."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

from specdec.build import build_target, model_max_length
from specdec.config import EngineConfig
from specdec.doctor.costs import MAX_STEPS, measure_steps
from specdec.doctor.memory import estimate_memory, state_nbytes, summarise_attention
from specdec.doctor.problems import find_problems
from specdec.doctor.report import DoctorReport, Memory, Problem, StepCosts
from specdec.errors import ConfigError, UnsupportedError
from specdec.rope import freeze_rope
from specdec.routes import Route, choose_route

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["examine", "refused_report"]

_FEWEST_ROUNDS: Final = 5  # the median of fewer follows every disturbance


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str = "model",
    batch: int = 1,
    context: int = 1024,
    seconds: float = 30.0,
    on_progress: Callable[[float], None] | None = None,
) -> DoctorReport:
    """What ``model`` is like to serve: which path it takes and why, what it costs, what is wrong with its files.

    A model that cannot be served gets a report too: its path is "refused".

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: None if there is none.
        name: for the report.
        batch: requests of the memory estimate and of the measured steps.
        context: tokens per request, likewise; cut to the model's own limit.
        seconds: for measuring steps; 0 measures nothing.
        on_progress: told the share of the measuring that is done.

    Raises:
        ConfigError: ``batch`` or ``context`` is below 1, or ``seconds`` below 0.
    """
    for option, value, least in (("batch", batch, 1), ("context", context, 1), ("seconds", seconds, 0)):
        if value < least:
            raise ConfigError(f"{option} must be >= {least}, got {value}")
    begin = perf_counter()
    limit = model_max_length(model)
    problems = find_problems(model, tokenizer, name)
    if context > limit:
        problems.append(Problem("memory", "note", f"the context is cut from {context} to the model's {limit} tokens"))
        context = limit
    route, rope_problems = _route(model, limit)
    problems += rope_problems
    attention = summarise_attention(route.calls, _kv_itemsize(model))
    memory, costs = None, None
    if route.kind != "refused":
        state = state_nbytes(model) or 0 if route.kind == "chain" else 0
        memory = estimate_memory(model, attention, batch=batch, context=context, state_nbytes=state)
        problems += _memory_problems(memory)
        costs, problem = _measure(model, route, batch, min(context, limit - 2), seconds, on_progress)
        problems += [] if problem is None else [problem]
    return DoctorReport(
        model=name,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        path=route.kind,
        reasons=route.reasons,
        can_draft=route.can_draft and route.kind != "refused",
        attention=attention,
        memory=memory,
        costs=costs,
        problems=tuple(problems),
        seconds=perf_counter() - begin,
    )


def refused_report(name: str, reason: str) -> DoctorReport:
    """The report on something that is no causal LM at all and was not loaded."""
    return DoctorReport(
        model=name,
        architecture="unknown",
        dtype=None,
        device=None,
        path="refused",
        reasons=(reason,),
        can_draft=False,
        attention=(),
        memory=None,
        costs=None,
        problems=(),
    )


def _route(model: PreTrainedModel, max_length: int) -> tuple[Route, list[Problem]]:
    """The path of the model with its RoPE frozen, as an engine would have it."""
    try:
        with freeze_rope(model, max_length) as freeze:
            notes = [Problem("rope", "warning", notice) for notice in freeze.notices]
            return choose_route(model, max_length=max_length), notes
    except UnsupportedError as error:
        return Route("refused", (str(error),), can_draft=False), []


def _kv_itemsize(model: PreTrainedModel) -> int:
    return model.dtype.itemsize if model.dtype.is_floating_point else 2  # quantised weights, half-precision activations


def _memory_problems(memory: Memory) -> list[Problem]:
    if memory.largest_batch is None or memory.largest_batch >= memory.batch:
        return []
    wanted = f"{memory.batch} requests of {memory.context} tokens"
    return [Problem("memory", "warning", f"{wanted} do not fit beside the weights, only {memory.largest_batch} do")]


def _measure(
    model: PreTrainedModel,
    route: Route,
    batch: int,
    context: int,
    seconds: float,
    on_progress: Callable[[float], None] | None,
) -> tuple[StepCosts | None, Problem | None]:
    """What steps cost; or nothing, and why."""
    if seconds == 0:
        return None, None
    if context < 1:
        return None, Problem("probe", "note", "the model's context is too short to measure steps")
    limit = model_max_length(model)
    room = min(context, limit - MAX_STEPS - 64) if limit > 2 * MAX_STEPS else context
    config = EngineConfig.of(
        max_batch_size=batch,
        max_length=limit,
        kv_tokens=batch * (max(room, 1) + MAX_STEPS + 64),
        max_prefill_tokens=512,
    )
    try:
        with freeze_rope(model, limit):
            target = build_target(model, config, route=route)
            costs = measure_steps(
                target,
                batch=batch,
                context=max(room, 1),
                seconds=seconds,
                device=model.device,
                on_progress=on_progress,
            )
    except (UnsupportedError, MemoryError) as error:
        return None, Problem("probe", "warning", f"steps could not be measured: {error}")
    if costs.num_rounds < _FEWEST_ROUNDS:
        rounds = f"the costs rest on {costs.num_rounds} rounds only, so a busy machine distorts them: give more seconds"
        return costs, Problem("probe", "note", rounds)
    return costs, None
