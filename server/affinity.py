"""A name for how a request begins, so that a load balancer can send what begins alike to the same replica."""

from __future__ import annotations

import hashlib
import json

from specdec.server.keys import Keyring
from specdec.server.wire import ChatRequest, CompletionRequest

__all__ = ["HEADER", "affinity_of"]

HEADER = "X-Specdec-Affinity"
_BEGINNING = 512  # characters or token ids of a completion's prompt; what comes later does not count


def affinity_of(body: ChatRequest | CompletionRequest, tenant: str, keys: Keyring) -> str:
    """16 hexadecimal digits that all turns of a conversation share, and all replicas with the same keys.

    A conversation begins with its messages up to the user's first one. The digits are keyed with the key file, so that
    who sees them, in the log of a load balancer say, cannot try out what the text was.
    """
    secret = hashlib.sha256(repr(keys.hashes).encode()).digest()
    beginning = json.dumps([tenant, _beginning(body)], ensure_ascii=False)
    return hashlib.blake2b(beginning.encode(errors="surrogatepass"), key=secret, digest_size=8).hexdigest()


def _beginning(body: ChatRequest | CompletionRequest) -> object:
    if isinstance(body, ChatRequest):
        roles = [message.role for message in body.messages]
        end = roles.index("user") + 1 if "user" in roles else len(roles)
        return [message.for_template() for message in body.messages[:end]]
    prompt = body.prompt
    is_many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    first = prompt[0] if is_many else prompt
    return first[:_BEGINNING] if isinstance(first, (str, list)) else first
