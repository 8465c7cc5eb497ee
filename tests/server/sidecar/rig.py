"""A scripted upstream on a raw socket, a sidecar before it and a raw client: every byte on both sides is the test's."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from specdec.server.listening import listen
from specdec.server.sidecar.app import Sidecar, create_app

__all__ = [
    "Asked",
    "Got",
    "Scripted",
    "chunked",
    "exchange",
    "free_port",
    "front",
    "piece",
    "request",
    "sse",
    "until",
    "upstream",
]

Script = Callable[["Asked", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Asked:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Scripted:
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    alive: int = 0  # answers under way
    dropped: int = 0  # answers whose reader went away

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Got:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    is_whole: bool


async def _head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode().rstrip("\r\n").split("\r\n")
    return first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]


def _value(headers: list[tuple[str, str]], name: str) -> str | None:
    return next((value for key, value in headers if key.lower() == name), None)


@asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[Scripted]:
    """Answers every request by the script, which writes raw bytes; it may close or reset the connection."""
    made = Scripted()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first, headers = await _head(reader)
                method, target, _ = first.split(" ")
                body = await reader.readexactly(int(_value(headers, "content-length") or 0))
                asked = Asked(method, target, headers, body)
                made.asked.append(asked)
                made.alive += 1
                work = asyncio.ensure_future(script(asked, writer))
                gone = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                made.alive -= 1
                if not work.done():
                    made.dropped += 1
                    work.cancel()
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
                if work.cancelling():
                    return
                work.result()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


@asynccontextmanager
async def front(sidecar: Sidecar) -> AsyncIterator[str]:
    """A sidecar on a socket."""
    bound = listen("127.0.0.1", 0)
    runner = web.AppRunner(
        create_app(sidecar), handler_cancellation=True, access_log=None, auto_decompress=False, shutdown_timeout=1
    )
    await runner.setup()
    await web.SockSite(runner, bound).start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        await runner.cleanup()
        bound.close()


def request(
    body: Any = None, *, target: str = "/v1/completions", method: str = "POST", headers: tuple[str, ...] = ()
) -> bytes:
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.1", "Host: client", *headers, f"Content-Length: {len(raw)}", "", ""]
    return "\r\n".join(lines).encode() + raw


async def exchange(url: str, raw: bytes, *, stop_after: int | None = None) -> Got:
    """Send raw bytes and read one answer; ``stop_after`` bytes of body the client hangs up."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body, is_whole = b"", True
    try:
        writer.write(raw)
        first, headers = await _head(reader)
        status = int(first.split(" ")[1])
        try:
            if raw.startswith(b"HEAD") or status in (204, 304):
                pass
            elif _value(headers, "transfer-encoding") == "chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    body += (await reader.readexactly(size + 2))[:-2]
                    if stop_after is not None and len(body) >= stop_after:
                        return Got(status, headers, body, is_whole=False)
                await reader.readuntil(b"\r\n")
            else:
                body = await reader.readexactly(int(_value(headers, "content-length") or 0))
        except (asyncio.IncompleteReadError, ConnectionError):
            is_whole = False
        return Got(status, headers, body, is_whole)
    finally:
        writer.close()


def chunked(status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Transfer-Encoding: chunked", "", ""]).encode()


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"


async def until(happened: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something that takes as long as the machine needs.

    Raises:
        TimeoutError: it never happened.
    """
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.002)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
