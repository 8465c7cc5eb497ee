"""When requests come: arrival traces of real services as one record, read row by row.

Four layouts are told apart by their columns: our own, Azure's LLM inference traces, BurstGPT (CSV), and Mooncake (JSON
Lines). Times are seconds from the first request.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.loaders.streams import Skips, open_text
from specdec.errors import LoadError

__all__ = ["Arrival", "read_arrivals"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it came, in seconds from the start, how long it was, and whose turn it was ("" = unknown)."""

    time_s: float
    prompt_tokens: int
    response_tokens: int
    session_id: str = ""


def read_arrivals(path: Path, *, skips: Skips | None = None) -> Iterator[Arrival]:
    """The requests of an arrival trace, in file order.

    Args:
        path: CSV or JSON Lines, also ``.gz`` and ``.zst``.
        skips: faulty rows are counted here; None: the first one is an error.

    Raises:
        LoadError: no such file, unknown columns; in strict mode any fault.
    """
    skips = Skips(is_strict=True) if skips is None else skips
    first: float | None = None
    number = 0
    try:
        for number, row in _rows(path):
            place = f"{path}, row {number}"
            try:
                arrival = _LAYOUTS[_layout(row, place)](row)
                if not (math.isfinite(arrival.time_s) and min(arrival.prompt_tokens, arrival.response_tokens) >= 0):
                    raise ValueError(f"a time or a length is outside its range in {arrival}")
            except LoadError:
                raise
            except (ValueError, TypeError) as error:
                skips.add("malformed row", place, error)
                continue
            first = arrival.time_s if first is None else first
            yield Arrival(arrival.time_s - first, arrival.prompt_tokens, arrival.response_tokens, arrival.session_id)
    except (EOFError, UnicodeDecodeError, csv.Error) as error:
        skips.add("damaged file", f"{path} after row {number}", error)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(path) as stream:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(stream, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                # An empty row has the columns of a broken one: each is counted, none ends the file.
                yield number, row if isinstance(row, dict) else dict.fromkeys(_SIGNATURES["mooncake"])
        else:
            yield from enumerate(csv.DictReader(stream), 1)


def _layout(row: Mapping[str, Any], place: str) -> str:
    for name, columns in _SIGNATURES.items():
        if columns <= row.keys():
            return name
    raise LoadError(f"{place}: unknown arrival columns {sorted(map(str, row))}; known are {_SIGNATURES}")


def _own(row: Mapping[str, Any]) -> Arrival:
    session = row.get("session_id") or ""
    return Arrival(float(row["timestamp_s"]), int(row["prompt_tokens"]), int(row["response_tokens"]), session)


def _azure(row: Mapping[str, Any]) -> Arrival:
    # "2023-11-16 18:15:46.6805900": seven digits, one more than a datetime holds; 2024's files append "+00:00".
    time = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    seconds = time.replace(tzinfo=time.tzinfo or datetime.UTC).timestamp()
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burst_gpt(row: Mapping[str, Any]) -> Arrival:
    session = row.get("Session ID") or row.get("SessionID") or ""
    return Arrival(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]), session)


def _mooncake(row: Mapping[str, Any]) -> Arrival:
    return Arrival(int(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]))


_SIGNATURES: Mapping[str, frozenset[str]] = {
    "own": frozenset({"timestamp_s", "prompt_tokens", "response_tokens"}),
    "azure": frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}),
    "burst_gpt": frozenset({"Timestamp", "Request tokens", "Response tokens"}),
    "mooncake": frozenset({"timestamp", "input_length", "output_length"}),
}
_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Arrival]] = {
    "own": _own,
    "azure": _azure,
    "burst_gpt": _burst_gpt,
    "mooncake": _mooncake,
}
