"""Whose text may be learned from, under which names it is kept, and what is never kept.

Nothing is captured unless its tenant opted in, and a request can opt out of it by a header. Both are asked before a
record is put together, so that refused text is never queued. States of a model are as telling as its text and are
treated like it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import ConfigError, LoadError
from specdec.types import IntArray

__all__ = ["OPT_OUT_HEADER", "Consent", "KeyedHash", "Redactor", "write_private"]

OPT_OUT_HEADER = "x-specdec-no-capture"
_KEY_BYTES = 32
_HASH_DIGITS = 32


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, and make it last before returning."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as stream:
        os.fchmod(stream.fileno(), 0o600)  # a file that was there keeps no wider rights
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True, slots=True)
class Consent:
    """Which tenants opted in; by default none.

    Args:
        tenants: names as the server knows them; ``anonymous`` where it asks for no keys. A tenant's users, written
            ``tenant/user``, are covered by the tenant.
    """

    tenants: frozenset[str] = frozenset()

    def allows(self, tenant: str) -> bool:
        """True if the text of this tenant may be kept."""
        return tenant in self.tenants or tenant.partition("/")[0] in self.tenants

    @staticmethod
    def opts_out(headers: Mapping[str, str]) -> bool:
        """True if a request's headers forbid its capture; whatever the header says but 0 or false does."""
        said = headers.get(OPT_OUT_HEADER)
        return said is not None and said.strip().lower() not in ("0", "false")


class KeyedHash:
    """Names that only the owner of a key can tell apart from random ones (HMAC-SHA256, 128 bits).

    Args:
        key: 32 bytes; a plain hash of a short name or a short prompt could be guessed.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"a hash key must have {_KEY_BYTES} bytes, got {len(key)}")
        self._key = key

    @classmethod
    def of_file(cls, path: Path) -> KeyedHash:
        """The key of a file, which is made with mode 0600 if it is not there.

        Raises:
            LoadError: the file cannot be read or made.
            ConfigError: it does not hold 32 bytes.
        """
        try:
            if not path.exists():
                draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
                write_private(draft, secrets.token_bytes(_KEY_BYTES))
                try:
                    os.link(draft, path)  # of several that begin at once, one wins
                except FileExistsError:
                    pass
                finally:
                    draft.unlink()
            return cls(path.read_bytes())
        except OSError as error:
            raise LoadError(f"cannot read the hash key {path}: {error}") from error

    def text(self, name: str) -> str:
        """32 hexadecimal digits for a name."""
        return hmac.new(self._key, b"t" + name.encode(), hashlib.sha256).hexdigest()[:_HASH_DIGITS]

    def ids(self, token_ids: IntArray) -> str:
        """32 hexadecimal digits for token ids."""
        return hmac.new(self._key, b"i" + token_ids.tobytes(), hashlib.sha256).hexdigest()[:_HASH_DIGITS]


_EMAIL = r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"
_PHONE = r"(?<![\w.])(?:\+|00)\d{1,3}[ ./-]?\(?\d{1,5}\)?(?:[ ./-]?\d{2,5}){2,4}(?!\w)|\(\d{3}\) ?\d{3}-\d{4}(?!\d)"
_KEYS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bxox[abpr]-[A-Za-z0-9-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
)
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")


class Redactor:
    """Finds text that must not be kept: a record with a hit is dropped whole, since later states would encode it too.

    Looks for e-mail addresses, phone numbers, payment cards (Luhn), private keys and access tokens, and for patterns
    of the user's own.

    Args:
        patterns: more regular expressions.

    Raises:
        ConfigError: a pattern is no regular expression.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._rules: dict[str, re.Pattern[str]] = {}
        builtin = {"email": _EMAIL, "phone": _PHONE, "key": _KEYS}
        for name, pattern in (*builtin.items(), *((f"custom {i}", text) for i, text in enumerate(patterns))):
            try:
                self._rules[name] = re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"redaction pattern must be a regular expression, got {pattern!r}: {error}") from None

    def hit(self, text: str) -> str | None:
        """Name of the first rule that the text breaks, or None."""
        for name, rule in self._rules.items():
            if rule.search(text):
                return name
        return "card" if any(_is_card(match.group()) for match in _CARD.finditer(text)) else None


def _is_card(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 1
