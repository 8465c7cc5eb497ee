"""Chat messages of any provider as plain (role, text): what a model under test is shown in their place.

Content parts are joined, CRLF becomes LF, and tool calls become text at the end of the message, the way a model with a
tool grammar writes them: as raw XML parameters for Claude, as JSON for all others. Escaping matters for drafting:
inside JSON a copied line of code does not match the prompt at its line breaks and quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["message", "text_of", "tool_calls_text", "writes_xml"]

_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "ai": "assistant", "model": "assistant", "developer": "system", "function": "tool", "environment": "tool",
}  # fmt: skip


def message(raw: Mapping[str, Any], *, xml_tools: bool = False) -> dict[str, str]:
    """``{"role", "content"}`` of a message in the shape of OpenAI, Anthropic, litellm or ShareGPT.

    Args:
        raw: ``role`` or ``from``; ``content`` or ``value``; perhaps ``tool_calls``.
        xml_tools: write tool calls with raw parameters.

    Raises:
        ValueError: no role, or a content that is no text.
    """
    role = raw.get("role", raw.get("from"))
    if not isinstance(role, str):
        raise ValueError(f"a message needs a role, got the keys {sorted(raw)}")
    text = text_of(raw["content"] if "content" in raw else raw.get("value"))
    tools = tool_calls_text(raw.get("tool_calls") or (), xml=xml_tools)
    return {"role": _ROLES.get(role, role), "content": f"{text}\n{tools}" if text and tools else text + tools}


def text_of(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or nothing.

    Raises:
        ValueError: it is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content.replace("\r\n", "\n")
    if isinstance(content, list):
        return "\n".join(part for part in map(_part, content) if part)
    raise ValueError(f"a message's content must be text or a list of parts, got {type(content).__name__}")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part.replace("\r\n", "\n")
    if not isinstance(part, Mapping):
        raise ValueError(f"a content part must be an object, got {type(part).__name__}")
    if part.get("type") == "tool_use":
        return tool_calls_text([{"function": {"name": part.get("name"), "arguments": part.get("input")}}], xml=True)
    inner = part.get("text", part.get("content"))  # tool results hold parts again; images hold neither
    return text_of(inner)


def writes_xml(model: object) -> bool:
    """True for the models whose tool calls carry raw text rather than JSON strings."""
    return "claude" in str(model).lower()


def tool_calls_text(calls: Sequence[Mapping[str, Any]], *, xml: bool) -> str:
    """Tool calls as text, one block each."""
    return "\n".join(_tool_call(call.get("function") or call, xml=xml) for call in calls)


def _tool_call(function: Mapping[str, Any], *, xml: bool) -> str:
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:  # cut off or malformed by the model: its own text is what was generated
            return f"<tool_call>\n{name}\n{arguments}\n</tool_call>"
    if not xml or not isinstance(arguments, Mapping):
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"
    lines = [f"<function={name}>"]
    for key, value in arguments.items():
        raw = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"<parameter={key}>\n{raw}\n</parameter>")
    return "\n".join(["<tool_call>", *lines, "</function>", "</tool_call>"])
