"""What a server's scores of a prompt say about a draft: how much of it greedy decoding would have said itself.

One request with the draft behind the prompt and one new token: a draft token is accepted if it alone scores highest
behind what stands before it. Ties, rows that are missing, empty or absurd, and tokens that the row does not name end
what is accepted: there the server decodes for itself. Greedy requests only: scores are those of temperature 1 without
any filter, so that no other law can be had from them.

Wire formats: vLLM 0.33.0 (``/inference/v1/generate`` and ``/v1/completions`` with ``prompt_logprobs``; the latter is
also that of ``specdec serve``), SGLang 0.5.23 (``/generate`` with ``logprob_start_len``).
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import aiohttp

from specdec.server.sidecar.upstream import Question, Unreachable, Upstream

__all__ = ["Verdict", "VerifyWay", "ask_verdict", "judge", "read_verdict", "verify_request"]

VerifyWay: TypeAlias = Literal["generate", "completions", "sglang"]
Row: TypeAlias = Mapping[int, float]  # token -> log-probability, as far as it is listed
_LEAST = -9998.0  # vLLM writes minus infinity as -9999.0
_LISTED = 2  # with the second best a tie shows, whatever ranks say


@dataclass(frozen=True, slots=True)
class Verdict:
    """What greedy decoding says behind a prompt.

    Args:
        token_ids: in order; the draft's accepted beginning, then the token that follows if it is certain.
        num_accepted: of the draft.
    """

    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0


def judge(rows: Sequence[Row | None], draft: Sequence[int], bonus: int | None) -> Verdict:
    """The rule itself.

    Args:
        rows: one for each draft token: scores at its place.
        draft: token ids.
        bonus: what the server itself said behind the whole draft.
    """
    said: list[int] = []
    for row, token in zip(rows, draft, strict=True):
        best = _best(row, token)
        if best is None:
            return Verdict(tuple(said), len(said))
        said.append(best)
        if best != token:
            return Verdict(tuple(said), len(said) - 1)
    return Verdict((*said, *(() if bonus is None else (bonus,))), len(said))


def _best(row: Row | None, token: int) -> int | None:
    """The token that alone scores highest; None if the row does not say so beyond doubt."""
    if row is None or token not in row or len(row) < _LISTED:
        return None
    if not all(value <= 0 for value in row.values()) or sum(map(math.exp, row.values())) > 1.001:  # also: NaN
        return None
    first, second = sorted(row, key=row.__getitem__, reverse=True)[:2]
    return first if row[first] > max(row[second], _LEAST) else None


def verify_request(
    way: VerifyWay, model: Any, prompt_ids: Sequence[int], draft: Sequence[int], *, salt: str | None, has_start: bool
) -> tuple[str, bytes]:
    """Route and body of the request that scores a draft.

    Args:
        way: see the module.
        model: the client's field.
        prompt_ids: everything before the draft.
        draft: token ids.
        salt: keeps the upstream's prefix cache of tenants apart.
        has_start: the server takes ``prompt_logprob_start`` on completions.
    """
    ids = [*prompt_ids, *draft]
    if way == "sglang":
        body: dict[str, Any] = {
            "input_ids": ids, "rid": f"sc-{secrets.token_hex(8)}",
            "sampling_params": {"temperature": 0, "max_new_tokens": 1}, "return_logprob": True,
            "logprob_start_len": len(prompt_ids) - 1, "top_logprobs_num": _LISTED, "return_text_in_logprobs": False,
            **({} if salt is None else {"extra_key": salt}),
        }  # fmt: skip
        return "/generate", _dump(body)
    extra = {} if salt is None else {"cache_salt": salt}
    if way == "generate":
        sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": _LISTED, "skip_reading_prefix_cache": False,
                    "detokenize": False}  # fmt: skip
        body = {"model": model, "request_id": f"sc-{secrets.token_hex(8)}", "token_ids": ids,
                "sampling_params": sampling, **extra}  # fmt: skip
        return "/inference/v1/generate", _dump(body)
    start = {"prompt_logprob_start": len(prompt_ids) - 1} if has_start else {}
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": _LISTED,
            "return_token_ids": True, **start, **extra}  # fmt: skip
    return "/v1/completions", _dump(body)


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps({key: value for key, value in body.items() if value is not None}, separators=(",", ":")).encode()


def read_verdict(way: VerifyWay, body: bytes, num_prompt: int, draft: Sequence[int]) -> Verdict | None:
    """What an answer to `verify_request` says; None if it has no rows for the draft that can be trusted."""
    try:
        whole = json.loads(body)
        rows, bonus = _sglang(whole, draft) if way == "sglang" else _vllm(way, whole, num_prompt, draft)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return None if rows is None else judge(rows, draft, bonus)


def _vllm(
    way: VerifyWay, whole: Mapping[str, Any], num_prompt: int, draft: Sequence[int]
) -> tuple[list[Row | None] | None, int | None]:
    choice = whole["choices"][0]
    rows = choice["prompt_logprobs"] if way == "completions" else whole["prompt_logprobs"]
    details = (whole.get("usage") or {}).get("prompt_tokens_details") or {}
    cached, length = details.get("cached_tokens"), num_prompt + len(draft)
    # Rows of cached tokens are missing, or, from one of vLLM's runners, there and filled with garbage.
    is_doubtful = way == "generate" and cached is None and len(rows) >= length
    if is_doubtful or len(rows) <= len(draft) or (cached or 0) >= num_prompt:
        return None, None
    told = choice.get("token_ids") or []
    return [_row(row) for row in rows[len(rows) - len(draft) :]], int(told[0]) if len(told) == 1 else None


def _row(row: Mapping[str, Mapping[str, Any]] | None) -> Row | None:
    return None if row is None else {int(token): float(entry["logprob"]) for token, entry in row.items()}


def _sglang(whole: Mapping[str, Any], draft: Sequence[int]) -> tuple[list[Row | None] | None, int | None]:
    meta = whole["meta_info"]
    own, top = meta["input_token_logprobs"], meta["input_top_logprobs"]
    if len(own) != len(draft) + 1 or len(top) != len(own) or [int(entry[1]) for entry in own[1:]] != list(draft):
        return None, None
    rows: list[Row | None] = []
    for entry, listed in zip(own[1:], top[1:], strict=True):
        is_told = listed and entry[0] is not None
        rows.append({int(entry[1]): float(entry[0])} | {int(i): float(p) for p, i, *_ in listed} if is_told else None)
    told = whole.get("output_ids") or []
    return rows, int(told[0]) if len(told) == 1 else None


async def ask_verdict(
    upstream: Upstream, question: Question, way: VerifyWay, model: Any, prompt_ids: Sequence[int], draft: Sequence[int],
    *, salt: str | None, has_start: bool,
) -> Verdict | None:  # fmt: skip
    """Have a draft verified; None if the upstream refuses, does not answer, or gives no rows that can be trusted.

    Args:
        upstream: the one.
        question: whose headers, and the part of whose path that stands before ``/v1/``, go along.
        way: see the module.
        model: the client's field.
        prompt_ids: everything before the draft.
        draft: token ids.
        salt: keeps the upstream's prefix cache of tenants apart.
        has_start: the server takes ``prompt_logprob_start`` on completions.
    """
    route, body = verify_request(way, model, prompt_ids, draft, salt=salt, has_start=has_start)
    target = question.path.partition("/v1/")[0] + route
    try:
        async with upstream.ask(Question("POST", target, question.headers, body), is_extra=True) as answer:
            async with asyncio.timeout(upstream.options.timeouts.idle_s):
                data = await answer.read()
            return read_verdict(way, data, len(prompt_ids), draft) if answer.status == 200 else None
    except (Unreachable, aiohttp.ClientError, TimeoutError):
        return None
