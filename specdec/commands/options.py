"""Options that several commands share, so that they are spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from specdec.commands.loading import DTypeName

__all__ = [
    "BudgetOption",
    "DTypeOption",
    "DeviceOption",
    "DrafterOption",
    "JsonOption",
    "MaxNewTokensOption",
    "ModelOption",
    "OverlapName",
    "OverlapOption",
    "SeedOption",
    "TemperatureOption",
    "TracesOption",
    "VerifierOption",
]

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A directory with a Hugging Face model, or owner/name on the hub.")
]
DrafterOption = Annotated[
    str,
    typer.Option("--drafter", "-d", help="Who guesses: none, ngram, ..., KIND:PATH; a wrong name lists them all."),
]
BudgetOption = Annotated[
    int | None, typer.Option("--budget", min=0, help="Most draft tokens per step; 0 is plain decoding.")
]
VerifierOption = Annotated[
    str,
    typer.Option(
        "--verifier",
        help="match: any drafter, the same text for a seed. chain, block, specinfer, rrsw, traversal: the same law, for"
        " drafters that state draft laws. typical: LOSSY.",
    ),
]
OverlapName = Literal["auto", "off", "halves", "chunks"]
OverlapOption = Annotated[
    OverlapName,
    typer.Option(
        "--overlap",
        help="Draft beside verification: for half of the batch, or behind chunks of a draft. auto: if it pays.",
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after that many tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", min=0, help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text, whoever drafts.")]
DTypeOption = Annotated[
    DTypeName, typer.Option("--dtype", help="auto: the checkpoint's own on a GPU, float32 on a CPU.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
TracesOption = Annotated[
    list[Path] | None, typer.Option("--traces", help="A trace file or folder; may be repeated. None: built-in edits.")
]
