"""Losslessness, checked in service: a sample of accelerated greedy requests is asked again, plainly, and twice.

Two plain answers tell whether the upstream agrees with itself; only where it does, a difference is a verdict. At the
first difference the upstream's own scores tell a numerical tie from a fault. One fault ends acceleration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from specdec.server.sidecar.events import EventSplitter, read_event, with_fields
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream

__all__ = ["Case", "Verdict", "audit"]

Verdict = Literal["match", "unstable", "tie", "fault", "unknown"]
# Scores are stated as log-probabilities in 16-bit models' precision: two that differ by less may change places between
# one batch and another.
_TIE = 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """An accelerated request.

    Args:
        question: as the client asked it.
        prompt_ids: of its prompt.
        output_ids: what the client got.
        model: its model field.
    """

    question: Question
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    model: Any


async def audit(upstream: Upstream, case: Case) -> Verdict:
    """Ask again and compare; ``unknown`` if the upstream does not answer."""
    try:
        first, second = await _plain(upstream, case.question), await _plain(upstream, case.question)
        if first != second:
            return "unstable"
        if first == list(case.output_ids):
            return "match"
        common = _common(first, case.output_ids)
        gap = await _gap(upstream, case, first[:common])
    except (Unreachable, aiohttp.ClientError, TimeoutError, ValueError):
        return "unknown"
    return "tie" if gap is not None and gap < _TIE else "fault"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def _plain(upstream: Upstream, question: Question) -> list[int]:
    """Token ids of a plain answer.

    Raises:
        ValueError: it is no complete stream with token ids.
    """
    body = with_fields(question.body, return_token_ids=True)
    again = Question(question.method, question.target, question.headers, body)
    splitter, ids, is_done = EventSplitter(), list[int](), False
    async with upstream.ask(again, is_extra=True) as answer:
        async for data in answer.content.iter_any():
            for raw in splitter.feed(data):
                piece = read_event(raw)
                ids += piece.token_ids
                is_done |= piece.finish_reason is not None
    if not is_done:
        raise ValueError("the plain answer is not complete")
    return ids


async def _gap(upstream: Upstream, case: Case, output_ids: Sequence[int]) -> float | None:
    """How much the best score leads behind a prefix, as a difference of log-probabilities; None if it is not told."""
    prompt = [*case.prompt_ids, *output_ids]
    body = {"model": case.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    target = case.question.target.replace("/chat/completions", "/completions")
    question = Question("POST", target, case.question.headers, json.dumps(body).encode())
    async with upstream.ask(question, is_extra=True) as answer:
        whole = json.loads(await answer.read())
    try:
        scores = sorted((float(x) for x in whole["choices"][0]["logprobs"]["top_logprobs"][0].values()), reverse=True)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return scores[0] - scores[1] if len(scores) > 1 else None
