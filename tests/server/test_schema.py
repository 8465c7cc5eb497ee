"""Generated requests, valid and not, against the OpenAPI document: never a server error, always the stated form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis

from tests.server.live import Live, running, service

ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health"),
    ("GET", "/ready"), ("GET", "/version"), ("GET", "/metrics"),
]  # fmt: skip
ADMIN = [
    ("GET", "/admin/drafters"), ("POST", "/admin/drafters/rollback"), ("POST", "/admin/drafters/{version}/promote"),
    ("POST", "/admin/drafters/{version}/pin"), ("GET", "/admin/capture"), ("POST", "/admin/capture/forget"),
]  # fmt: skip


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(service(engine={"max_length": 48, "kv_tokens": 2048})) as made:
        yield made


@pytest.fixture(scope="module")
def schema(live: Live) -> Any:
    return schemathesis.openapi.from_url(live.url + "/openapi.json")


def test_the_document_names_every_route(schema: Any) -> None:
    named = {(found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()}
    assert named == {*ROUTES, *ADMIN}


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_without_an_admin_key_nobody_gets_in(schema: Any, method: str, path: str) -> None:
    @hypothesis.settings(
        max_examples=15, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=schema[path][method].as_strategy())
    def check(case: Any) -> None:
        assert case.call().status_code in (400, 403)

    check()


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), ROUTES[:2])
def test_no_request_makes_the_server_fail(live: Live, schema: Any, method: str, path: str, mode: str) -> None:
    statuses = set()

    @hypothesis.settings(
        max_examples=60, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case: Any) -> None:
        if mode == "positive" and isinstance(case.body, dict):
            case.body = {**case.body, "model": None}  # a random name is no model of ours
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (answer.text, case.body)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert (200 if mode == "positive" else 400) in statuses
    live.wait_idle()
    assert live.get("/health").json() == {"status": "running"}
    assert live.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
