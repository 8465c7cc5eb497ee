"""``specdec bench --gpu``: every bar that only a GPU can show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import printing
from specdec.commands.options import DeviceOption, TracesOption
from specdec.errors import ConfigError

__all__ = ["gpu"]

EXIT_FAILED = 1


def gpu(
    out: Annotated[Path, typer.Option("--out", "-o", help="The result file.")],
    parts: Annotated[str, typer.Option("--parts", help="Comma between names; all of them: leave it out.")] = "",
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="For all parts; what does not fit is left out.")
    ] = 420.0,
    traces: TracesOption = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy sizes: does every part run? Its figures mean nothing.")] = (
        False
    ),
    device: DeviceOption = "auto",
) -> None:
    """Measure the kernels, whole steps, strict numerics and the cost curve on a GPU, in seven minutes.

    Exit status: 0 every part ran, 1 one failed or had no time.
    """
    import torch

    from specdec.bench.gpu import FULL, PARTS, TINY, run_gpu_bench
    from specdec.bench.measure import write_json
    from specdec.commands.loading import find_device

    chosen = [part for part in parts.split(",") if part] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise ConfigError(f"parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    place: torch.device = find_device(device)
    if place.type != "cuda" and not tiny:
        raise ConfigError(f"bench --gpu needs a CUDA device, got {place}; --tiny tries its parts at toy sizes")
    with printing.progress() as bar:
        task = bar.add_task("starting", total=None)
        result = run_gpu_bench(
            TINY if tiny else FULL, place, parts=chosen, seconds=seconds, traces=traces or (),
            on_progress=lambda what: bar.update(task, description=what),
            on_result=lambda found: write_json(out, found),
        )  # fmt: skip
    for name, bar_of in result["bars"].items():
        printing.text(f"{'ok    ' if bar_of['holds'] else 'MISSED'}  {name}: {bar_of['figure']:.3g}\n")
    for what in result["left_out"]:
        printing.text(f"no time for {what}\n")
    for name, error in result["errors"].items():
        printing.text(f"FAILED  {name}: {error.strip().splitlines()[-1]}\n")
    if result["errors"]:
        raise typer.Exit(EXIT_FAILED)
