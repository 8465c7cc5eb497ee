"""A small OpenAI-compatible server on a real socket, whose answers and misbehaviour tests choose by the prompt."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

__all__ = ["Recorder", "running"]


class Recorder:
    """What the server saw: bodies and headers in order, when each came, and how many were under way at once."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.alive = self.most_alive = 0


def _event(value: object) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def _app(recorder: Recorder, first_s: float, step_s: float) -> Starlette:
    async def pieces(text: str, num_tokens: int, is_chat: bool):
        yield ": hello\n\n"  # a comment, which keeps a connection alive
        recorder.alive += 1
        recorder.most_alive = max(recorder.most_alive, recorder.alive)
        try:
            for number in range(num_tokens):
                await asyncio.sleep(first_s if number == 0 else step_s)
                if "cut" in text and number == 2:
                    return
                if "late error" in text and number == 2:
                    yield _event({"error": {"message": "no memory"}})
                    return
                if "garbage" in text and number == 2:
                    yield _event("{half")
                    return
                word = f" w{number}" if "loop" not in text else " again"
                yield _event({"choices": [{"delta": {"content": word}} if is_chat else {"text": word}]})
            if "no usage" not in text:
                block = {"num_spec_steps": 3, "num_accepted_draft_tokens": num_tokens // 2, "num_draft_tokens": 9}
                usage = {"prompt_tokens": len(text.split()), "completion_tokens": num_tokens}
                metrics = {"metrics": {"speculative_decoding": block}} if "speculate" in text else {}
                yield _event({"choices": [], "usage": usage, **metrics})
            yield _event("[DONE]")
        finally:
            recorder.alive -= 1

    async def answer(request: Request) -> Response:
        recorder.times.append(time.perf_counter())
        body = await request.json()
        recorder.bodies.append(body)
        recorder.headers.append(dict(request.headers))
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        text = prompt if isinstance(prompt, str) else ""
        if "refuse" in text:
            return JSONResponse({"error": "full"}, status_code=503)
        if "hang" in text:
            while not await request.is_disconnected():
                await asyncio.sleep(0.02)
        return StreamingResponse(pieces(text, body["max_tokens"], is_chat), media_type="text/event-stream")

    routes = [Route(f"/v1/{path}", answer, methods=["POST"]) for path in ("completions", "chat/completions")]
    return Starlette(routes=routes)


@contextmanager
def running(*, first_s: float = 0.02, step_s: float = 0.005) -> Iterator[tuple[str, Recorder]]:
    """The server's address and what it sees; it stops with the block."""
    recorder = Recorder()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(_app(recorder, first_s, step_s), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the test's server does not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", recorder
        finally:
            server.should_exit = True
            thread.join(20)
