"""From a sidecar to a running server."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable

from aiohttp import web

from specdec.server.sidecar.app import Sidecar, create_app

__all__ = ["run", "serving"]


async def serving(sidecar: Sidecar, bound: socket.socket, stop: asyncio.Event, *, drain_s: float = 30.0) -> None:
    """Serve on a bound socket until ``stop`` is set; then live requests get ``drain_s`` seconds.

    A client that goes away cancels its handler, and with it what runs upstream.
    """
    runner = web.AppRunner(
        create_app(sidecar),
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        shutdown_timeout=drain_s,
        keepalive_timeout=75.0,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, bound).start()
        await stop.wait()
    finally:
        await runner.cleanup()


def run(sidecar: Sidecar, bound: socket.socket, *, drain_s: float = 30.0) -> None:
    """Serve until SIGINT or SIGTERM."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await serving(sidecar, bound, stop, drain_s=drain_s)

    # A thread that learns holds the interpreter for this long at most before the relay gets it: 5 ms would be felt.
    sys.setswitchinterval(0.0005)
    gc.freeze()  # what was imported lives on anyway: no collection needs to walk it
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The quicker event loop, where there is one for the platform."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
