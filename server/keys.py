"""API keys: who may ask, as which tenant. Files hold hashes only.

A key is 32 random bytes, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import ConfigError, LoadError

__all__ = ["Keyring", "add_key", "bearer_tenant", "hash_key"]

_PREFIX = "sk-specdec-"
_SCHEME = "sha256:"


def hash_key(key: str) -> str:
    """The form in which a key is kept: ``sha256:`` and 64 hexadecimal digits."""
    return _SCHEME + hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Keyring:
    """Names and hashes of the keys that are let in; an empty one lets everybody in.

    Args:
        hashes: tenant -> hash of its key.
    """

    hashes: tuple[tuple[str, str], ...] = ()

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return not self.hashes

    def tenant_of(self, key: str) -> str | None:
        """Whose key this is, or None. Takes the same time whichever key matches, or none."""
        hashed, found = hash_key(key), None
        for tenant, known in self.hashes:
            if hmac.compare_digest(hashed, known):
                found = tenant
        return found

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """The keys of a file: one ``tenant sha256:...`` per line, ``#`` for comments.

        Raises:
            LoadError: the file cannot be read.
            ConfigError: a line has another form, a tenant is named twice, or there is no key at all.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"cannot read the key file {path}: {error}") from error
        pairs = []
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not words[1].startswith(_SCHEME) or len(words[1]) != len(_SCHEME) + 64:
                raise ConfigError(
                    f"{path}:{number}: a line must be a tenant and its key's sha256:HEX, see `specdec keys`"
                )
            pairs.append((words[0], words[1]))
        names = [name for name, _ in pairs]
        if not pairs or len(set(names)) < len(names):
            raise ConfigError(f"{path} must hold at least one key and every tenant once, got {names}")
        return cls(tuple(pairs))


def bearer_tenant(keys: Keyring, headers: Mapping[str, str]) -> str | None:
    """Whose key stands in ``Authorization: Bearer KEY``; None if none of these does."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return keys.tenant_of(key.strip()) if scheme.lower() == "bearer" else None


def add_key(path: Path, tenant: str) -> str:
    """Make a key for a tenant, append its hash to a file that only its owner can read, and return the key.

    Raises:
        ConfigError: the tenant's name cannot stand in the file, or has a key already.
        LoadError: the file cannot be written.
    """
    if not tenant or any(char.isspace() or char == "#" for char in tenant):
        raise ConfigError(f"a tenant's name must be one word without #, got {tenant!r}")
    if path.exists() and any(name == tenant for name, _ in Keyring.load(path).hashes):
        raise ConfigError(f"tenant {tenant!r} has a key in {path} already: delete its line first")
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(f"{tenant} {hash_key(key)}\n")
    except OSError as error:
        raise LoadError(f"cannot write the key file {path}: {error}") from error
    return key
