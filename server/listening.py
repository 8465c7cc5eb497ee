"""Where a server listens, and whether other machines can reach it."""

from __future__ import annotations

import errno
import ipaddress
import socket

from specdec.errors import ConfigError

__all__ = ["is_this_machine", "listen"]


def is_this_machine(host: str) -> bool:
    """True if nobody but programs of this machine can connect to that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is said before a model is loaded.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        why = "another program listens there" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {why}") from error
    return bound
