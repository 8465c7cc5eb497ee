"""``specdec sidecar``: a faster endpoint in front of one that somebody else runs."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, TypeAlias

import typer

from specdec.commands import printing
from specdec.errors import ConfigError, UnsupportedError
from specdec.server.listening import is_this_machine, listen

__all__ = ["sidecar"]

ModeName: TypeAlias = Literal["off", "observe", "feed", "race", "grid"]
FeedName: TypeAlias = Literal["prediction", "vllm-plugin"]
KindName: TypeAlias = Literal["vllm", "sglang", "llamacpp", "specdec", "openai"]


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
    mode: Annotated[
        ModeName,
        typer.Option("--mode", help="off: relay only; observe: learn and estimate; feed, race, grid: accelerate."),
    ] = "observe",
    branches: Annotated[int, typer.Option("--branches", min=2, max=64, help="Of a grid.")] = 4,
    max_draft: Annotated[int, typer.Option("--max-draft", min=8, max=256, help="Draft tokens ahead.")] = 128,
    min_gain_ms: Annotated[float, typer.Option("--min-gain-ms", min=0, help="Expected saving of a launch.")] = 40.0,
    extra_tokens: Annotated[
        float, typer.Option("--extra-tokens", min=0, help="Upstream tokens spent per token that clients receive.")
    ] = 0.2,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="The upstream's, a directory; for sampled requests and learning.")
    ] = None,
    single_tenant: Annotated[
        bool, typer.Option("--single-tenant", help="All clients share what is learned. Default: one store per key.")
    ] = False,
    cache_salt: Annotated[
        bool, typer.Option("--cache-salt", help="Send the tenant's hash as cache_salt (vLLM, SGLang).")
    ] = False,
    exact_cache: Annotated[
        float, typer.Option("--exact-cache", min=0, help="Seconds that a greedy answer is given again; 0: never.")
    ] = 0.0,
    feed: Annotated[
        FeedName | None, typer.Option("--feed", help="How the upstream takes drafts, if it is not specdec serve.")
    ] = None,
    audit: Annotated[
        float, typer.Option("--audit", min=0, max=1, help="Share of greedy requests that are checked afterwards.")
    ] = 0.0,
    kind: Annotated[
        KindName | None, typer.Option("--kind", help="Of the upstream, if it does not say so itself.")
    ] = None,
    probe_key_env: Annotated[
        str | None, typer.Option("--probe-key-env", help="Environment variable with a key for the sidecar's own probe.")
    ] = None,
) -> None:
    """Relay an OpenAI-compatible endpoint byte for byte, learn from what passes, and speed up what it may.

    specdec sidecar --upstream http://127.0.0.1:8000
    """
    options, app, launch, service = _modules()
    if not (is_this_machine(host) or allow_anyone):
        raise ConfigError(f"--host {host} can be reached from other machines: give --allow-anyone if that is meant")
    relay = options.RelayOptions(
        upstream,
        timeouts=options.Timeouts(connect_timeout, first_byte_timeout, idle_timeout, deadline),
        max_body_bytes=round(max_body_mb * 2**20),
        max_in_flight=max_in_flight,
        retries=retries,
    )
    plan = service.PlanOptions(max_branches=branches, max_draft=max_draft, min_gain_s=min_gain_ms / 1e3)
    speed = service.SpeedOptions(
        mode=mode,
        plan=plan,
        budget=service.BudgetOptions(ratio=extra_tokens),
        is_single_tenant=single_tenant,
        cache_ttl_s=exact_cache,
        feed=feed,
        audit_share=audit,
        kind=kind,
        probe_key=_key_of(probe_key_env),
        has_cache_salt=cache_salt,
    )
    with listen(host, port) as bound:
        tokens = service.load_tokens(tokenizer)
        made = app.Sidecar(relay, speed, tokens=tokens)
        address, place = bound.getsockname()[:2]
        printing.note(f"relaying http://{address}:{place} to {made.upstream.base}")
        launch.run(made, bound, drain_s=drain)


def _key_of(variable: str | None) -> str | None:
    """The value of an environment variable; a key on the command line would be for all to see."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"--probe-key-env must name an environment variable that is set, got {variable!r}")
    return key


def _modules() -> tuple[Any, Any, Any, Any]:
    try:
        from specdec.server.sidecar import app, launch, options, service
    except ImportError as error:
        raise UnsupportedError(
            f"the sidecar needs the extra `server` (pip install 'specdec-toolkit[server]'): {error}"
        ) from error
    return options, app, launch, service
