"""One generation request: its jobs, its answer, and the stream that carries it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from specdec.errors import RequestError
from specdec.server.affinity import HEADER, affinity_of
from specdec.server.answers import Answer, Kind
from specdec.server.exchange import conversation
from specdec.server.prompts import jobs_of, marked_private
from specdec.server.service import Service
from specdec.server.tracing import RequestSpan
from specdec.server.wire import ChatRequest, CompletionRequest
from specdec.server.worker import Job

__all__ = ["EngineError", "PromptRows", "answer_request", "make_jobs"]

_CLIENT_GONE = 499  # nginx's number for it
_T = TypeVar("_T")
PromptRows: TypeAlias = Sequence[dict[str, Any] | None]


class EngineError(Exception):
    """The engine gave up on a request."""


def make_jobs(
    service: Service,
    prefix: str,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]],
    tenant: str,
    *,
    hint: str | None = None,
    grammar: str | None = None,
) -> list[Job]:
    """One job per choice; ``prefix`` begins their ids, ``hint`` and ``grammar`` are those of a chat."""
    request_id = f"{prefix}-{secrets.token_hex(12)}"
    return jobs_of(
        service.serving, service.choices, body, prompts, request_id=request_id, tenant=tenant, limit=body.limit,
        num_logprobs=body.num_logprobs, has_steps=service.options.has_metrics, hint=hint, grammar=grammar,
    )  # fmt: skip


async def answer_request(
    service: Service,
    request: Request,
    kind: Kind,
    body: ChatRequest | CompletionRequest,
    jobs: Sequence[Job],
    *,
    has_tools: bool = False,
    prompt_rows: PromptRows | None = None,
) -> Response:
    """Run the jobs; the whole answer, or a stream. ``prompt_rows``: shown with each choice of a whole answer."""
    jobs = marked_private(jobs, request.headers)
    answer_id = jobs[0].request.request_id.rpartition("-")[0]
    tokenizer = service.serving.tokenizer
    answer = Answer(
        kind, answer_id, service.serving.name, jobs, tokenizer, n=body.n, has_ids=body.return_token_ids,
        has_tools=has_tools,
    )  # fmt: skip
    span = service.tracer.start(body, is_chat=kind == "chat", model=service.serving.name, headers=request.headers)
    pieces = _pieces(service, answer, jobs, span)
    headers = {HEADER: affinity_of(body, jobs[0].request.tenant, service.keys)}
    if not body.stream:
        await _unless_gone(request, _exhaust(pieces))
        whole = answer.whole(has_metrics=service.options.has_metrics)
        for shown in whole["choices"] if prompt_rows is not None else ():
            shown["prompt_logprobs"] = list(prompt_rows or ())
        return JSONResponse(whole, headers=headers)
    first = await _unless_gone(request, anext(pieces))  # what can be refused is refused before the status line is sent
    return StreamingResponse(
        _events(service, answer, pieces, first, has_usage=body.wants_usage_chunk),
        media_type="text/event-stream",
        headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
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
        RequestError, EngineError, TimeoutError: as ``_updates``.
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
        EngineError: the engine failed.
        TimeoutError: the deadline passed.
    """
    arrived = time.monotonic()
    first: dict[int, float] = {}
    talk = conversation(service.worker, service.mailboxes, jobs, deadline_s=service.options.deadline_s)
    async with talk as updates:
        async for index, update in updates:
            if update.error is not None:
                raise RequestError(update.error) if update.is_refused else EngineError(update.error)
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
    except (RequestError, EngineError, TimeoutError) as error:
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
