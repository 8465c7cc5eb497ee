"""What happens when clients vanish, steps fail and servers stop: nothing stays behind, nobody else notices."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.errors import ConfigError, LoadError
from specdec.server.keys import Keyring
from tests.server.live import Live, running, service, tokenizer
from tests.tiny_models import save_tiny_llama, tiny_llama

LONG = {"prompt": "abcabc", "max_tokens": 190, "ignore_eos": True, "temperature": 0}


class Address:
    """A server somewhere, for requests only."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=300)


def raw_request(live: Live | Address, body: dict[str, Any]) -> socket.socket:
    """Send a request on a bare socket, which the test may cut off at any moment."""
    host, port = live.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    line.sendall(head.encode() + b"\r\n\r\n" + data)
    return line


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_not_served_to_the_end(live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool):
    """The model waits until all have come, and again until all have gone: how fast the machine is changes nothing."""
    worker = live.service.worker
    before, may_step, cancelled = worker.totals.num_emitted_tokens, threading.Event(), []
    forward, cancel = worker._engine.target.forward, worker.cancel

    def patient(chunks: Any) -> Any:
        assert may_step.wait(60)
        return forward(chunks)

    def counted(request_id: str) -> None:
        cancelled.append(request_id)
        cancel(request_id)

    monkeypatch.setattr(worker._engine.target, "forward", patient)
    monkeypatch.setattr(worker, "cancel", counted)
    lines = [raw_request(live, LONG | {"stream": stream, "n": 8}) for _ in range(8)]
    until(lambda: worker.num_in_flight == 64)
    for line in lines:
        line.close()
    until(lambda: len(set(cancelled)) == 64)
    may_step.set()
    live.wait_idle()
    assert worker.totals.num_emitted_tokens - before < 20 * 64
    assert live.post("/v1/completions", LONG).status_code == 200


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = monotonic() + seconds
    while not happened():
        assert monotonic() < end
        sleep(0.002)


def read_slowly(line: socket.socket) -> bytes:
    """A whole stream in small pieces with pauses between them."""
    got = b""
    with line:
        while not got.endswith(b"\r\n0\r\n\r\n"):
            piece = line.recv(400)
            assert piece, got[-200:]
            got += piece
            sleep(0.001)
    return got


def hammer(live: Live | Address, count: int) -> None:
    """Requests of every kind, many of which are cut off, malformed or far too large."""
    dice = random.Random(count)
    kinds = [dice.choice(["whole", "stream", "cut", "garbage", "huge", "refused", "slow"]) for _ in range(count)]
    expected = live.post("/v1/completions", LONG).json()["choices"][0]["text"]

    def one(kind: str, number: int) -> None:
        if kind == "cut":
            line = raw_request(live, LONG | {"stream": bool(number % 2), "n": 1 + number % 3})
            sleep(number % 7 / 200)
            line.close()
        elif kind == "slow":
            assert read_slowly(raw_request(live, LONG | {"stream": True})).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        elif kind == "garbage":
            answer = httpx.post(
                live.url + "/v1/chat/completions", content=b'{"messages": [' * (number % 5), timeout=300
            )
            assert answer.status_code == 400
        elif kind == "huge":
            assert live.post("/v1/completions", {"prompt": "x" * 50_000}).status_code == 400
        elif kind == "refused":
            assert live.post("/v1/completions", LONG | {"max_tokens": 0}).status_code == 400
        else:
            answer = live.post("/v1/completions", LONG | {"stream": kind == "stream"})
            if answer.status_code == 429:
                return
            assert answer.status_code == 200
            got = answer.text.split("\n\n")[:-2] if kind == "stream" else [answer.text]
            choices = [json.loads(piece.removeprefix("data: "))["choices"][0] for piece in got]
            assert "".join(choice["text"] for choice in choices) == expected

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, kinds, range(count)))


