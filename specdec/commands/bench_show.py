"""What the benchmark commands share: options that are lists, how a result is shown, and the exit status it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specdec.commands import printing
from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.bench.results_schema import BenchResult

__all__ = ["finish", "numbers", "show", "slo_of"]

_EXIT_DOUBTFUL = 1
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def finish(result: BenchResult, out: Path) -> None:
    """Show a result; the exit status says whether it is whole and free of errors."""
    show(result)
    printing.note(f"written to {out}")
    if result.is_partial:
        raise typer.Exit(_EXIT_INTERRUPTED)
    if any(flag.severity == "error" for flag in result.flags):
        raise typer.Exit(_EXIT_DOUBTFUL)


def numbers(name: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """The numbers of a comma-separated option; None has none.

    Raises:
        ConfigError: one is none.
    """
    if text is None:
        return ()
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} must be numbers with commas between them, got {text!r}") from None


def slo_of(text: str | None) -> tuple[float, float] | None:
    """Limits of the time to the first token and per further token, in milliseconds.

    Raises:
        ConfigError: it is not two numbers.
    """
    if text is None:
        return None
    try:
        first, further = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"slo must be two numbers of milliseconds, TTFT,TPOT, got {text!r}") from None
    return first, further


def show(result: BenchResult) -> None:
    """A result's tables and doubts on stdout."""
    from specdec.bench.metrics import ALL
    from specdec.bench.tables import result_table, text_table

    sources = list(dict.fromkeys(summary.source for summary in result.summaries)) or [ALL]
    for source in [*(s for s in sources if s != ALL and len(sources) > 2), ALL]:
        printing.text(f"{source}\n{text_table(result_table(result, source=source))}\n")
    for flag in result.flags:
        printing.text(f"{flag.severity}: {flag.code}: {flag.message}\n")
