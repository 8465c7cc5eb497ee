"""The sidecar's HTTP side: its own three routes, and the relay of everything else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from time import perf_counter

import aiohttp
from aiohttp import web

from specdec import __version__
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.service import Job, Speed, SpeedOptions
from specdec.server.sidecar.splice import StreamBroken
from specdec.server.sidecar.tokens import Tokens
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream, end_to_end
from specdec.server.sidecar.whole import Misfit

logger = logging.getLogger(__name__)

__all__ = ["Sidecar", "create_app"]

_BEGUN = web.RequestKey("begun", web.StreamResponse)  # the answer whose head the client has
_BUSY = frozenset({429, 502, 503, 504})
_OF_STREAMS = frozenset({"content-type", "content-length", "cache-control", "x-accel-buffering"})
_CIRCUIT = {"closed": 0, "half-open": 1, "open": 2}
_MAX_COPY = 8 << 20  # bytes of an answer that are kept for whoever reads it afterwards
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/models")


class _HeadWithBody(web.StreamResponse):
    """Its head waits for the first write, as that of aiohttp's own whole answers does: one packet instead of two."""

    _send_headers_immediately = False


class Sidecar:
    """Carries requests to the upstream and answers back.

    Args:
        options: see ``RelayOptions``.
        speed: what is done beyond that; with mode ``off`` bodies are not even read.
        tokens: the upstream's tokenizer, or none.
    """

    def __init__(
        self, options: RelayOptions, speed: SpeedOptions | None = None, *, tokens: Tokens | None = None
    ) -> None:
        self.options = options
        self.upstream = Upstream(options)
        self.metrics = SidecarMetrics()
        self.num_in_flight = 0
        wanted = speed or SpeedOptions(mode="off")
        self.speed: Speed | None = None
        if wanted.mode != "off":
            self.speed = Speed(wanted, self.upstream, self.metrics, tokens, is_busy=lambda: self.num_in_flight > 0)

    async def start(self) -> None:
        """Get ready; on the event loop that will serve."""
        await self.upstream.start()
        if self.speed is not None:
            await self.speed.start()

    async def close(self) -> None:
        """Let everything go."""
        if self.speed is not None:
            await self.speed.close()
        await self.upstream.close()

    # --- one request --------------------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Relay one request; every error of ours is in the form of the OpenAI API."""
        if self.num_in_flight >= self.options.max_in_flight:
            return self._refuse(429, f"{self.options.max_in_flight} requests are under way", 1)
        self.num_in_flight += 1
        self.metrics.in_flight.inc()
        outcome = "cancelled"
        try:
            answer = await self._timed(request)
            outcome = "ok" if answer.status < 400 else "error"
            return answer
        except Unreachable as error:
            outcome = "unreachable"
            if _BEGUN in request:
                _cut(request)
                return request[_BEGUN]
            return self._refuse(error.status, str(error), error.retry_after)
        finally:
            self.num_in_flight -= 1
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(_route(request.path), outcome).inc()

    async def _timed(self, request: web.Request) -> web.StreamResponse:
        arrived = perf_counter()
        if not request.raw_path.startswith("/"):
            return self._refuse(400, "the request's target must be a path: there is one upstream only")
        if request.headers.get("Upgrade") and "upgrade" in request.headers.get("Connection", "").lower():
            return self._refuse(501, "upgrades of the connection are not relayed")
        body = await request.read() if request.can_read_body else b""
        question = Question(request.method, request.raw_path, request.headers.copy(), body)
        job = Job(question) if self.speed is None else self.speed.consider(question)
        self.metrics.overhead.observe(perf_counter() - arrived)
        if job.cached is not None:
            return web.Response(body=job.cached.body, headers={"Content-Type": job.cached.content_type})
        try:
            async with asyncio.timeout(self.options.timeouts.total_s):
                relay = self._relay if job.shape is None else self._assemble
                return await relay(request, job, arrived)
        except TimeoutError:
            raise Unreachable(504, f"the request took longer than {self.options.timeouts.total_s} s") from None
        finally:
            self.metrics.e2e.observe(perf_counter() - arrived)

    async def _relay(self, request: web.Request, job: Job, arrived: float) -> web.StreamResponse:
        async with self.upstream.ask(job.question) as answer:
            return await self._pass(request, job, answer, arrived)

    async def _assemble(self, request: web.Request, job: Job, arrived: float) -> web.StreamResponse:
        """Answer a request that is not streamed from a stream; where that does not fit, ask as the client did."""
        assert job.run is not None
        assert job.shape is not None
        assert job.plain is not None
        async with self.upstream.ask(job.question) as answer:
            if answer.status in _BUSY:
                return await self._pass(request, Job(job.plain), answer, arrived)
            try:
                if answer.status == 200 and _is_stream(answer):
                    body = await job.run.whole(answer, job.shape)
                    headers = end_to_end(answer.headers.items(), drop=_OF_STREAMS)
                    headers["Content-Type"] = "application/json"
                    self.metrics.ttft.observe(perf_counter() - arrived)
                    if self.speed is not None:
                        self.speed.finished(job, headers, body)
                    return web.Response(body=body, headers=headers)
            except (aiohttp.ClientError, TimeoutError, ConnectionError, StreamBroken, Misfit) as error:
                logger.info("an answer is asked for again as the client did: %s", error)
        return await self._relay(request, Job(job.plain), arrived)

    async def _pass(
        self, request: web.Request, job: Job, answer: aiohttp.ClientResponse, arrived: float
    ) -> web.StreamResponse:
        if answer.status >= 400:
            self.metrics.errors.labels(str(answer.status)).inc()
        client = await self._begin(request, answer, is_relayed=job.run is None)
        self.metrics.ttft.observe(perf_counter() - arrived)
        copy: list[bytes] | None = [] if job.wants_copy and answer.status == 200 else None
        num_bytes = 0
        try:
            async with aclosing(self._answer(answer, job)) as pieces:
                async for piece in pieces:
                    is_last = job.run is None and _is_read(answer)
                    await (client.write_eof(piece) if is_last else client.write(piece))
                    if copy is not None:
                        num_bytes += len(piece)
                        copy.append(piece)
                        copy = copy if num_bytes <= _MAX_COPY else None
            await client.write_eof()
        except (aiohttp.ClientError, TimeoutError, ConnectionError, StreamBroken):
            _cut(request)  # what the client has is no whole answer, and it must not look like one
            return client
        if copy is not None and self.speed is not None:
            self.speed.finished(job, answer.headers, b"".join(copy))
        if job.run is not None and self.speed is not None:
            self.speed.accelerated(job)
        return client

    def _answer(self, answer: aiohttp.ClientResponse, job: Job) -> AsyncGenerator[bytes, None]:
        """The body that the client gets."""
        if job.run is not None and answer.status == 200 and _is_stream(answer):
            return job.run.pieces(answer)
        is_events = answer.headers.get("Content-Type", "").startswith("text/event-stream")
        return self._watched(answer) if job.wants_copy and is_events and self.speed else self._pieces(answer)

    async def _watched(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes, while the upstream's speed is measured."""
        assert self.speed is not None
        last: float | None = None
        was_crowded = False
        async for piece in self._pieces(answer):
            now = perf_counter()
            if last is not None:
                self.speed.shop.saw_gap(now - last, piece.count(b"data:"), was_crowded=was_crowded)
            last, was_crowded = now, self.speed.shop.is_crowded
            yield piece

    async def _begin(
        self, request: web.Request, answer: aiohttp.ClientResponse, *, is_relayed: bool
    ) -> web.StreamResponse:
        """Send the head, at once unless some of the body can go along."""
        is_here = is_relayed and (answer.content.total_bytes > 0 or _is_read(answer))
        client = (_HeadWithBody if is_here else web.StreamResponse)(
            status=answer.status, reason=answer.reason, headers=end_to_end(answer.headers.items())
        )
        request[_BEGUN] = client
        await client.prepare(request)
        return client

    async def _pieces(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes; what the client has not taken is not read from the upstream."""
        idle_s = self.options.timeouts.idle_s
        while True:
            piece = answer.content.read_nowait()  # all that is here is one write, and needs no timer
            if not piece:
                if _is_read(answer):
                    return
                async with asyncio.timeout(idle_s):
                    piece = await answer.content.readany()
                if not piece:
                    return
            yield piece

    def _refuse(self, status: int, message: str, retry_after: int | None = None) -> web.StreamResponse:
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "upstream_error"
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        error = {"message": message, "type": kind, "param": None, "code": None}
        return web.json_response({"error": error}, status=status, headers=headers)

    # --- what it tells of itself --------------------------------------------------------------------------------------

    def health(self) -> dict[str, object]:
        """The state of the sidecar and what it knows of its upstream."""
        state = self.upstream.breaker.state
        return {
            "status": "ok" if state == "closed" else "degraded",
            "version": __version__,
            "upstream": {"url": self.upstream.base, "circuit": state},
            "requests_under_way": self.num_in_flight,
        } | ({"speed": self.speed.table()} if self.speed is not None else {})


def _is_stream(answer: aiohttp.ClientResponse) -> bool:
    """Events that can be read as they come."""
    is_events = answer.headers.get("Content-Type", "").startswith("text/event-stream")
    return is_events and "Content-Encoding" not in answer.headers and "Content-Length" not in answer.headers


def _is_read(answer: aiohttp.ClientResponse) -> bool:
    """The whole body came and was read."""
    return answer.content.at_eof() and answer.content.exception() is None


def _route(path: str) -> str:
    """The route's label; paths that clients make up must not make up labels."""
    return path if path in _ROUTES else "other"


def _cut(request: web.Request) -> None:
    """End the client's connection in a way that no client takes for the end of the answer."""
    if request.transport is not None:
        request.transport.abort()


def create_app(sidecar: Sidecar) -> web.Application:
    """The application of one sidecar. ``/health``, ``/ready`` and ``/metrics`` are its own; all else is relayed."""
    app = web.Application(client_max_size=sidecar.options.max_body_bytes)

    async def health(_: web.Request) -> web.Response:
        return web.json_response(sidecar.health(), dumps=lambda body: json.dumps(body, indent=1))

    async def ready(_: web.Request) -> web.Response:
        is_ready = sidecar.upstream.breaker.state != "open"
        return web.json_response({"status": "ok" if is_ready else "open"}, status=200 if is_ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        sidecar.metrics.circuit.set(_CIRCUIT[sidecar.upstream.breaker.state])
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=sidecar.metrics.render(), headers=headers)

    async def life(_: web.Application) -> AsyncIterator[None]:
        await sidecar.start()
        yield
        await sidecar.close()

    app.cleanup_ctx.append(life)
    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_route("*", "/{anything:.*}", sidecar.handle)
    return app
