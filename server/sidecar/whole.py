"""Answers that are not streamed, put together from a stream: in the form in which the upstream itself writes them.

The form is learned from the upstream's own whole answers at the start, and proved there: a stream of the same request
must give the same bytes. What does not fit that form later is asked for again as the client wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from specdec.server.sidecar.events import Piece, Style, dump, style_of

__all__ = ["Misfit", "Parts", "WholeShape"]

_HEAD = ("id", "created", "model")
_OWN = (*_HEAD, "object", "choices", "usage")


class Misfit(Exception):
    """The answer does not fit the form that was learned."""


@dataclass(slots=True)
class Parts:
    """What a stream said so far."""

    head: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    usage: Mapping[str, Any] | None = None
    tail: dict[str, Any] = field(default_factory=dict)

    def take(self, piece: Piece, usage: Mapping[str, Any] | None = None) -> None:
        """Add an event; ``usage``: its token counts, as they are the client's.

        Raises:
            Misfit: it says something that a plain text does not.
        """
        if piece.is_odd:
            raise Misfit("an event that is not understood")
        self.text += piece.text
        event = piece.event or {}
        if event and not self.head:
            self.head = {name: event[name] for name in _HEAD if name in event}
        if event.get("usage"):
            self.usage = event["usage"] if usage is None else usage
            self.tail = {name: value for name, value in event.items() if name not in _OWN}
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.stop_reason = event["choices"][0].get("stop_reason")


@dataclass(frozen=True, slots=True)
class WholeShape:
    """How an upstream writes whole answers.

    Args:
        kind: chat or text.
        template: one of them.
        style: of its JSON.
    """

    kind: Literal["chat", "text"]
    template: Mapping[str, Any]
    style: Style

    @classmethod
    def learned(cls, kind: Literal["chat", "text"], raw: bytes) -> WholeShape:
        """The shape of an answer.

        Raises:
            Misfit: it is no answer of one choice with a text and token counts, or its JSON cannot be written again.
        """
        try:
            whole = json.loads(raw)
            (choice,) = whole["choices"]
            is_text = isinstance(choice["text"] if kind == "text" else choice["message"]["content"], str)
            style = style_of(whole, raw)
        except (ValueError, KeyError, TypeError) as error:
            raise Misfit("no answer of one choice") from error
        if not is_text or style is None or not isinstance(whole.get("usage"), dict):
            raise Misfit("no text, no token counts, or JSON in a style that cannot be written")
        return cls(kind, whole, style)

    def write(self, parts: Parts) -> bytes:
        """The answer that a stream amounts to.

        Raises:
            Misfit: the stream has no end, or other fields than the template.
        """
        usage, own = parts.usage, self.template["usage"]
        if parts.finish_reason is None or usage is None or set(usage) != set(own) or set(parts.head) != set(_HEAD):
            raise Misfit("no end, or other fields")
        made = {**parts.tail, **parts.head, "usage": {name: usage[name] for name in own}}
        whole = {name: made.get(name, value) for name, value in deepcopy(dict(self.template)).items()}
        choice = whole["choices"][0]
        if self.kind == "chat":
            choice["message"]["content"] = parts.text
        else:
            choice["text"] = parts.text
        choice["finish_reason"] = parts.finish_reason
        if "stop_reason" in choice:
            choice["stop_reason"] = parts.stop_reason
        return dump(whole, self.style)

    def is_same(self, plain: bytes, parts: Parts) -> bool:
        """The stream amounts to this answer, but for what differs from one request to the next.

        Raises:
            Misfit: as ``write``.
        """
        made, whole = json.loads(self.write(parts)), json.loads(plain)
        counts = [{name: value for name, value in one["usage"].items() if isinstance(value, int)} for one in
                  (made, whole)]  # fmt: skip
        for one in (made, whole):
            for name in ("id", "created", "usage", *parts.tail):
                one.pop(name, None)
        return bool(made == whole and counts[0] == counts[1] and list(made) == list(whole))
