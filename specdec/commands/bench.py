"""``specdec bench retrieval``: suffix drafting against arctic-inference, in quality and in speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import printing
from specdec.errors import ConfigError

__all__ = ["bench"]


def bench(
    traces: Annotated[
        list[Path],
        typer.Option("--traces", "-t", help="Trace files (.jsonl, .jsonl.gz) or folders of them; may be repeated."),
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="tokenizer.json, or a directory or hub name with a tokenizer.")
    ],
    mode: Annotated[str, typer.Option("--mode", help="simulate: draft against recorded responses, no model.")] = (
        "simulate"
    ),
    parts: Annotated[
        str, typer.Option("--parts", help="What is measured, of quality,reference,host,prompt,scaling.")
    ] = "quality,host,prompt,scaling",
    max_response_tokens: Annotated[
        int, typer.Option("--max-response-tokens", help="Whole episodes of a file up to so many tokens; 0: all.")
    ] = 50_000,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", help="Only the last so many tokens of a prompt; 0: all.")
    ] = 24_000,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Passes of each timing; the least counts.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes for the quality part; timings use one.")] = 1,
    kept: Annotated[
        Path | None,
        typer.Option("--kept", help="Folder for counts of the quality part: what is there is not run again."),
    ] = None,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Also run arctic-inference, where installed.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result here, as JSON.")] = None,
) -> None:
    """Measure suffix drafting on recorded traffic, against arctic-inference where it is installed.

    Simulation replays every file through fresh drafters, calls in order, and compares arms at equal numbers of drafted
    tokens per step. Results are also given for the half of the episodes that nothing was tuned on.
    """
    from specdec.bench.measure import write_json
    from specdec.bench.simulate_report import PARTS, as_text, run_simulation

    if mode != "simulate":
        raise ConfigError(f"mode must be simulate, got {mode!r}")
    chosen = tuple(part for part in parts.split(",") if part)
    if unknown := set(chosen) - set(PARTS):
        raise ConfigError(f"parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    with printing.progress() as bar:
        task = bar.add_task("starting", total=None)
        result = run_simulation(
            traces,
            tokenizer,
            parts=chosen,
            max_response_tokens=max_response_tokens,
            max_prompt_tokens=max_prompt_tokens,
            passes=passes,
            jobs=jobs,
            kept=kept,
            with_peer=peer,
            on_progress=lambda what: bar.update(task, description=what),
        )
    if out is not None:
        write_json(out, result)
    printing.text(as_text(result))