def test_hostile_traffic_leaves_nothing_behind(live: Live):
    hammer(live, 120)
    live.wait_idle()
    worker, mailboxes = live.service.worker, live.service.mailboxes
    assert (worker.num_in_flight, worker.load, worker.kv_usage, worker.state) == (0, (0, 0), 0.0, "running")
    assert not mailboxes._boxes


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_served():
    made = service()
    with running(made) as live:
        engine = made.worker._engine
        forward, left = engine.target.forward, [1]

        def broken(chunks: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise RuntimeError("out of memory")
            return forward(chunks)

        engine.target.forward = broken
        answer = live.post("/v1/completions", LONG)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the engine failed: RuntimeError"
        assert live.post("/v1/completions", LONG).status_code == 200
        left[0] = 10**6
        for _ in range(5):
            assert live.post("/v1/completions", LONG).status_code == 500
        end = monotonic() + 60
        while live.get("/health").status_code == 200 and monotonic() < end:
            sleep(0.01)
        assert live.get("/health").json() == {"status": "failed"}
        refused = live.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def start_server(model_dir: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "specdec", "serve", str(model_dir), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving "):
            url = line.split(" on ")[1].split("/v1")[0]
            break
    else:
        pytest.fail(f"the server did not start: {process.wait()}")
    end = monotonic() + 200
    while monotonic() < end:
        try:
            if httpx.get(url + "/ready").status_code == 200:
                return process, url
        except httpx.TransportError:
            sleep(0.05)
    pytest.fail("the server was not ready in time")


def test_a_server_that_is_told_to_stop_finishes_what_it_began(model_dir: Path):
    process, url = start_server(model_dir, "--drafter", "suffix", "--max-length", "256", "--drain", "200")
    try:
        body = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "temperature": 0, "stream": True, "n": 4}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=300) as answer:
            lines = answer.iter_lines()
            received = [next(lines)]
            process.send_signal(signal.SIGTERM)
            received += list(lines)
        pieces = [json.loads(line[6:]) for line in received if line.startswith("data: {")]
        ends = [choice["finish_reason"] for piece in pieces for choice in piece["choices"] if choice["finish_reason"]]
        assert ends == ["length"] * 4
        assert received[-2:] == ["data: [DONE]", ""]
        assert process.wait(timeout=200) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.slow
def test_ten_thousand_hostile_requests_leave_the_servers_memory_flat(model_dir: Path):
    """In a process of its own: what the clients' libraries hold is not the server's."""
    process, url = start_server(model_dir, "--max-length", "200", "--kv-tokens", "4096", "--drafter", "ngram")
    try:
        server, address = psutil.Process(process.pid), Address(url)
        hammer(address, 2000)  # pools, caches and allocators fill up
        before = server.memory_info().rss
        for _ in range(8):
            hammer(address, 1000)
        grown = server.memory_info().rss - before
        metrics = httpx.get(url + "/metrics", timeout=300).text
        assert re.search(r"num_requests_running\{[^}]*\} 0\.0", metrics)
        assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MiB"
    finally:
        process.terminate()
        assert process.wait(timeout=300) == 0
        if process.stderr is not None:
            process.stderr.close()


def failure(*words: str) -> BaseException | None:
    return CliRunner().invoke(app, list(words)).exception


def test_what_keeps_a_server_from_starting_is_said_in_one_line(model_dir: Path, tmp_path: Path):
    assert "there is no directory" in str(failure("serve", "./nowhere", "--port", "0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = failure("serve", str(model_dir), "--port", port)
        assert isinstance(error, ConfigError)
        assert str(error) == f"cannot listen on 127.0.0.1:{port}: another program listens there"
    assert "magic" in str(failure("serve", str(model_dir), "--port", "0", "--drafter", "magic"))
    assert "GiB are free" in str(failure("serve", str(model_dir), "--port", "0", "--kv-tokens", str(10**10)))
    wrong = save_tiny_llama(tmp_path / "no-head")
    assert "cannot be used: fc.weight missing" in str(
        failure("serve", str(model_dir), "--port", "0", "--drafter", f"eagle:{wrong}")
    )
    error = failure("serve", str(model_dir), "--host", "0.0.0.0", "--port", "0")
    assert "--key-file, or --allow-anyone" in str(error)
    assert isinstance(failure("serve", str(model_dir), "--key-file", str(tmp_path / "none")), LoadError)


def test_keys_are_made_once_per_tenant(tmp_path: Path):
    path = tmp_path / "keys"
    done = CliRunner().invoke(app, ["keys", str(path), "team-a"])
    assert Keyring.load(path).tenant_of(done.stdout.strip()) == "team-a"
    assert Keyring.load(path).tenant_of("sk-specdec-guess") is None
    assert "has a key" in str(failure("keys", str(path), "team-a"))
    assert "one word" in str(failure("keys", str(path), "team b"))
    path.write_text("team-a plain-text-key\n")
    assert "must be a tenant and its key's sha256:HEX" in str(failure("serve", "x", "--key-file", str(path)))


def test_a_model_without_chat_template_still_completes(tmp_path: Path):
    save_tiny_llama(tmp_path)
    process, url = start_server(tmp_path, "--max-length", "128")
    try:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(url + "/v1/chat/completions", json=chat, timeout=300)
        assert answer.status_code == 400
        assert "has no chat template: use /v1/completions" in answer.json()["error"]["message"]
        assert (
            httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=300).status_code == 200
        )
    finally:
        process.terminate()
        process.wait(timeout=30)
        if process.stderr is not None:
            process.stderr.close()
