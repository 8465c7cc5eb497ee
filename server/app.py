"""The HTTP application: routes, who may call them, and what errors look like. The work is done elsewhere."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from specdec import __version__
from specdec.errors import RequestError, UnsupportedError
from specdec.server.answers import Answer, Kind
from specdec.server.exchange import Mailboxes, conversation
from specdec.server.keys import Keyring
from specdec.server.limits import BodyLimit
from specdec.server.metrics import ServerMetrics
from specdec.server.prompts import Serving, chat_grammar, chat_prompt, completion_prompts, jobs_of
from specdec.server.speculation import Choices
from specdec.server.tools import offers_tools
from specdec.server.tracing import NoTracer, RequestSpan, RequestTracer
from specdec.server.web import add_page
from specdec.server.wire import ChatRequest, CompletionRequest, GenerationRequest
from specdec.server.worker import Draining, EngineWorker, Job, Overloaded, Update

logger = logging.getLogger(__name__)

__all__ = ["Service", "ServiceOptions", "create_app"]

_CLIENT_GONE = 499  # nginx's number for it
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How a service behaves towards its clients.

    Args:
        deadline_s: seconds that one request may take; None: no limit.
        max_body_bytes: of a request.
        has_metrics: answers carry what speculation did; off where tenants must not see each other's traces.
        drain_s: seconds that live requests get at shutdown.
    """

    deadline_s: float | None = 600.0
    max_body_bytes: int = 8 * 2**20
    has_metrics: bool = True
    drain_s: float = 30.0


@dataclass(slots=True)
class Service:
    """Everything a request needs; made by ``specdec.server.launch``.

    Args:
        serving: the model and its limits.
        choices: the drafters that requests may choose.
        make_worker: builds the worker around a function that takes its updates.
        keys: who is let in.
        make_metrics: builds the metrics of a worker.
        options: see ``ServiceOptions``.
        tracer: makes the spans of requests.
    """

    serving: Serving
    choices: Choices
    make_worker: Callable[[Callable[[Sequence[Update]], None]], EngineWorker]
    keys: Keyring
    make_metrics: Callable[[EngineWorker], ServerMetrics]
    options: ServiceOptions = field(default_factory=ServiceOptions)
    tracer: RequestTracer = field(default_factory=NoTracer)
    worker: EngineWorker = field(init=False)
    mailboxes: Mailboxes = field(init=False)
    metrics: ServerMetrics = field(init=False)

    def start(self) -> None:
        """Start the engine's thread; on the event loop that will serve."""
        self.mailboxes = Mailboxes(asyncio.get_running_loop())
        self.worker = self.make_worker(self.mailboxes.deliver)
        self.metrics = self.make_metrics(self.worker)
        self.worker.start()


