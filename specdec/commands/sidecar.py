"""``specdec sidecar``: a faster endpoint in front of one that somebody else runs."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, TypeAlias

import typer

from specdec.commands import printing
from specdec.errors import ConfigError, UnsupportedError
from specdec.server.listening import is_this_machine, listen

__all__ = ["sidecar"]

ModeName: TypeAlias = Literal["off", "observe", "feed", "race", "grid", "rounds"]
FeedName: TypeAlias = Literal["prediction", "vllm-plugin", "sglang-corpus"]
KindName: TypeAlias = Literal["vllm", "sglang", "llamacpp", "specdec", "openai"]


_Upstream: TypeAlias = Annotated[
    str, typer.Option("--upstream", "-u", help="Address of the endpoint, e.g. http://gpu:8000.")
]
_Host: TypeAlias = Annotated[str, typer.Option("--host", help="Address to listen on.")]
_Port: TypeAlias = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
_AllowAnyone: TypeAlias = Annotated[
    bool, typer.Option("--allow-anyone", help="Be reachable from other machines; the upstream checks the keys.")
]
_ConnectTimeout: TypeAlias = Annotated[float, typer.Option("--connect-timeout", help="Seconds.")]
_FirstByteTimeout: TypeAlias = Annotated[float, typer.Option("--first-byte-timeout", help="Seconds.")]
_IdleTimeout: TypeAlias = Annotated[float, typer.Option("--idle-timeout", help="Seconds between two pieces.")]
_Deadline: TypeAlias = Annotated[float, typer.Option("--deadline", help="Seconds that a request may take.")]
_Retries: TypeAlias = Annotated[int, typer.Option("--retries", min=0, help="Before the first byte only.")]
_MaxInFlight: TypeAlias = Annotated[int, typer.Option("--max-in-flight", min=1, help="More requests get status 429.")]
_MaxBodyMb: TypeAlias = Annotated[float, typer.Option("--max-body-mb", min=0.001, help="Largest request.")]
_Drain: TypeAlias = Annotated[float, typer.Option("--drain", min=0, help="Seconds for live requests at shutdown.")]
_Mode: TypeAlias = Annotated[
    ModeName,
    typer.Option("--mode", help="off: relay only; observe: learn and estimate; feed, race, grid, rounds: accelerate."),
]
_Branches: TypeAlias = Annotated[int, typer.Option("--branches", min=2, max=64, help="Of a grid.")]
_MaxDraft: TypeAlias = Annotated[int, typer.Option("--max-draft", min=8, max=256, help="Draft tokens ahead.")]
_MinGainMs: TypeAlias = Annotated[float, typer.Option("--min-gain-ms", min=0, help="Expected saving of a launch.")]
_ExtraTokens: TypeAlias = Annotated[
    float, typer.Option("--extra-tokens", min=0, help="Upstream tokens spent per token that clients receive.")
]
_Tokenizer: TypeAlias = Annotated[
    str | None, typer.Option("--tokenizer", help="The upstream's, a directory; for sampled requests and learning.")
]
_SingleTenant: TypeAlias = Annotated[
    bool, typer.Option("--single-tenant", help="All clients share what is learned. Default: one store per key.")
]
_CacheSalt: TypeAlias = Annotated[
    bool, typer.Option("--cache-salt", help="Send the tenant's hash as cache_salt (vLLM, SGLang).")
]
_ExactCache: TypeAlias = Annotated[
    float, typer.Option("--exact-cache", min=0, help="Seconds that a greedy answer is given again; 0: never.")
]
_Feed: TypeAlias = Annotated[
    FeedName | None, typer.Option("--feed", help="How the upstream takes drafts, if it is not specdec serve.")
]
_Audit: TypeAlias = Annotated[
    float, typer.Option("--audit", min=0, max=1, help="Share of greedy requests that are checked afterwards.")
]
_ShapeMs: TypeAlias = Annotated[
    float, typer.Option("--shape-ms", min=0, help="Accelerated streams leave at ticks this far apart; 0: as they come.")
]
_ShapeTokens: TypeAlias = Annotated[
    int | None, typer.Option("--shape-tokens", help="Tokens at each tick of --shape-ms. Default: 1.")
]
_Kind: TypeAlias = Annotated[
    KindName | None, typer.Option("--kind", help="Of the upstream, if it does not say so itself.")
]
_ProbeKeyEnv: TypeAlias = Annotated[
    str | None, typer.Option("--probe-key-env", help="Environment variable with a key for the sidecar's own probe.")
]


def sidecar(
    upstream: _Upstream,
    host: _Host = "127.0.0.1",
    port: _Port = 8080,
    allow_anyone: _AllowAnyone = False,
    connect_timeout: _ConnectTimeout = 2.0,
    first_byte_timeout: _FirstByteTimeout = 300.0,
    idle_timeout: _IdleTimeout = 120.0,
    deadline: _Deadline = 600.0,
    retries: _Retries = 1,
    max_in_flight: _MaxInFlight = 256,
    max_body_mb: _MaxBodyMb = 32.0,
    drain: _Drain = 30.0,
    mode: _Mode = "observe",
    branches: _Branches = 4,
    max_draft: _MaxDraft = 128,
    min_gain_ms: _MinGainMs = 40.0,
    extra_tokens: _ExtraTokens = 0.2,
    tokenizer: _Tokenizer = None,
    single_tenant: _SingleTenant = False,
    cache_salt: _CacheSalt = False,
    exact_cache: _ExactCache = 0.0,
    feed: _Feed = None,
    audit: _Audit = 0.0,
    shape_ms: _ShapeMs = 0.0,
    shape_tokens: _ShapeTokens = None,
    kind: _Kind = None,
    probe_key_env: _ProbeKeyEnv = None,
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
        pace=_pace_of(service, shape_ms, shape_tokens),
    )
    with listen(host, port) as bound:
        tokens = service.load_tokens(tokenizer)
        made = app.Sidecar(relay, speed, tokens=tokens)
        address, place = bound.getsockname()[:2]
        printing.note(f"relaying http://{address}:{place} to {made.upstream.base}")
        launch.run(made, bound, drain_s=drain)


def _pace_of(service: Any, tick_ms: float, num_tokens: int | None) -> Any:
    """The pace of accelerated streams, or none."""
    if tick_ms == 0:
        if num_tokens is not None:
            raise ConfigError(f"--shape-tokens {num_tokens} needs --shape-ms, the time between two releases")
        return None
    return service.PaceOptions(tick_ms / 1e3, 1 if num_tokens is None else num_tokens)


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
