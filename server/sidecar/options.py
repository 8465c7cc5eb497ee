"""What a sidecar can be told about relaying; each rule is checked here, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from specdec.errors import ConfigError

__all__ = ["RelayOptions", "Timeouts", "upstream_base"]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; every wait of the relay has a limit.

    Args:
        connect_s: to open a connection.
        first_byte_s: from sending a request to the head of its answer.
        idle_s: between two pieces of a body.
        total_s: a request from beginning to end.
    """

    connect_s: float = 2.0
    first_byte_s: float = 300.0
    idle_s: float = 120.0
    total_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "first_byte_s", "idle_s", "total_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How requests are carried to the one upstream.

    Args:
        url: scheme, host and optional path, with or without ``/v1``; nothing else is ever connected to.
        timeouts: see ``Timeouts``.
        max_body_bytes: of a request.
        max_in_flight: requests under way; more get status 429.
        retries: further tries of a request of which no byte was answered.
        max_retry_wait_s: an upstream that asks for a longer pause than this gets its refusal relayed.
        failures_to_open: failures in a row that open the circuit breaker.
        cooldown_s: how long it stays open before one request is let through.
    """

    url: str
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_body_bytes: int = 32 * 2**20
    max_in_flight: int = 256
    retries: int = 1
    max_retry_wait_s: float = 2.0
    failures_to_open: int = 5
    cooldown_s: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("max_body_bytes", 1), ("max_in_flight", 1), ("retries", 0), ("failures_to_open", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        upstream_base(self.url)


def upstream_base(url: str) -> str:
    """The part that stands before every path.

    Raises:
        ConfigError: no absolute http or https address, or one with credentials, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"upstream must be an address such as http://127.0.0.1:8000, got {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"upstream must begin with http:// or https:// and name a host, got {url!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"upstream must hold no credentials, query or fragment, got {parts.scheme}://{parts.hostname}"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = f":{port}" if port is not None else ""
    return f"{parts.scheme}://{host}{place}{parts.path.rstrip('/').removesuffix('/v1')}"
