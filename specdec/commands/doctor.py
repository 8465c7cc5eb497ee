"""``specdec doctor``: which path a model takes and why, what it costs, and what is wrong with its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.commands import printing
from specdec.commands.loading import LoadedModel, load_model
from specdec.commands.options import DeviceOption, DTypeOption, JsonOption
from specdec.errors import LoadError, UnsupportedError

if TYPE_CHECKING:
    from specdec.doctor import DoctorReport, DrafterReport, Problem
    from specdec.doctor.report import Attention, Memory, StepCosts

__all__ = ["doctor"]

_NO_CAUSAL_LM = "Unrecognized configuration class"  # how transformers says that a model is none
_PATHS = {
    "tree": "tree: whole draft trees of many requests are verified in one forward",
    "chain": "chain: one draft chain per request is verified in one forward, over transformers' own cache",
    "plain": "plain: no cache is used, every step computes the whole context again",
    "refused": "refused: specdec cannot serve this model",
}


def doctor(
    model: Annotated[str, typer.Argument(help="A directory with a Hugging Face model, or owner/name on the hub.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests at a time, for memory and costs.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens per request, likewise.")] = 1024,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="For measuring steps; 0 measures nothing.")] = 30.0,
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", "-d", help="KIND:PATH: also explain how much of its guesses is accepted, and why."),
    ] = None,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Examine a model before serving it: its path and why, memory, where speculation breaks even, problems.

    With --drafter eagle:PATH or lm:PATH it names what keeps the acceptance length low: template, vocabulary, layers,
    norm, rope, context, quantisation.

    A model that cannot be served gets a report too. Exit status: 0, or 2 if there is nothing to examine.
    """
    report = _examine(model, batch, context, seconds, (dtype, device), drafter)
    if as_json:
        printing.result(report.as_json())
    else:
        printing.text(_as_text(report))


def _examine(
    model: str, batch: int, context: int, seconds: float, place: tuple[str, str], drafter: str | None
) -> DoctorReport:
    from specdec.build import name_drafter
    from specdec.doctor import examine, examine_drafter, refused_report

    if drafter is not None:
        name_drafter(drafter)  # what is wrong with a name is said before the minutes that loading may take
    try:
        loaded: LoadedModel = load_model(model, dtype=place[0], device=place[1], needs_tokenizer=False)  # type: ignore[arg-type]
    except UnsupportedError as error:
        return refused_report(model, str(error))
    except LoadError as error:
        if _NO_CAUSAL_LM in str(error):
            return refused_report(model, "it is no causal language model: transformers has no such class for it")
        raise
    with printing.progress() as bar:
        task = bar.add_task("measuring steps", total=100)
        report = examine(
            loaded.model,
            loaded.tokenizer,
            name=model,
            batch=batch,
            context=context,
            seconds=seconds,
            on_progress=lambda share: bar.update(task, completed=round(100 * share)),
        )
        if drafter is None:
            return report
        return replace(report, drafter=examine_drafter(loaded.model, loaded.tokenizer, drafter, name=model))


def _as_text(report: DoctorReport) -> str:
    where = f", {report.dtype} on {report.device}" if report.dtype else ""
    lines = [f"{report.model}: {report.architecture}{where}", "", f"Path      {_PATHS[report.path]}"]
    lines += [f"          {reason}" for reason in report.reasons]
    if report.path != "refused" and not report.can_draft:
        lines.append("          drafts are not verified: plain decoding only")
    if report.attention:
        lines += ["", *_labelled("Attention", [_attention_line(entry) for entry in report.attention])]
    if report.memory is not None:
        lines += ["", *_labelled("Memory", _memory_lines(report.memory))]
    if report.costs is not None:
        lines += ["", *_labelled("Costs", _cost_lines(report.costs))]
    if report.drafter is not None:
        lines += ["", *_labelled("Drafter", _drafter_lines(report.drafter))]
    lines += ["", *_labelled("Problems", _problem_lines(report.problems) or ["none found"])]
    return "\n".join(lines) + "\n"


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"{label if index == 0 else '':<10}{line}" for index, line in enumerate(lines)]


def _attention_line(entry: Attention) -> str:
    window = "" if entry.window is None else f" window of {entry.window}"
    widths = f"{entry.key_dim}" if entry.key_dim == entry.value_dim else f"{entry.key_dim}/{entry.value_dim}"
    extras = (" sinks," if entry.has_sinks else "") + ("" if entry.softcap is None else f" soft-cap {entry.softcap:g},")
    kept = (
        "per token" if entry.window is None else f"per token, {_bytes(entry.nbytes_per_token * entry.window)} a window"
    )
    return (
        f"{entry.num_calls} x {entry.mask_kind}{window}: {entry.num_query_heads} query and {entry.num_kv_heads} "
        f"key heads of width {widths},{extras} KV {_bytes(entry.nbytes_per_token)} {kept}"
    )


def _memory_lines(memory: Memory) -> list[str]:
    far = (
        ""
        if memory.kv_nbytes_per_far_token == memory.kv_nbytes_per_token
        else f", {_bytes(memory.kv_nbytes_per_far_token)} once it has left the windows"
    )
    state = f", and {_bytes(memory.state_nbytes)} of recurrent state per request" if memory.state_nbytes else ""
    lines = [
        f"weights {_bytes(memory.weights_nbytes)}; KV {_bytes(memory.kv_nbytes_per_token)} per token{far}{state}",
        f"batch {memory.batch}, context {memory.context}: {_bytes(memory.request_nbytes)} per request, "
        f"{_bytes(memory.total_nbytes)} in all, plus activations",
    ]
    if memory.available_nbytes is not None:
        fits = "" if memory.largest_batch is None else f": room for {memory.largest_batch} such requests"
        lines.append(f"{_bytes(memory.available_nbytes)} are free beside the weights{fits}")
    return lines


def _cost_lines(costs: StepCosts) -> list[str]:
    lines = [
        f"batch {costs.batch}, context {costs.context}, median of {costs.num_rounds}",
        "budget   ms/step   breaks even at an acceptance length of",
        *(f"{entry.budget:6}  {entry.ms:8.2f}   {entry.acceptance_length:.2f}" for entry in costs.break_even),
    ]
    for entry in costs.recommended:
        lines.append(
            f"if {entry.acceptance:.0%} of draft tokens are right: budget {entry.budget}, {entry.speedup:.2f} x as fast"
        )
    return [*lines, "(drafting itself is not counted)"]


def _drafter_lines(report: DrafterReport) -> list[str]:
    lines = [report.drafter]
    for entry in report.acceptance:
        lines.append(
            f"{entry.text} text: acceptance length {entry.length:.2f} over {entry.num_steps} steps, "
            f"{entry.num_drafted} draft tokens"
        )
    lines += [f"{entry.text} text: names {entry.share:.0%} of the target's choices" for entry in report.agreement]
    return lines + _problem_lines(report.problems)


def _problem_lines(problems: Sequence[Problem]) -> list[str]:
    return [f"{problem.severity}: {problem.area}: {problem.message}" for problem in problems]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
