"""Spans: one per request, true to it, without a word of its text, and in a form that a collector takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from specdec.errors import ConfigError
from specdec.server.tracing import OtelTracer, otlp_tracer
from tests.server.live import Live, ServiceOptions, running, service

TRACE = "0af7651916cd43dd8448eb211c80319c"
SECRET = "a secret word "


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def live(exporter: InMemorySpanExporter) -> Iterator[Live]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made = service()
    made.tracer = OtelTracer(provider)
    with running(made) as live:
        yield live


def one_span(live: Live, exporter: InMemorySpanExporter) -> ReadableSpan:
    live.wait_idle()
    end = time.monotonic() + 20
    while not exporter.get_finished_spans() and time.monotonic() < end:  # it ends after the answer has gone out
        time.sleep(0.005)
    (span,) = exporter.get_finished_spans()
    exporter.clear()
    return span


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_span_says_what_was_asked_and_what_it_cost(live: Live, exporter: InMemorySpanExporter, is_stream: bool):
    body = {"prompt": SECRET, "max_tokens": 3, "n": 2, "seed": 5, "stream": is_stream, "stop": ["another secret"]}
    answer = live.post("/v1/completions", body, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    assert answer.status_code == 200
    span = one_span(live, exporter)
    assert (span.name, span.kind, span.status.status_code) == (
        "text_completion tiny", SpanKind.SERVER, StatusCode.UNSET,
    )  # fmt: skip
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    told = dict(span.attributes or {})
    expected = {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "tiny", "gen_ai.request.seed": 5,
        "gen_ai.request.choice.count": 2, "gen_ai.request.max_tokens": 3, "gen_ai.request.stream": is_stream,
        "gen_ai.usage.input_tokens": 2 * len(SECRET), "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 60  # type: ignore[operator]
    assert "secret" not in span.to_json()


def test_a_request_that_ran_out_of_time_is_an_error(
    live: Live, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live.service, "options", ServiceOptions(deadline_s=0.02))
    assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 190, "n": 16}).status_code == 504
    span = one_span(live, exporter)
    assert span.status.status_code == StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "TimeoutError"


def test_spans_reach_a_collector_over_http():
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        with running(service(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/")) as live:
            assert live.post("/v1/completions", {"prompt": SECRET, "max_tokens": 2}).status_code == 200
        collector.shutdown()
    ((path, sent),) = got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(sent).resource_spans
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["text_completion tiny"]
    assert SECRET.encode() not in sent


def test_an_endpoint_must_be_a_url():
    with pytest.raises(ConfigError, match="otlp-endpoint must be .* got 'localhost:4317'"):
        otlp_tracer("localhost:4317")
