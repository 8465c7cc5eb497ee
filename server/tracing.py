"""A span for every request that reached the engine, in OpenTelemetry's conventions for generative AI.

Spans carry numbers and names of options, never text: neither prompts nor answers, nor stop strings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from specdec import __version__
from specdec.errors import ConfigError, UnsupportedError
from specdec.server.worker import RequestStats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from specdec.server.wire import ChatRequest, CompletionRequest

__all__ = ["NoTracer", "OtelTracer", "RequestSpan", "RequestTracer", "otlp_tracer"]


class RequestSpan(Protocol):
    """One request, from its arrival to its last byte."""

    def first_token(self) -> None:
        """The first token came; further calls are ignored."""

    def end(self, stats: Sequence[RequestStats], reasons: Sequence[str], error: BaseException | None) -> None:
        """The request is over: what its choices cost, how they ended, and what went wrong, if anything did."""


class RequestTracer(Protocol):
    """Makes spans."""

    def start(
        self, body: ChatRequest | CompletionRequest, *, is_chat: bool, model: str, headers: Mapping[str, str]
    ) -> RequestSpan:
        """Begin the span of a request; ``headers`` may carry the caller's trace (W3C ``traceparent``)."""

    def close(self) -> None:
        """Send what waits."""


class NoTracer:
    """Nobody asked for spans; it is its own span."""

    def start(
        self, body: ChatRequest | CompletionRequest, *, is_chat: bool, model: str, headers: Mapping[str, str]
    ) -> RequestSpan:
        return self

    def first_token(self) -> None:
        pass

    def end(self, stats: Sequence[RequestStats], reasons: Sequence[str], error: BaseException | None) -> None:
        pass

    def close(self) -> None:
        pass


class OtelTracer:
    """Spans through an OpenTelemetry provider.

    Args:
        provider: decides where they go; shut down by ``close``.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("specdec", __version__)

    def start(
        self, body: ChatRequest | CompletionRequest, *, is_chat: bool, model: str, headers: Mapping[str, str]
    ) -> RequestSpan:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        operation = "chat" if is_chat else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {model}", context=extract(headers), kind=SpanKind.SERVER, attributes=_asked(body, operation)
        )
        span.set_attribute("gen_ai.request.model", body.model or model)
        span.set_attribute("gen_ai.response.model", model)
        return _OtelSpan(span)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelSpan:
    def __init__(self, span: Span) -> None:
        self._span = span
        self._began = time.monotonic()
        self._has_token = False

    def first_token(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - self._began)

    def end(self, stats: Sequence[RequestStats], reasons: Sequence[str], error: BaseException | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(_used(stats) | {"gen_ai.response.finish_reasons": list(reasons)})
        if error is not None:
            is_gone = isinstance(error, (GeneratorExit, asyncio.CancelledError))
            self._span.set_attribute("error.type", "client_closed_request" if is_gone else type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _asked(body: ChatRequest | CompletionRequest, operation: str) -> dict[str, Any]:
    law = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "specdec",
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.frequency_penalty": body.frequency_penalty,
        "gen_ai.request.presence_penalty": body.presence_penalty,
        "gen_ai.request.stream": body.stream,
    }
    wishes = {
        "gen_ai.request.top_k": body.top_k if body.top_k > 0 else None,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.choice.count": body.n if body.n > 1 else None,
        "gen_ai.request.max_tokens": body.limit,
    }
    return law | {name: value for name, value in wishes.items() if value is not None}


def _used(stats: Sequence[RequestStats]) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": sum(s.num_prompt_tokens for s in stats),
        "gen_ai.usage.cache_read.input_tokens": sum(s.num_cached_prompt_tokens for s in stats),
        "gen_ai.usage.output_tokens": sum(s.num_output_tokens for s in stats),
        "specdec.steps": sum(s.num_steps for s in stats),
        "specdec.draft_tokens": sum(s.num_drafted for s in stats),
        "specdec.accepted_tokens": sum(s.num_accepted for s in stats),
    }


def otlp_tracer(endpoint: str) -> OtelTracer:
    """Spans to an OTLP collector over HTTP, in batches, from a thread of its own.

    Args:
        endpoint: base URL, ``http://host:4318``; spans go to its ``/v1/traces``.

    Raises:
        ConfigError: the endpoint is no http(s) URL.
        UnsupportedError: the extra ``otel`` is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-endpoint must be an http:// or https:// URL, got {endpoint!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnsupportedError(f"spans need the extra `otel` (pip install 'specdec-toolkit[otel]'): {error}") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "specdec", "service.version": __version__}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracer(provider)
