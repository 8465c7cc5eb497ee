"""One request to an OpenAI-compatible endpoint, streamed, with the times at which its text came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from specdec.bench.traces import messages_of
from specdec.errors import ConfigError

if TYPE_CHECKING:
    import httpx

__all__ = ["Answer", "Endpoint", "ask", "request_body"]

Api = Literal["completions", "chat"]
_PATHS: Mapping[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go.

    Args:
        name: of the arm.
        url: up to, and with or without, ``/v1``.
        model: as the server knows it.
        api: completions or chat.
        key: bearer token; never written anywhere.
    """

    name: str
    url: str
    model: str
    api: Api = "completions"
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url must begin with http:// or https://, got {self.url!r}")
        if self.api not in _PATHS:
            raise ConfigError(f"api must be completions or chat, got {self.api!r}")

    @property
    def address(self) -> str:
        """The whole address of the route."""
        return self.url.rstrip("/").removesuffix("/v1") + _PATHS[self.api]

    @property
    def headers(self) -> dict[str, str]:
        """What is sent along."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


@dataclass(slots=True)
class Answer:
    """What came back.

    Args:
        text: of the answer.
        seconds: from sending to the end of the stream.
        stamps: seconds at which pieces of text came.
        prompt_tokens: as the server counts; None: it does not say.
        output_tokens: likewise.
        speculation: the ``metrics.speculative_decoding`` block of servers that send one.
        error: why the request failed, or None.
    """

    text: str = ""
    seconds: float = 0.0
    stamps: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    speculation: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def request_body(endpoint: Endpoint, parts: Sequence[str | tuple[int, ...]], **options: Any) -> dict[str, Any]:
    """The request for a prompt, with ``options`` such as max_tokens and temperature.

    Raises:
        ConfigError: the prompt is of a kind that the api cannot carry.
    """
    body = {"model": endpoint.model, "stream": True, "stream_options": {"include_usage": True}, **options}
    if endpoint.api == "chat":
        return {**body, "messages": messages_of(parts)}
    if all(isinstance(part, str) for part in parts):
        return {**body, "prompt": "".join(part for part in parts if isinstance(part, str))}
    if all(not isinstance(part, str) for part in parts):
        return {**body, "prompt": [token for part in parts for token in part]}
    raise ConfigError("a prompt must be text or token ids, not a mixture")


async def ask(client: httpx.AsyncClient, endpoint: Endpoint, body: Mapping[str, Any]) -> Answer:
    """Send one streaming request and read it to the end; a failure is an ``Answer`` with an error, not an exception.

    Args:
        client: open; its timeout is the request's.
        endpoint: where to.
        body: of ``request_body``.
    """
    import httpx

    answer = Answer()
    start = perf_counter()
    try:
        async with client.stream("POST", endpoint.address, json=body, headers=endpoint.headers) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                answer.error = f"HTTP {response.status_code}"
            else:
                await _read(response, answer, start)
    except httpx.TimeoutException:
        answer.error = "timeout"
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    answer.seconds = perf_counter() - start
    return answer


async def _read(response: httpx.Response, answer: Answer, start: float) -> None:
    """Follow the server-sent events until ``[DONE]``."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # comments, event names, blank lines between events
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            answer.error = "malformed event"
            return
        if event.get("error"):
            answer.error = "error in the stream"
            return
        _take(event, answer, start)
    answer.error = "stream cut short"


def _take(event: Mapping[str, Any], answer: Answer, start: float) -> None:
    for choice in event.get("choices") or ():
        piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if piece:
            answer.text += piece
            answer.stamps.append(perf_counter() - start)
    usage = event.get("usage") or {}
    answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
    answer.output_tokens = usage.get("completion_tokens", answer.output_tokens)
    answer.speculation = (event.get("metrics") or {}).get("speculative_decoding") or answer.speculation