def create_app(service: Service) -> FastAPI:
    """The application of one service; its lifespan starts and drains the worker."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            is_clean = await run_in_threadpool(service.worker.drain, service.options.drain_s)
            await run_in_threadpool(service.tracer.close)
            logger.info("engine stopped; %s", "all requests finished" if is_clean else "some requests were cut off")

    app = FastAPI(title="specdec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=service.options.max_body_bytes)
    _add_errors(app, service)
    _add_generation(app, service)
    _add_service_routes(app, service)
    add_page(app)
    return app


def _error(
    status: int, message: str, kind: str, *, param: str | None = None, retry_after: int | None = None
) -> Response:
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error in the form of the OpenAI API, one sentence that names the value and the rule."""

    def refuse(status: int, message: str, kind: str = "invalid_request_error", **more: Any) -> Response:
        service.metrics.refused(status)
        return _error(status, message, kind, **more)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        given = f", got {repr(first['input'])[:100]}" if first["type"] not in ("missing", "json_invalid") else ""
        return refuse(400, f"{where or 'body'}: {first['msg']}{given}", param=where)

    @app.exception_handler(RequestError)
    @app.exception_handler(UnsupportedError)
    async def wrong(_: Request, error: Exception) -> Response:
        return refuse(400, str(error))

    @app.exception_handler(Overloaded)
    async def full(_: Request, error: Overloaded) -> Response:
        return refuse(429, str(error), "rate_limit_error", retry_after=error.retry_after)

    @app.exception_handler(Draining)
    async def closing(_: Request, error: Draining) -> Response:
        return refuse(503, str(error), "server_error", retry_after=error.retry_after)

    @app.exception_handler(TimeoutError)
    async def late(_: Request, __: Exception) -> Response:
        return refuse(504, f"the request took longer than {service.options.deadline_s} s", "timeout_error")

    @app.exception_handler(_EngineError)
    async def broken(_: Request, error: Exception) -> Response:
        return refuse(500, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return refuse(error.status_code, str(error.detail))


class _EngineError(Exception):
    """The engine gave up on a request."""


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        tenant = _admit(service, request, body)
        prompt = await run_in_threadpool(chat_prompt, service.serving, body)
        grammar = await run_in_threadpool(chat_grammar, service.serving, body)
        hint = body.prediction.text if body.prediction is not None else None
        jobs = await run_in_threadpool(_jobs, service, "chatcmpl", body, [prompt], tenant, hint=hint, grammar=grammar)
        return await _answer(service, request, "chat", body, jobs, has_tools=offers_tools(body))

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        tenant = _admit(service, request, body)
        prompts = await run_in_threadpool(completion_prompts, service.serving, body)
        jobs = _jobs(service, "cmpl", body, prompts, tenant)
        return await _answer(service, request, "text", body, jobs)


def _tenant(service: Service, request: Request) -> str:
    """Whose request this is.

    Raises:
        HTTPException: 401, the key is missing or unknown.
    """
    if service.keys.is_open:
        return "anonymous"
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    tenant = service.keys.tenant_of(key.strip()) if scheme.lower() == "bearer" else None
    if tenant is None:
        raise HTTPException(401, "the API key is missing or unknown: send Authorization: Bearer KEY")
    return tenant


def _admit(service: Service, request: Request, body: GenerationRequest) -> str:
    tenant = _tenant(service, request)
    names = (service.serving.name, *service.serving.aliases)
    if body.model is not None and body.model not in names:
        raise HTTPException(404, f"model must be {service.serving.name!r}, got {body.model!r}")
    return f"{tenant}/{body.user}" if body.user else tenant


def _jobs(
    service: Service,
    prefix: str,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
    tenant: str,
    *,
    hint: str | None = None,
    grammar: str | None = None,
) -> list[Job]:
    request_id = f"{prefix}-{secrets.token_hex(12)}"
    return jobs_of(
        service.serving, service.choices, body, prompts, request_id=request_id, tenant=tenant, limit=body.limit,
        num_logprobs=body.num_logprobs, has_steps=service.options.has_metrics, hint=hint, grammar=grammar,
    )  # fmt: skip


async def _answer(
    service: Service,
    request: Request,
    kind: Kind,
    body: ChatRequest | CompletionRequest,
    jobs: Sequence[Job],
    *,
    has_tools: bool = False,
) -> Response:
    """Run the jobs; the whole answer, or a stream."""
    answer_id = jobs[0].request.request_id.rpartition("-")[0]
    tokenizer = service.serving.tokenizer
    answer = Answer(
        kind, answer_id, service.serving.name, jobs, tokenizer, n=body.n, has_ids=body.return_token_ids,
        has_tools=has_tools,
    )  # fmt: skip
    span = service.tracer.start(body, is_chat=kind == "chat", model=service.serving.name, headers=request.headers)
    pieces = _pieces(service, answer, jobs, span)
    if not body.stream:
        await _unless_gone(request, _exhaust(pieces))
        return JSONResponse(answer.whole(has_metrics=service.options.has_metrics))
    first = await _unless_gone(request, anext(pieces))  # what can be refused is refused before the status line is sent
    return StreamingResponse(
        _events(service, answer, pieces, first, has_usage=body.wants_usage_chunk),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _exhaust(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """What ``work`` returns, unless the client goes away first: then it is cancelled, and with it what it started.

    Raises:
        HTTPException: 499, which nobody is there to read.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    main, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({main, watch}, return_when=asyncio.FIRST_COMPLETED)
        if main.done():
            return main.result()
        raise HTTPException(_CLIENT_GONE, "the client closed the connection")
    finally:
        for task in (main, watch):
            task.cancel()
        await asyncio.gather(main, watch, return_exceptions=True)


async def _pieces(
    service: Service, answer: Answer, jobs: Sequence[Job], span: RequestSpan
) -> AsyncIterator[dict[str, Any] | None]:
    """Run the jobs and end the span; for every update the choice of its chunk, None where it shows nothing.

    Raises:
        RequestError, _EngineError, TimeoutError: as ``_updates``.
    """
    error: BaseException | None = None
    try:
        async for piece in _updates(service, answer, jobs, span):
            yield piece
    except BaseException as raised:
        error = raised
        raise
    finally:
        stats = [choice.stats for choice in answer.choices if choice.stats is not None]
        span.end(stats, [choice.finish_reason for choice in answer.choices if choice.finish_reason], error)


async def _updates(
    service: Service, answer: Answer, jobs: Sequence[Job], span: RequestSpan
) -> AsyncIterator[dict[str, Any] | None]:
    """Run the jobs; for every update the choice of its chunk.

    Raises:
        RequestError: the engine refused a request.
        _EngineError: the engine failed.
        TimeoutError: the deadline passed.
    """
    arrived = time.monotonic()
    first: dict[int, float] = {}
    talk = conversation(service.worker, service.mailboxes, jobs, deadline_s=service.options.deadline_s)
    async with talk as updates:
        async for index, update in updates:
            if update.error is not None:
                raise RequestError(update.error) if update.is_refused else _EngineError(update.error)
            now = time.monotonic() - arrived
            if update.new_ids:
                first.setdefault(index, now)
                span.first_token()
            piece = answer.take(index, update)
            if update.finish_reason is not None and update.stats is not None:
                service.metrics.finished(
                    reason=update.finish_reason, num_prompt_tokens=update.stats.num_prompt_tokens,
                    num_new_tokens=update.stats.num_output_tokens, first_s=first.get(index), total_s=now,
                )  # fmt: skip
            yield piece


async def _events(
    service: Service,
    answer: Answer,
    pieces: AsyncIterator[dict[str, Any] | None],
    first: dict[str, Any] | None,
    *,
    has_usage: bool,
) -> AsyncIterator[bytes]:
    """The server-sent events of a stream. Once it has begun, an error is an event."""
    more: dict[str, Any] = {"usage": None} if has_usage else {}
    if answer.kind == "chat":
        for choice in answer.choices:
            yield _event(answer.first_chunk(choice.index) | more)
    if first is not None:
        yield _event(answer.chunk([first], **more))
    try:
        async for piece in pieces:
            if piece is not None:
                yield _event(answer.chunk([piece], **more))
    except (RequestError, _EngineError, TimeoutError) as error:
        status = 504 if isinstance(error, TimeoutError) else 500
        service.metrics.refused(status)
        message = str(error) or f"the request took longer than {service.options.deadline_s} s"
        yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
        return
    if has_usage:
        block = answer.metrics() if service.options.has_metrics else {}
        final = {"usage": answer.usage()} | ({"metrics": block} if block else {})
        yield _event(answer.chunk([], **final))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _add_service_routes(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _tenant(service, request)
        names = (service.serving.name, *service.serving.aliases)
        shared = {"object": "model", "created": created, "owned_by": "specdec"}
        own = {"max_model_len": service.serving.max_length, "drafters": list(service.choices.drafters)}
        data = [{"id": name} | own | shared for name in names]
        return {"object": "list", "data": data}

    @app.get("/health")
    async def health() -> Response:
        is_well = service.worker.state in ("running", "draining")
        return JSONResponse({"status": service.worker.state}, status_code=200 if is_well else 503)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.worker.state == "running"
        return JSONResponse({"status": service.worker.state}, status_code=200 if is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
