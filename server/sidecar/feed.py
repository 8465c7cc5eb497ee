"""Drafts for servers that take them: sent along with the request, verified where the model runs.

``prediction`` (OpenAI's field; Fireworks, Cerebras and ``specdec serve`` take it) carries text, vLLM with our proposer
takes token ids in ``vllm_xargs``. The text of the answer is as lossless as the server's own verification. What is
rejected may be billed, so a tenant whose predictions fail is left alone, but for one in twenty that tries again.
SGLang takes text for all requests at once instead: see `specdec.server.sidecar.corpora`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np

from specdec.server.sidecar.requests import Asked
from specdec.server.sidecar.tokens import Tokens
from specdec.suffix_tree.cache import SuffixCache

__all__ = ["FeedKind", "Feeder"]

FeedKind = Literal["prediction", "vllm-plugin", "sglang-corpus"]
_MAX_TOKENS = 256
_TRIALS, _LEAST_RATE, _RETRY = 5, 0.1, 20
_ACCEPTED = re.compile(rb'"accepted_prediction_tokens"\s*:\s*(\d+)')
_REJECTED = re.compile(rb'"rejected_prediction_tokens"\s*:\s*(\d+)')
# OpenAI refuses a prediction beside these; other servers have no use for it there.
_EXCLUDED = ("prediction", "tools", "response_format", "logprobs", "audio", "modalities", "max_completion_tokens")


@dataclass(slots=True)
class _Record:
    fed: int = 0
    skipped: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def is_worth_it(self) -> bool:
        total = self.accepted + self.rejected
        return self.fed < _TRIALS or total == 0 or self.accepted >= _LEAST_RATE * total


class Feeder:
    """Chooses what to send along.

    Args:
        kind: how the upstream takes drafts.
        cache: the tenants' texts.
        tokens: the upstream's tokenizer; without it nothing is fed.
        min_expected: least expected number of accepted tokens.
    """

    def __init__(self, kind: FeedKind, cache: SuffixCache, tokens: Tokens, *, min_expected: float = 4.0) -> None:
        self.kind = kind
        self._cache, self._tokens, self._min_expected = cache, tokens, min_expected
        self._records: dict[str, _Record] = {}
        self._numbers = count()

    def fields(self, asked: Asked, tenant: str) -> Mapping[str, Any]:
        """Fields to add to a request; none where there is nothing to expect, or the client speaks for itself."""
        body = asked.body
        if "vllm_xargs" in body if self.kind == "vllm-plugin" else not _takes_prediction(asked):
            return {}
        prompt = self._tokens.prompt_ids(asked)
        record = self._records.setdefault(tenant, _Record())
        if prompt is None or self._tokens.tokenizer is None:
            return {}
        ids = self._expected(prompt, tenant)
        if not ids:
            return {}
        if not record.is_worth_it:
            record.skipped += 1
            if record.skipped % _RETRY:
                return {}
        record.fed += 1
        if self.kind == "vllm-plugin":
            return {"vllm_xargs": {"specdec_draft": ids, "specdec_tenant": tenant}}
        return {"prediction": {"type": "content", "content": self._tokens.decode(ids)}}

    def _expected(self, prompt: list[int], tenant: str) -> list[int]:
        name = f"feed-{next(self._numbers)}"
        self._cache.start(name, np.array(prompt, np.int32), tenant=tenant, caching=False)
        try:
            made = self._cache.speculate([name], [_MAX_TOKENS], threshold=0.05, as_tree=False)
        finally:
            self._cache.finish(name)
        return made.token_ids[1:].tolist() if float(made.values[1:].sum()) >= self._min_expected else []

    def answered(self, tenant: str, body: bytes) -> None:
        """Learn from an answer's token counts what became of its prediction."""
        accepted, rejected = _ACCEPTED.findall(body[-4096:]), _REJECTED.findall(body[-4096:])
        record = self._records.get(tenant)
        if record is not None and accepted and rejected:
            record.accepted += int(accepted[-1])
            record.rejected += int(rejected[-1])


def _takes_prediction(asked: Asked) -> bool:
    body = asked.body
    if asked.kind != "chat" or any(body.get(name) for name in _EXCLUDED):
        return False
    return body.get("n", 1) in (1, None) and not body.get("presence_penalty") and not body.get("frequency_penalty")
