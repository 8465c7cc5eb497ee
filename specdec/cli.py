"""The ``specdec`` command: which commands there are, and what an error looks like to a user.

Every command is a module of ``specdec.commands`` that imports what is heavy inside its function, so that ``--help`` and
shell completion answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from specdec import __version__
from specdec.commands import printing
from specdec.commands.apd import apd
from specdec.commands.bench_run import app as bench
from specdec.commands.check import check
from specdec.commands.corpus import corpus
from specdec.commands.demo import demo
from specdec.commands.doctor import doctor
from specdec.commands.generate import generate
from specdec.commands.regenerate import regenerate
from specdec.commands.serve import keys, serve
from specdec.commands.sidecar import sidecar
from specdec.commands.simulate_load import simulate_load
from specdec.commands.train import train
from specdec.commands.traind import drafters, traind
from specdec.errors import InternalError, SpecdecError

__all__ = ["app", "main"]

EXIT_ERROR = 2  # what was asked for cannot be done; the same status as for a wrong option
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="specdec",
    help="Lossless speculative decoding for any Hugging Face causal LM: the same tokens, sooner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is for bugs: leave it as Python prints it, to be pasted into a report
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Lossless speculative decoding for any Hugging Face causal LM: the same tokens, sooner."""


app.command()(generate)
app.command()(apd)
app.command()(demo)
app.command()(check)
app.command()(doctor)
app.command()(serve)
app.command()(keys)
app.command()(traind)
app.add_typer(drafters)
app.command()(sidecar)
app.add_typer(bench, name="bench")
app.command("simulate-load")(simulate_load)
app.add_typer(corpus)
app.command()(regenerate)
app.command()(train)


def main() -> None:
    """Run the command line; every error that specdec raises on purpose is one line and a status, not a traceback."""
    try:
        app(prog_name="specdec")
    except InternalError:
        raise  # a bug of ours: the traceback is the report
    except SpecdecError as error:
        printing.error(str(error))
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:  # older typer turns it into this status itself, newer ones during parsing only
        sys.exit(EXIT_INTERRUPTED)
