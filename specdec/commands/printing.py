"""How commands talk: results on stdout, everything else on stderr, so that ``--json`` can be piped.

Colour and spinners appear on a terminal only; rich sees to that, and to ``NO_COLOR``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["error", "note", "progress", "result", "status", "table", "text"]


def _stderr() -> Console:
    from rich.console import Console

    # Made anew each time: a console keeps the stream it was born with, and tests and pagers exchange the stream.
    return Console(stderr=True, soft_wrap=True, highlight=False)


def error(message: str) -> None:
    """One red line on stderr; line breaks in ``message`` are folded."""
    from rich.text import Text

    _stderr().print(Text.assemble(("error: ", "bold red"), (" ".join(message.split()), "red")))


def note(message: str) -> None:
    """A line for people, on stderr."""
    from rich.text import Text

    _stderr().print(Text(message))


def text(piece: str) -> None:
    """Write a piece of a model's text to stdout now, without a line break of our own."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def result(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout: what ``--json`` promises."""
    sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def table(rows: Mapping[str, str], *, title: str | None = None) -> None:
    """Names and values in two aligned columns, on stdout."""
    if title:
        sys.stdout.write(f"{title}\n")
    width = max(map(len, rows), default=0)
    sys.stdout.writelines(f"  {name:<{width}}  {value}\n" for name, value in rows.items())


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show that something is going on, for as long as the block runs."""
    with _stderr().status(message):
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr for work with a known end; gone when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr(), transient=True) as bar:
        yield bar
