"""Files of any size as a stream of JSON values: plain, gzip or zstandard; JSON Lines, one document, or one long array.

A reader holds one value in memory, never the file. Of a document that is an array, or an object whose bulk is an array
of arrays under a known key, it holds one element.
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from specdec.errors import ConfigError, LoadError

__all__ = ["BULK_KEYS", "Skips", "iter_json", "open_text"]

BULK_KEYS = ("conversations",)  # top-level keys whose array is handed out element by element
_CHUNK = 1 << 16  # characters; doubled while one value does not fit
_MAX_VALUE = 1 << 28  # characters: a longer "value" is a file with a missing bracket
_NUM_EXAMPLES = 3  # per kind of fault, enough to find it
_DECODER = json.JSONDecoder()


@dataclass(slots=True)
class Skips:
    """What was passed over and why: counts per kind of fault and the first few places.

    With ``is_strict`` the first fault is an error and nothing is ever counted.
    """

    is_strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, error: object = "") -> None:
        """Note one fault.

        Raises:
            LoadError: in strict mode: the place and the fault.
        """
        text = f"{place}: {kind}" + (f": {error}" if str(error) else "")
        if self.is_strict:
            raise LoadError(text)
        self.counts[kind] += 1
        if self.counts[kind] <= _NUM_EXAMPLES:
            self.examples.setdefault(kind, []).append(text)

    def __str__(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in sorted(self.counts.items())) or "nothing"


def open_text(path: Path) -> TextIO:
    """A file as UTF-8 text, unpacked as it is read; ``.gz`` and ``.zst`` by their names.

    Raises:
        ConfigError: ``.zst`` without the zstandard package.
        LoadError: there is no such file.
    """
    if not path.is_file():
        raise LoadError(f"no trace file at {path}")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ConfigError(f"reading {path.name} needs the zstandard package: pip install zstandard") from None
        # A stream may hold several frames; the default stops silently behind the first one.
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True, read_across_frames=True)
        return io.TextIOWrapper(io.BufferedReader(reader), encoding="utf-8")
    return path.open(encoding="utf-8")


def iter_json(path: Path, skips: Skips) -> Iterator[tuple[str, Any]]:
    """(place, value) for every value of a file: a line, an array's element, or the document.

    Damage ends the file: what was read before it counts.

    Raises:
        LoadError: no such file; in strict mode any fault.
    """
    place = str(path)
    with open_text(path) as stream:
        try:
            base = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
            values = _lines(stream, path, skips) if base.suffix == ".jsonl" else _document(stream, path, skips)
            for place, value in values:
                yield place, value
        except (EOFError, OSError, UnicodeDecodeError) as error:
            if isinstance(error, LoadError):
                raise
            skips.add("damaged file", f"after {place}", error)
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            skips.add("damaged file", f"after {place}", error)


def _lines(stream: TextIO, path: Path, skips: Skips) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            skips.add("malformed line", place, error)
            continue
        yield place, value


class _Text:
    """A window on a text stream that grows until one JSON value fits."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._at = 0
        self._is_end = False

    def _fill(self) -> bool:
        rest = len(self._text) - self._at
        if rest > _MAX_VALUE:
            raise ValueError(f"one value is longer than {_MAX_VALUE} characters")
        more = "" if self._is_end else self._stream.read(max(_CHUNK, rest))  # doubling: linear over all retries
        self._is_end = self._is_end or not more
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def opens_nested_array(self) -> bool:
        """True at an array whose first element is an array: a file's bulk, where one record has an array of objects."""
        if self.peek() != "[":
            return False
        ahead = 1
        while True:
            while self._at + ahead < len(self._text):
                if not self._text[self._at + ahead].isspace():
                    return self._text[self._at + ahead] == "["
                ahead += 1
            if not self._fill():
                return False

    def take(self, expected: str) -> None:
        """Step over one of these characters."""
        found = self.peek()
        if not found or found not in expected:
            raise ValueError(f"expected {expected!r}, found {found or 'the end of the file'!r}")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except ValueError:
                if not self._fill():
                    raise
                continue
            # A number that touches the end of the window may go on behind it.
            if end == len(self._text) and self._fill():
                continue
            self._at = end
            return value


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.peek() == "]":
            break
        text.take(",")
    text.take("]")


def _document(stream: TextIO, path: Path, skips: Skips) -> Iterator[tuple[str, Any]]:
    """The values of a file that is not known to be JSON Lines: documents one behind the other."""
    text = _Text(stream)
    number = 0
    try:
        while first := text.peek():
            values = _elements(text) if first == "[" else _members(text) if first == "{" else iter([text.value()])
            for value in values:
                number += 1
                yield f"{path}, value {number}", value
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        skips.add("malformed JSON", f"{path}, after value {number}", error)


def _members(text: _Text) -> Iterator[Any]:
    """An object: the elements of its bulk array one by one, or the object itself."""
    text.take("{")
    members: dict[str, Any] = {}
    has_bulk = False
    while text.peek() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise ValueError(f"an object's key must be a string, got {key!r}")
        text.take(":")
        if key in BULK_KEYS and text.opens_nested_array():
            has_bulk = True
            yield from ({key: element} for element in _elements(text))
        else:
            members[key] = text.value()
        if text.peek() == "}":
            break
        text.take(",")
    text.take("}")
    if not has_bulk:
        yield members
