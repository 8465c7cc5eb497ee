"""Recorded traffic in the formats that people have, as the one ``Call`` record that every mode reads.

    for call in load_calls(Path("trajectories/"), skips=skips):

The format is told from the keys of each record; a folder is read file by file in the order of its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specdec.bench.loaders.episodes import READERS, Episode, OpenTurn, format_of
from specdec.bench.loaders.streams import Skips, iter_json, open_text
from specdec.bench.traces import Call, calls_of_line
from specdec.errors import ConfigError, LoadError

__all__ = ["FORMATS", "OpenTurn", "Skips", "load_calls", "open_text", "trace_files"]

FORMATS = ("auto", "plain", *READERS)
_SUFFIXES = {".jsonl", ".json", ".traj"}
_FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError)


def trace_files(path: Path) -> list[Path]:
    """The trace files that ``path`` stands for: itself, or all below a folder, sorted.

    Raises:
        LoadError: nothing is there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoadError(f"there is no trace file or folder {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file() and _base(file).suffix in _SUFFIXES)
    if not files:
        raise LoadError(f"no trace files below {path}: looked for {', '.join(sorted(_SUFFIXES))}, also .gz and .zst")
    return files


def load_calls(
    path: Path,
    *,
    skips: Skips | None = None,
    format: str = "auto",
    columns: tuple[str, str] = ("prompt", "response"),
    needs_response: bool = True,
) -> Iterator[Call]:
    """The calls of a file or folder, the calls of one episode next to each other and in order.

    Args:
        path: a file or a folder.
        skips: what was passed over is counted here; None: the first fault is an error.
        format: a name of ``FORMATS``.
        columns: names of prompt and answer in files of the plain form, as of the Arctic simulator.
        needs_response: leave out calls without a recorded answer. False also gives calls that have none; earlier
            answers that their prompts lack are ``OpenTurn`` parts.

    Raises:
        ConfigError: an unknown format.
        LoadError: nothing to read; in strict mode any fault.
    """
    if format not in FORMATS:
        raise ConfigError(f"trace format must be one of {', '.join(FORMATS)}, got {format!r}")
    skips = Skips(is_strict=True) if skips is None else skips
    num_traces = 0
    for file in trace_files(path):
        for place, episode_calls in _episodes(file, skips, format, columns):
            num_traces += 1
            for call in episode_calls:
                if needs_response and not call.response:
                    skips.add("empty response", place)
                    continue
                yield call if call.trace else replace(call, trace=f"{file.name}#{num_traces}")


def _base(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def _episodes(file: Path, skips: Skips, format: str, columns: tuple[str, str]) -> Iterator[tuple[str, list[Call]]]:
    """(place, calls) for every record; a faulty record is counted and left out as a whole."""
    base = _base(file)
    events: list[Any] = []
    for place, value in iter_json(file, skips):
        try:
            kind = format_of(_renamed(value, columns)) if format == "auto" else format
            if kind == "event":
                events.append(value)
                continue
            calls = _calls(kind, _renamed(value, columns), base)
        except _FAULTS as error:
            skips.add("missing field" if isinstance(error, KeyError) else "malformed record", place, error)
            continue
        yield place, calls
    if events:  # a file of one run's events
        try:
            yield str(file), _calls("openhands-events", events, base)
        except _FAULTS as error:
            skips.add("malformed record", str(file), error)


def _renamed(value: Any, columns: tuple[str, str]) -> Any:
    if columns == ("prompt", "response") or not isinstance(value, Mapping) or not set(columns) <= value.keys():
        return value
    return {"trace": value.get("trace", ""), "prompt": value[columns[0]], "response": value[columns[1]]}


def _calls(kind: str, value: Any, path: Path) -> list[Call]:
    if kind == "plain":
        return list(calls_of_line(value))
    episodes: Iterator[Episode] = READERS[kind](value, path)
    return [call for episode in episodes for call in episode.as_calls()]
