"""Server-sent events of the OpenAI API as bytes and as pieces of text with their tokens.

What a client gets from its own stream is never encoded anew. Token ids that the sidecar asked for are cut out of the
bytes again. Events of another stream are written in the style of the client's own, or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = [
    "DONE", "EventSplitter", "Framing", "IdShape", "Piece", "Style", "client_usage", "dump", "read_event", "restore",
    "style_of", "with_fields",
]  # fmt: skip

DONE = b"[DONE]"
_BREAK = re.compile(rb"\r?\n\r?\n")
# In a JSON string every quote has a backslash before it, so this matches keys only.
_FIELD = rb'(?<!\\)"(prompt_token_ids|token_ids)"(\s*:\s*)(?:\[[\d,\s]*\]|null)'
_IDS = re.compile(rb"(,\s*)?" + _FIELD)
_FIRST_IDS = re.compile(rb"(?<=\{)\s*" + _FIELD + rb"\s*,\s*")  # without a comma before it there may be one behind it

IdShape = Literal["absent", "null"]
Style: TypeAlias = tuple[tuple[str, str], bool]  # separators, and whether all is ASCII


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream of one choice.

    Args:
        raw: as it came, with the empty line at its end.
        token_ids: of this event; empty for events without tokens.
        text: what it shows.
        finish_reason: of the choice, on its last piece.
        prompt_ids: of the prompt, where the event states them.
        event: parsed; None for comments and ``[DONE]``.
        is_odd: it says nothing that we understand, or text whose tokens it does not tell.
    """

    raw: bytes = b""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    event: Mapping[str, Any] | None = None
    is_odd: bool = False


class EventSplitter:
    """Cuts a stream of bytes at the empty lines; what is not complete is kept for the next call."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that are complete now, each with its empty line."""
        self._rest += data
        start = 0
        for found in _BREAK.finditer(self._rest):
            yield self._rest[start : found.end()]
            start = found.end()
        self._rest = self._rest[start:]

    @property
    def rest(self) -> bytes:
        """Bytes after the last complete event."""
        return self._rest


def read_event(raw: bytes) -> Piece:
    """What an event says; odd if it is neither a comment nor ``[DONE]`` nor an object with at most one choice."""
    try:
        return _read(raw)
    except (ValueError, TypeError, AttributeError):
        return Piece(raw, is_odd=True)


