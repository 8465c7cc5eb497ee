"""The server that the tests of one module share, and the official client for it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.live import Live, running, service


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(service()) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
