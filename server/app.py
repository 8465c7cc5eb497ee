"""The HTTP application: routes, who may call them, and what errors look like. The work is done elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from specdec import __version__
from specdec.errors import RequestError, UnsupportedError
from specdec.server.admin import add_admin
from specdec.server.generation import EngineError, PromptRows, answer_request, make_jobs
from specdec.server.keys import bearer_tenant
from specdec.server.limits import BodyLimit
from specdec.server.prompt_scores import prompt_scores
from specdec.server.prompts import chat_grammar, chat_prompt, completion_prompts
from specdec.server.service import Service
from specdec.server.tools import offers_tools
from specdec.server.web import add_page
from specdec.server.wire import ChatRequest, CompletionRequest, GenerationRequest
from specdec.server.worker import Draining, Job, Overloaded

logger = logging.getLogger(__name__)

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The application of one service; its lifespan starts and drains the worker."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            is_clean = await run_in_threadpool(service.worker.drain, service.options.drain_s)
            await run_in_threadpool(service.online.close)
            await run_in_threadpool(service.tracer.close)
            logger.info("engine stopped; %s", "all requests finished" if is_clean else "some requests were cut off")

    app = FastAPI(title="specdec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=service.options.max_body_bytes)
    _add_errors(app, service)
    _add_generation(app, service)
    _add_service_routes(app, service)
    add_admin(app, service.online, service.admin_keys)
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

    @app.exception_handler(EngineError)
    async def broken(_: Request, error: Exception) -> Response:
        return refuse(500, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return refuse(error.status_code, str(error.detail))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        tenant = _admit(service, request, body)
        prompt = await run_in_threadpool(chat_prompt, service.serving, body)
        grammar = await run_in_threadpool(chat_grammar, service.serving, body)
        hint = body.prediction.text if body.prediction is not None else None
        jobs = await run_in_threadpool(
            make_jobs, service, "chatcmpl", body, [prompt], tenant, hint=hint, grammar=grammar
        )
        return await answer_request(service, request, "chat", body, jobs, has_tools=offers_tools(body))

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        tenant = _admit(service, request, body)
        prompts = await run_in_threadpool(completion_prompts, service.serving, body)
        jobs = make_jobs(service, "cmpl", body, prompts, tenant)
        return await answer_request(service, request, "text", body, jobs, prompt_rows=await _rows(service, body, jobs))


async def _rows(service: Service, body: CompletionRequest, jobs: Sequence[Job]) -> PromptRows | None:
    """The scores of the prompt, if they are asked for.

    Raises:
        RequestError: there is more than one prompt.
    """
    if body.prompt_logprobs is None:
        return None
    if len(jobs) != body.n:
        raise RequestError("prompt_logprobs needs one prompt")
    return await prompt_scores(service, jobs[0], num_top=body.prompt_logprobs, start=body.prompt_logprob_start)


def _tenant(service: Service, request: Request) -> str:
    """Whose request this is.

    Raises:
        HTTPException: 401, the key is missing or unknown.
    """
    if service.keys.is_open:
        return "anonymous"
    tenant = bearer_tenant(service.keys, request.headers)
    if tenant is None:
        raise HTTPException(401, "the API key is missing or unknown: send Authorization: Bearer KEY")
    return tenant


def _admit(service: Service, request: Request, body: GenerationRequest) -> str:
    tenant = _tenant(service, request)
    names = (service.serving.name, *service.serving.aliases)
    if body.model is not None and body.model not in names:
        raise HTTPException(404, f"model must be {service.serving.name!r}, got {body.model!r}")
    return f"{tenant}/{body.user}" if body.user else tenant


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
