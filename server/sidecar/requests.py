"""What may be done with a request: whose it is, what it allows, and whether its law is one that continuations keep.

A continuation moves output tokens into the prompt. So the law of the next token must depend on the tokens alone, not on
which of them are output: penalties that count output, grammars, and whatever these lists do not know pass through.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["GENERATION", "Asked", "Continuable", "Privacy", "continuable", "privacy_of", "read_request", "tenant_of"]

GENERATION: Mapping[str, Literal["chat", "text"]] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
_ANYTHING = frozenset(
    {"model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens"}
    | {"user", "logit_bias", "stop_token_ids", "ignore_eos", "metadata", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "chat_template_kwargs", "stream_options", "seed", "stream", "skip_special_tokens"}
)
# These values change nothing, or nothing that depends on what is output.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "echo": (False,),
    "store": (False,),
    "logprobs": (False,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none",),
    "suffix": ("",),
    "return_token_ids": (False,),
    "include_stop_str_in_output": (False,),
}
_SAMPLING = ("model", "temperature", "top_p", "top_k", "min_p", "user", "logit_bias", "stop_token_ids", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Privacy:
    """What the client's headers forbid.

    Args:
        may_learn: its text may enter its tenant's store.
        may_speculate: it may be anything but a plain relay.
    """

    may_learn: bool = True
    may_speculate: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a generation, as far as the sidecar reads it."""

    kind: Literal["chat", "text"]
    body: Mapping[str, Any]

    @property
    def is_stream(self) -> bool:
        """The answer comes in events."""
        return self.body.get("stream") is True

    @property
    def is_greedy(self) -> bool:
        """Temperature 0, said by the request itself; a missing one is the server's default, which we do not know."""
        return self.body.get("temperature") == 0

    @property
    def limit(self) -> int | None:
        """Most output tokens, if the request says so."""
        value = self.body.get("max_completion_tokens") if self.kind == "chat" else None
        value = self.body.get("max_tokens") if value is None else value
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True, slots=True)
class Continuable:
    """What a continuation of a request is made of.

    Args:
        sampling: fields that go into every continuation as they are.
        limit: output tokens of the whole answer.
        seed: the client's; only for servers whose noise is keyed by position.
        has_usage: the stream ends with token counts.
    """

    sampling: Mapping[str, Any]
    limit: int
    seed: int | None
    has_usage: bool


def read_request(path: str, body: bytes) -> Asked | None:
    """The request, or None if it is no generation in JSON."""
    kind = GENERATION.get(path)
    if kind is None:
        return None
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return Asked(kind, value) if isinstance(value, dict) else None


def continuable(asked: Asked, *, is_keyed: bool, has_whole: bool = False) -> Continuable | str:
    """How to continue the request, or the reason why that would change its law.

    Args:
        asked: the request.
        is_keyed: the upstream's noise is a function of seed and position, so that a seed may be used again.
        has_whole: an answer that is not streamed can be put together from a stream.
    """
    body = asked.body
    if not (asked.is_stream or has_whole):
        return "the answer is not streamed"
    if not asked.is_stream and body.get("stream_options") is not None:
        return "stream_options without a stream"
    for name, value in body.items():
        if name in _ANYTHING or value is None:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None or not any(value == one and not isinstance(value, bool) ^ isinstance(one, bool)
                                      for one in neutral):  # fmt: skip
            return f"{name} = {json.dumps(value)[:60]} is not neutral"
    seed = body.get("seed")
    if seed is not None and not is_keyed and not asked.is_greedy:
        return "a seed cannot be honoured by several requests"
    if asked.limit is None:
        return "the number of new tokens is not bounded by the request"
    prompt = body.get("prompt")
    if asked.kind == "text" and not (
        isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt))
    ):
        return "there is more than one prompt"
    usage = not asked.is_stream or (body.get("stream_options") or {}).get("include_usage") is True
    if set(body.get("stream_options") or {}) - {"include_usage"}:
        return "stream_options asks for more than usage"
    sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    return Continuable(sampling, asked.limit, seed if is_keyed else None, usage)


def privacy_of(headers: Mapping[str, str], asked: Asked) -> Privacy:
    """What the headers ``X-Spec`` and ``X-Spec-Learn`` and the field ``store`` forbid."""
    off = {name: headers.get(name, "").strip().lower() in ("off", "false", "0", "no") for name in _HEADERS}
    may_learn = not (off["X-Spec-Learn"] or off["X-Spec"] or asked.body.get("store") is False)
    return Privacy(may_learn, not off["X-Spec"])


_HEADERS = ("X-Spec", "X-Spec-Learn")


def tenant_of(headers: Mapping[str, str], secret: bytes, *, is_single: bool) -> str | None:
    """Whose request it is: a keyed hash of its credentials, from which these cannot be had back.

    None for requests without credentials, whose text must not meet anybody's, unless there is one tenant only.
    """
    if is_single:
        return "single"
    principal = headers.get("Authorization") or headers.get("X-Api-Key") or headers.get("Api-Key")
    if not principal:
        return None
    return hmac.new(secret, principal.encode(), hashlib.sha256).hexdigest()
