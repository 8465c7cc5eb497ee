"""Drafts for the live requests of a foreign engine, which tells its tokens step by step and forgets to say goodbye."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.cache import SuffixCache

__all__ = ["Draft", "EngineDrafts", "Hint"]

_LEAD = 8  # tokens of the prompt's end before a hint, so that it is matched from the first output token on
_MAX_BUDGET = 256


@dataclass(frozen=True, slots=True)
class Hint:
    """What a request's client says about drafting.

    Args:
        tenant: whose text this is; texts of different tenants never meet.
        is_on: False: no drafts for this request.
        token_ids: expected output, which drafts follow first.
    """

    tenant: str = ""
    is_on: bool = True
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft without its root: token i follows token ``parents[i]``, or the context where that is -1."""

    token_ids: list[int]
    parents: list[int]


class EngineDrafts:
    """A suffix store that follows requests by what the engine shows of them.

    Args:
        max_bytes: bound of each tenant's store.
        threshold: least probability that the path to a draft token is accepted.
    """

    def __init__(self, *, max_bytes: int = 256 << 20, threshold: float = 0.1) -> None:
        self._cache = SuffixCache(max_bytes=max_bytes)
        self._cache.warmup()
        self._threshold = threshold
        self._known: dict[str, int] = {}  # live request -> tokens of it that the store has
        self.num_draft_tokens = 0

    @property
    def live(self) -> Collection[str]:
        """Requests that are followed."""
        return self._known.keys()

    def follow(self, request_id: str, token_ids: npt.NDArray[np.int32], num_prompt: int, hint: Hint) -> None:
        """Take over a request's tokens as they stand now; only new ones are read.

        Args:
            request_id: of the engine.
            token_ids: [T] prompt and output so far.
            num_prompt: how many of them are the prompt.
            hint: read when the request is first seen.
        """
        known = self._known.get(request_id)
        if known is not None and known > len(token_ids):  # the id was given again, or tokens were taken back
            self._cache.finish(request_id)
            known = None
        if known is None:
            prompt = np.asarray(token_ids[:num_prompt], np.int32)
            if hint.token_ids:
                prompt = np.concatenate((prompt[-_LEAD:], np.array(hint.token_ids, np.int32), prompt))
            self._cache.start(request_id, prompt, tenant=hint.tenant)
            known = num_prompt
        if len(token_ids) > known:
            self._cache.extend([request_id], [np.asarray(token_ids[known:], np.int32)])
        self._known[request_id] = len(token_ids)

    def retain(self, request_ids: Collection[str]) -> None:
        """Let all other requests go; their text stays for later ones."""
        for request_id in [known for known in self._known if known not in request_ids]:
            self._cache.finish(request_id)
            del self._known[request_id]

    def drafts(self, request_ids: Sequence[str], budgets: Sequence[int], *, as_tree: bool) -> list[Draft]:
        """One draft for each request, of at most so many tokens."""
        if not request_ids:
            return []
        made = self._cache.speculate(
            request_ids, [min(budget, _MAX_BUDGET) for budget in budgets], threshold=self._threshold, as_tree=as_tree
        )
        drafts = []
        for start, stop in zip(made.offsets[:-1] + 1, made.offsets[1:], strict=True):
            # In the store node 0 is the root; behind it stand the drafted tokens.
            drafts.append(Draft(made.token_ids[start:stop].tolist(), (made.parents[start:stop] - 1).tolist()))
            self.num_draft_tokens += int(stop - start)
        return drafts
