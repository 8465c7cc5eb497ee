"""From a place, as it is written on a command line, to what carries traces there."""

from __future__ import annotations

from pathlib import Path

from specdec.online_training.spool import Spool, SpoolLimits
from specdec.online_training.transport import TraceTransport

__all__ = ["open_transport"]


def open_transport(place: str, limits: SpoolLimits | None = None) -> TraceTransport:
    """A spool in a directory, or ``redis://HOST[:PORT]/STREAM``.

    Raises:
        ConfigError: the place cannot be understood.
        LoadError: it cannot be reached or made.
    """
    if place.startswith(("redis://", "rediss://")):
        from specdec.online_training.redis_transport import RedisTransport

        return RedisTransport.of_url(place, limits)
    return Spool(Path(place).expanduser(), limits)
