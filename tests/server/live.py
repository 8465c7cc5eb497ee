"""A real server on a real socket for tests: the tiny Llama behind uvicorn in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import httpx
import uvicorn

from specdec.server.app import create_app
from specdec.server.keys import Keyring
from specdec.server.launch import ServerOptions, build_service, listen
from specdec.server.service import Service, ServiceOptions
from tests.tiny_models import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EOS = 256
ENGINE = {"max_length": 200, "kv_tokens": 4096, "prefix_cache": True}


@dataclass(frozen=True)
class Live:
    service: Service
    url: str

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=300)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=300)

    def wait_idle(self, seconds: float = 120) -> None:
        end = monotonic() + seconds
        while self.service.worker.num_in_flight and monotonic() < end:
            sleep(0.01)
        assert self.service.worker.num_in_flight == 0


def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def service(*, keys: Keyring | None = None, **options: Any) -> Service:
    given = {"name": "tiny", "drafters": ("ngram", "suffix", "none"), "engine": ENGINE}
    return build_service(tiny_llama(), tokenizer(), (EOS,), ServerOptions(**{**given, **options}), keys)


@contextmanager
def running(made: Service) -> Iterator[Live]:
    """Serve until the block ends; then drain."""
    bound = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(made), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        end = monotonic() + 60
        while not server.started and monotonic() < end:
            sleep(0.01)
        yield Live(made, f"http://127.0.0.1:{bound.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()


__all__ = ["EOS", "Live", "ServiceOptions", "running", "service", "tokenizer"]
