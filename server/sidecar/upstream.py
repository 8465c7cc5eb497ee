"""Requests to the one upstream: what is sent along, when a request is tried again, when the upstream is left alone.

aiohttp carries the bytes on both sides: its parsers are compiled, which is what keeps the added latency low.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from specdec.errors import SpecdecError
from specdec.server.sidecar.breaker import CircuitBreaker
from specdec.server.sidecar.options import RelayOptions, upstream_base

__all__ = ["Question", "Unreachable", "Upstream", "end_to_end"]

# RFC 9110, 7.6.1: these concern one connection only. Host and lengths are made anew.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "trailer"}
    | {"transfer-encoding", "upgrade", "te"}  # codespell:ignore te
)
_MADE_ANEW = frozenset({"host", "content-length", "expect"})
_OURS = "x-spec"  # prefix of the headers that are for the sidecar alone
_GENERATION = ("/v1/chat/completions", "/v1/completions")
_BUSY = frozenset({429, 502, 503})
_READ_BYTES = 1 << 16


class Unreachable(SpecdecError):
    """The upstream gave no answer. ``status`` is what the client is told; ``retry_after`` is in seconds."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def end_to_end(headers: Iterable[tuple[str, str]], *, drop: frozenset[str] = frozenset()) -> CIMultiDict[str]:
    """The headers that travel past a proxy, in order, repeated ones included."""
    pairs = list(headers)
    named = {word.strip().lower() for name, value in pairs if name.lower() == "connection" for word in value.split(",")}
    dropped = _HOP_BY_HOP | named | drop
    return CIMultiDict((name, value) for name, value in pairs if name.lower() not in dropped)


@dataclass(frozen=True, slots=True)
class Question:
    """One request as it goes to the upstream.

    Args:
        method: of HTTP.
        target: path and query, as the client sent them.
        headers: the client's.
        body: whole; empty for none.
    """

    method: str
    target: str
    headers: CIMultiDict[str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def is_repeatable(self) -> bool:
        """Asking twice leaves nothing behind: it is read-only, or a generation that the provider does not store."""
        if self.method in ("GET", "HEAD", "OPTIONS"):
            return True
        if self.method != "POST" or not self.path.endswith(_GENERATION):
            return False
        try:
            body = json.loads(self.body)
        except ValueError:
            return False
        return isinstance(body, dict) and not body.get("store") and not body.get("background")


class Upstream:
    """The one place that connects to the upstream; its address never depends on a request.

    Args:
        options: see ``RelayOptions``.
    """

    def __init__(self, options: RelayOptions) -> None:
        self.options = options
        self.base = upstream_base(options.url)
        self.breaker = CircuitBreaker(options.failures_to_open, options.cooldown_s)
        self.num_retries = 0
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the pool of connections; on the event loop that will use it."""
        waits = self.options.timeouts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=waits.connect_s, connect=waits.connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def ask(self, question: Question, *, is_extra: bool = False) -> AsyncIterator[aiohttp.ClientResponse]:
        """The head of the answer; leaving the block closes the connection if the body was not read to its end.

        Args:
            question: what to ask.
            is_extra: a request of the sidecar's own: not tried again, not sent while the upstream is in doubt, and no
                ground to leave it alone.

        Raises:
            Unreachable: there is no answer: no connection, none in time, or the breaker is open.
        """
        if is_extra:
            if self.breaker.state != "closed":
                raise Unreachable(503, "the upstream is in doubt")
            response = await self._try(question, 0)
        else:
            response = await self._admitted(question)
        try:
            yield response
        finally:
            response.close() if not response.content.at_eof() else response.release()

    async def _admitted(self, question: Question) -> aiohttp.ClientResponse:
        """A client's request, which the circuit breaker may refuse and learns from."""
        if not self.breaker.admits():
            pause = max(1, round(self.breaker.wait_s))
            raise Unreachable(503, "the upstream failed repeatedly and is left alone for a while", pause)
        has_verdict = False
        try:
            response = await self._try(question, self.options.retries)
            has_verdict = True
            if response.status in (502, 503, 504):
                self.breaker.failed()
            else:
                self.breaker.succeeded()
        except Unreachable:
            has_verdict = True
            self.breaker.failed()
            raise
        finally:
            if not has_verdict:
                self.breaker.abandoned()
        return response

    async def _try(self, question: Question, retries: int) -> aiohttp.ClientResponse:
        """Ask until there is an answer that is worth relaying."""
        while True:
            pause = 0.0
            try:
                response = await self._send(question)
                wait = _pause_of(response)
                is_last = retries < 1 or response.status not in _BUSY or wait > self.options.max_retry_wait_s
                if is_last or not question.is_repeatable:
                    return response
                pause = wait
                response.close()
            except TimeoutError as error:  # also: no connection in time
                if retries < 1 or not isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise Unreachable(504, "the upstream did not answer in time") from error
            except aiohttp.ClientError as error:
                nothing_was_sent = isinstance(error, aiohttp.ClientConnectorError)
                if retries < 1 or not (nothing_was_sent or question.is_repeatable):
                    raise Unreachable(502, f"the upstream cannot be reached: {type(error).__name__}") from error
            retries -= 1
            self.num_retries += 1
            await asyncio.sleep(pause)

    async def _send(self, question: Question) -> aiohttp.ClientResponse:
        if self._session is None:
            raise Unreachable(503, "the sidecar is starting", 1)
        headers = end_to_end(question.headers.items(), drop=_MADE_ANEW)
        for name in [name for name in headers if name.lower().startswith(_OURS)]:
            headers.popall(name, None)
        async with asyncio.timeout(self.options.timeouts.first_byte_s):
            return await self._session.request(
                question.method, URL(self.base + question.target, encoded=True), headers=headers,
                data=question.body or None, allow_redirects=False,
            )  # fmt: skip


def _pause_of(response: aiohttp.ClientResponse) -> float:
    """Seconds that the upstream asks for; a date counts as too long to wait for."""
    stated = response.headers.get("Retry-After", "0")
    try:
        return max(0.0, float(stated))
    except ValueError:
        return float("inf")
