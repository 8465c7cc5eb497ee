"""``specdec sidecar``: a faster endpoint in front of one that somebody else runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from specdec.commands import printing
from specdec.errors import ConfigError, UnsupportedError
from specdec.server.listening import is_this_machine, listen

__all__ = ["sidecar"]


def sidecar(
    upstream: Annotated[str, typer.Option("--upstream", "-u", help="Address of the endpoint, e.g. http://gpu:8000.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Be reachable from other machines; the upstream checks the keys.")
    ] = False,
    connect_timeout: Annotated[float, typer.Option("--connect-timeout", help="Seconds.")] = 2.0,
    first_byte_timeout: Annotated[float, typer.Option("--first-byte-timeout", help="Seconds.")] = 300.0,
    idle_timeout: Annotated[float, typer.Option("--idle-timeout", help="Seconds between two pieces.")] = 120.0,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds that a request may take.")] = 600.0,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Before the first byte only.")] = 1,
    max_in_flight: Annotated[int, typer.Option("--max-in-flight", min=1, help="More requests get status 429.")] = 256,
    max_body_mb: Annotated[float, typer.Option("--max-body-mb", min=0.001, help="Largest request.")] = 32.0,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds for live requests at shutdown.")] = 30.0,
) -> None:
    """Relay an OpenAI-compatible endpoint byte for byte, learn from what passes, and speed up what it may.

    specdec sidecar --upstream http://127.0.0.1:8000
    """
    options, app, launch = _modules()
    if not (is_this_machine(host) or allow_anyone):
        raise ConfigError(f"--host {host} can be reached from other machines: give --allow-anyone if that is meant")
    relay = options.RelayOptions(
        upstream,
        timeouts=options.Timeouts(connect_timeout, first_byte_timeout, idle_timeout, deadline),
        max_body_bytes=round(max_body_mb * 2**20),
        max_in_flight=max_in_flight,
        retries=retries,
    )
    with listen(host, port) as bound:
        made = app.Sidecar(relay)
        address, place = bound.getsockname()[:2]
        printing.note(f"relaying http://{address}:{place} to {made.upstream.base}")
        launch.run(made, bound, drain_s=drain)


def _modules() -> tuple[Any, Any, Any]:
    try:
        from specdec.server.sidecar import app, launch, options
    except ImportError as error:
        raise UnsupportedError(
            f"the sidecar needs the extra `server` (pip install 'specdec-toolkit[server]'): {error}"
        ) from error
    return options, app, launch