def _read(raw: bytes) -> Piece:
    lines = [line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if not data or data == DONE:
        return Piece(raw)
    event = json.loads(data)
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or len(choices) > 1:
        raise ValueError("an event must hold a list of at most one choice")
    if not choices:
        return Piece(raw, prompt_ids=_ids(event, "prompt_token_ids"), event=event)
    choice = choices[0]
    text = choice.get("text") if "text" in choice else (choice.get("delta") or {}).get("content")
    prompt = _ids(event, "prompt_token_ids")
    prompt = _ids(choice, "prompt_token_ids") if prompt is None else prompt
    ids, finish = _ids(choice, "token_ids") or (), choice.get("finish_reason")
    return Piece(raw, ids, text or "", finish, prompt, event, is_odd=bool(text) and not ids and finish is None)


def _ids(holder: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    value = holder.get(name)
    return tuple(int(token_id) for token_id in value) if isinstance(value, list) else None


def restore(raw: bytes, shapes: Mapping[str, IdShape]) -> bytes:
    """An event as the server writes it when it is not asked for token ids.

    Args:
        raw: the event.
        shapes: field -> how it looks when it was not asked for.
    """

    def put(found: re.Match[bytes]) -> bytes:
        before, name, colon = found.groups(b"")
        return before + b'"' + name + b'"' + colon + b"null" if shapes.get(name.decode()) == "null" else b""

    if "null" not in shapes.values():
        raw = _FIRST_IDS.sub(b"", raw)
    return _IDS.sub(put, raw)


def with_fields(body: bytes, **fields: Any) -> bytes:
    """A request in JSON with fields added in front; all else stays as the client wrote it.

    Raises:
        ValueError: the body is no object.
    """
    start = body.index(b"{") + 1
    if body[: start - 1].strip():
        raise ValueError("the body must be an object")
    rest = body[start:].lstrip()
    added = b",".join(json.dumps(name).encode() + b":" + json.dumps(value).encode() for name, value in fields.items())
    return body[:start] + added + (b"" if rest.startswith(b"}") else b",") + body[start:]


@dataclass(slots=True)
class Framing:
    """How one client's stream is written, learned from its own events.

    Args:
        kind: chat or text.
        shapes: as for ``restore``.
        is_single: an event with several tokens is odd: a continuation's events would not look the same.
    """

    kind: Literal["chat", "text"]
    shapes: Mapping[str, IdShape]
    is_single: bool = False
    _template: dict[str, Any] | None = field(default=None, init=False)
    _style: Style | None = field(default=None, init=False)
    _is_odd: bool = field(default=False, init=False)

    @property
    def is_odd(self) -> bool:
        """Something unknown was seen."""
        return self._is_odd

    @property
    def can_write(self) -> bool:
        """Enough was seen, and nothing unknown, to write further events as the server would."""
        return self._style is not None and not self._is_odd

    def learn(self, piece: Piece) -> None:
        """Look at an event of the client's own stream."""
        choices = (piece.event or {}).get("choices")
        if not piece.event or not choices:
            return
        self._is_odd |= self.is_single and len(piece.token_ids) > 1
        plain = restore(piece.raw, self.shapes)
        if self.kind == "chat" and set(choices[0].get("delta") or {}) - {"content", "role"}:
            self._is_odd = True  # reasoning, refusals, tools: a parser is at work that cannot be entered midway
        if self._style is not None or not piece.text:
            return
        data = plain[len(b"data:") :].strip()
        try:
            event = json.loads(data)
        except ValueError:  # more lines than one, or a field that cannot be cut out
            self._is_odd = True
            return
        self._style, self._template = style_of(event, data), event
        self._is_odd |= self._style is None

    def write(self, piece: Piece, *, prompt_tokens: int, earlier_tokens: int) -> bytes:
        """An event of a branch as one of the client's stream.

        Args:
            piece: of the branch, a plain completion.
            prompt_tokens: of the client's prompt, for usage.
            earlier_tokens: that the client had when the branch began.
        """
        assert self._template is not None
        assert self._style is not None
        if piece.event is None:
            return piece.raw
        choices = piece.event.get("choices") or []
        # A text's continuation comes by the same route as the text, so its keys stand as the client's would.
        order = piece.event if self.kind == "text" else self._template
        event = {key: deepcopy(self._template[key]) for key in order if key in self._template}
        event["choices"] = [self._choice(piece, choices[0])] if choices else []
        if "usage" in piece.event:
            made = {"usage": client_usage(piece.event["usage"], prompt_tokens, earlier_tokens)}
            keys = [key for key in order if key in event or key in made]
            event = {key: (event | made)[key] for key in (*keys, *(made if "usage" not in keys else ()))}
        return b"data: " + dump(event, self._style) + b"\n\n"

    def write_text(self, text: str) -> bytes:
        """An event with some text and no end."""
        assert self._template is not None
        assert self._style is not None
        event = {**self._template, "choices": [self._choice(Piece(text=text), {})]}
        return b"data: " + dump(event, self._style) + b"\n\n"

    def _choice(self, piece: Piece, branch: Mapping[str, Any]) -> dict[str, Any]:
        assert self._template is not None
        choice: dict[str, Any] = deepcopy(self._template["choices"][0])
        if self.kind == "chat":
            choice["delta"] = {**({"role": choice["delta"]["role"]} if "role" in choice["delta"] else {})}
            choice["delta"]["content"] = piece.text
        else:
            choice["text"] = piece.text
        for name in ("finish_reason", "stop_reason"):
            if name in choice or branch.get(name) is not None:
                choice[name] = branch.get(name)
        return choice


def dump(value: Any, style: Style) -> bytes:
    """A value in JSON."""
    return json.dumps(value, separators=style[0], ensure_ascii=style[1]).encode()


def style_of(value: Any, data: bytes) -> Style | None:
    """How a value was written, if `dump` can write the same."""
    for separators in ((",", ":"), (", ", ": ")):
        for is_ascii in (False, True):
            if dump(value, (separators, is_ascii)) == data:
                return separators, is_ascii
    return None


def client_usage(usage: Mapping[str, Any] | None, prompt_tokens: int, earlier_tokens: int) -> dict[str, Any] | None:
    """A branch's counts as the client's: the draft was its output, not its prompt."""
    if usage is None:
        return None
    completion = int(usage.get("completion_tokens") or 0) + earlier_tokens
    own = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }
    counts = {name: own.get(name, value) for name, value in usage.items()}
    details = counts.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        counts["prompt_tokens_details"] = {**details, "cached_tokens": min(details["cached_tokens"], prompt_tokens)}
    return counts
