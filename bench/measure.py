"""How every benchmark measures: arms interleaved in one process, medians, and the place written beside the figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

__all__ = ["environment", "interleave", "median_and_spread", "write_json"]

_PACKAGES = ("torch", "transformers", "numpy", "numba", "triton", "arctic-inference")


def environment() -> dict[str, Any]:
    """Hardware, versions, command, commit and date of this run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    malloc = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "command": shlex.join(["python", "-m", *_command()]),
        "commit": _git_commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
    } | ({"malloc": malloc} if malloc else {})


def interleave(
    arms: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run of every arm: A B A B ..., so that a noisy neighbour meets all arms alike.

    Args:
        arms: name -> what to time.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        clock: ``process_time`` with one thread counts what a neighbour takes away least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_index in range(warmup + repeats):
        for name, run in arms.items():
            start = clock()
            run()
            elapsed = clock() - start
            if round_index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def median_and_spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest, in seconds."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result with its environment; readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    draft.replace(path)


def _command() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec is not None else Path(sys.argv[0]).name
    return [name.removesuffix(".__main__"), *map(_without_folder, sys.argv[1:])]


def _without_folder(word: str) -> str:
    """Where files lie on this machine is nobody's business, and would not reproduce anything."""
    return Path(word).name if Path(word).is_absolute() else word


def _git_commit() -> str | None:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return run.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
