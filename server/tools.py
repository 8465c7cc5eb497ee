"""Tool calls: which functions a request offers, and calls found in the text that the model writes.

The form is that of the Hermes and Qwen chat templates: ``<tool_call>`` a JSON object with ``name`` and ``arguments``
``</tool_call>``. Text that looks like a call and is none stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.errors import RequestError
from specdec.server.wire import ChatRequest

__all__ = ["ToolCall", "ToolText", "forced_schemas", "offers_tools"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the API shows it; ``arguments`` is JSON text."""

    call_id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """The call in a message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


def offers_tools(body: ChatRequest) -> bool:
    """Calls in the answer are looked for."""
    return bool(body.tools) and body.tool_choice != "none"


def forced_schemas(body: ChatRequest) -> dict[str, dict[str, Any]] | None:
    """Name -> schema of the arguments, of the functions of which one must be called; None: none must.

    Raises:
        RequestError: the tools or the choice among them are malformed.
    """
    functions = _functions(body.tools or [])
    choice = body.tool_choice
    if choice is not None and not functions:
        raise RequestError("tool_choice needs tools")
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return functions
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if name not in functions:
        raise RequestError(
            f"tool_choice must be none, auto, required or one of the functions {sorted(functions)}, got {choice!r}"
        )
    return {str(name): functions[str(name)]}


def _functions(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise RequestError(f"a tool must be of type function and have function.name, got {str(tool)[:200]}")
        parameters = function.get("parameters") or {"type": "object"}
        if not isinstance(parameters, dict) or function["name"] in found:
            raise RequestError(
                f"function {function['name']!r} must be named once and have parameters that are a schema"
            )
        found[function["name"]] = parameters
    return found


class ToolText:
    """Takes the growing text of an answer apart into what is shown and the calls in it."""

    __slots__ = ("_buffer", "_is_inside", "calls")

    def __init__(self) -> None:
        self._buffer = ""
        self._is_inside = False
        self.calls: list[ToolCall] = []

    def feed(self, piece: str, *, is_last: bool) -> tuple[str, list[ToolCall]]:
        """Take the next piece; the text that is certainly none of a call, and the calls that are complete now."""
        self._buffer += piece
        shown, calls = "", list[ToolCall]()
        while True:
            mark = _CLOSE if self._is_inside else _OPEN
            before, found, rest = self._buffer.partition(mark)
            if not found:
                break
            self._buffer = rest
            if not self._is_inside:
                shown += before
            elif (call := _parse(before)) is not None:
                calls.append(call)
            else:
                shown += _OPEN + before + _CLOSE
            self._is_inside = not self._is_inside
        if is_last:
            shown += (_OPEN if self._is_inside else "") + self._buffer
            self._buffer = ""
        elif not self._is_inside:
            held = max((n for n in range(1, len(_OPEN)) if self._buffer.endswith(_OPEN[:n])), default=0)
            cut = len(self._buffer) - held
            shown, self._buffer = shown + self._buffer[:cut], self._buffer[cut:]
        self.calls += calls
        return shown, calls


def _parse(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))
