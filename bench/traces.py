"""Recorded calls of real traffic, read one at a time: who asked what, and what the model answered.

Three forms are read, told apart line by line, plain or gzip:

- *pool form*: one episode a line, every distinct message stored once (``pool``), calls as index ranges into it;
- *call form*: one call a line, ``messages`` and ``response``;
- *plain form*: one call a line, ``prompt`` and ``response``, each a string or a list of token ids.

A reader holds one line in memory, so the size of a file does not matter.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, LoadError

__all__ = [
    "Call",
    "Encode",
    "TokenCall",
    "calls_of_line",
    "episode_half",
    "messages_of",
    "read_calls",
    "tokenize_calls",
]

IntArray: TypeAlias = npt.NDArray[np.int32]
Encode: TypeAlias = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a trace and its recorded answer.

    Args:
        trace: the episode that the call belongs to.
        parts: the prompt in pieces (one per message), each a text or a list of token ids.
        response: the recorded answer, a text or a list of token ids.
    """

    trace: str
    parts: tuple[str | tuple[int, ...], ...]
    response: str | tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TokenCall:
    """A call in tokens: ``prompt_ids`` [P] int32, ``response_ids`` [G] int32, of one episode."""

    trace: str
    prompt_ids: IntArray
    response_ids: IntArray


def _rendered(message: Mapping[str, Any]) -> str:
    # A neutral frame: which chat template the provider used is not in the logs.
    return f"<|{message.get('role', 'user')}|>\n{message.get('content') or ''}\n"


def messages_of(parts: Sequence[str | tuple[int, ...]]) -> list[dict[str, str]]:
    """The messages that recorded prompt parts were rendered from; a part without a frame is the user's.

    Raises:
        ConfigError: a part is token ids, which a chat cannot carry.
    """
    messages = []
    for part in parts:
        if not isinstance(part, str):
            raise ConfigError("a prompt of token ids has no messages: a chat needs text")
        head, _, content = part.partition("\n")
        if head.startswith("<|") and head.endswith("|>"):
            messages.append({"role": head[2:-2], "content": content.removesuffix("\n")})
        else:
            messages.append({"role": "user", "content": part})
    return messages


def _text_or_ids(value: Any, name: str) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return tuple(value)
    raise ValueError(f"{name} must be a string or a list of token ids, got {type(value).__name__}")


def calls_of_line(record: Mapping[str, Any]) -> Iterator[Call]:
    """The calls of one JSON line, in order.

    Raises:
        ValueError: the line is in none of the three forms.
    """
    trace = str(record.get("trace", ""))
    if "pool" in record:
        rendered = [_rendered(message) for message in record["pool"]]
        for call in record["calls"]:
            parts = tuple(rendered[i] for start, stop in call["prompt"] for i in range(start, stop))
            yield Call(trace, parts, record["pool"][call["response"]].get("content") or "")
    elif "messages" in record:
        yield Call(trace, tuple(_rendered(m) for m in record["messages"]), _text_or_ids(record["response"], "response"))
    elif "prompt" in record:
        prompt = _text_or_ids(record["prompt"], "prompt")
        yield Call(trace, (prompt,), _text_or_ids(record["response"], "response"))
    else:
        raise ValueError(f"a line needs 'pool', 'messages' or 'prompt', got the keys {sorted(record)}")


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_calls(path: Path, *, skipped: list[str] | None = None) -> Iterator[Call]:
    """The calls of a trace file, in file order.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz`` in any of the three forms.
        skipped: if given, a malformed line is noted here and passed over; if None it is an error.

    Raises:
        LoadError: the file cannot be read, or a line is malformed and ``skipped`` is None.
    """
    number = 0
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    calls = list(calls_of_line(json.loads(line)))
                except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                    if skipped is None:
                        raise LoadError(f"{path}, line {number}: {error}") from error
                    skipped.append(f"line {number}: {error}")
                    continue
                yield from calls
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is damaged after line {number}: {error}") from error
    except FileNotFoundError as error:
        raise LoadError(f"no trace file at {path}") from error


def tokenize_calls(calls: Iterator[Call], encode: Encode, *, max_prompt: int = 0) -> Iterator[TokenCall]:
    """The same calls in tokens; a message is tokenized once per episode, however often it is sent.

    Args:
        calls: in file order, the calls of one episode next to each other.
        encode: text to token ids, without special tokens.
        max_prompt: keep only the last so many prompt tokens; 0 keeps all.

    Calls with an empty answer are left out: there is nothing to draft.
    """
    trace: str | None = None
    cache: dict[str, IntArray] = {}

    def ids_of(part: str | tuple[int, ...]) -> IntArray:
        if not isinstance(part, str):
            return np.array(part, dtype=np.int32)
        ids = cache.get(part)
        if ids is None:
            ids = cache[part] = np.array(encode(part), dtype=np.int32)
        return ids

    for call in calls:
        if call.trace != trace:
            cache.clear()
            trace = call.trace
        response = ids_of(call.response)
        if len(response) == 0:
            continue
        prompt = np.concatenate([np.empty(0, np.int32), *(ids_of(part) for part in call.parts)])
        yield TokenCall(call.trace, np.ascontiguousarray(prompt[-max_prompt:]), response)


def episode_half(trace: str) -> int:
    """0 or 1: a fixed split of all episodes into two halves by a hash of their name.

    Half 0 is what the shipped tables and parameters were chosen on; half 1 was held out.
    """
    return hashlib.sha256(f"half:{trace}".encode()).digest()[0] & 1
