"""A drop-in for the cache behind vLLM's ``suffix`` method: Arctic's signatures, our index inside.

    from specdec.server.integrations.suffix_cache import SuffixDecodingCache

What differs: ``max_spec_tokens`` may be left out; the depth does not limit matches, only drafts; draft length follows
from calibrated acceptance (``min_token_prob`` is the least, and sets how long the pieces of a copy are), so
``max_spec_factor`` and ``max_spec_offset`` count only with ``limit_by_match=True``; ``probs`` are probabilities of
acceptance.
"""

from __future__ import annotations

from collections.abc import Hashable, KeysView, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.cache import SuffixCache, as_tokens

__all__ = ["SuffixDecodingCache", "SuffixDecodingDraft"]

_CHECKED = 8  # last tokens of a context that are compared with the text that was added
_NOTHING = np.empty(0, np.int32)


@dataclass(slots=True)
class SuffixDecodingDraft:
    """A draft: token i follows token ``parents[i]``, or the context where that is -1.

    Args:
        token_ids: the draft tokens.
        parents: index of each token's parent.
        probs: calibrated probability that the path to each token is accepted.
        score: their sum: expected number of accepted tokens.
        match_len: tokens of the context that the longest match covers.
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0
    match_len: int = 0


class SuffixDecodingCache:
    """Drafts for active requests from their own text and the responses of earlier ones.

    Args:
        max_tree_depth: most draft tokens where ``max_spec_tokens`` is left out.
        max_cached_requests: responses kept; -1 for as many as ``max_bytes`` holds, 0 for none.
        max_bytes: bound of the memory for them.
        limit_by_match: let the match length limit the draft, as Arctic does.

    Raises:
        ValueError: ``max_cached_requests`` is above 2^31 - 1.
    """

    def __init__(
        self,
        max_tree_depth: int = 64,
        max_cached_requests: int = -1,
        *,
        max_bytes: int = 1 << 30,
        limit_by_match: bool = False,
    ) -> None:
        if max_cached_requests > 0x7FFFFFFF:
            raise ValueError(f"max_cached_requests must be at most 2^31 - 1, got {max_cached_requests}")
        self._max_tree_depth = max_tree_depth
        self._max_cached_requests = max_cached_requests
        self._limit_by_match = limit_by_match
        self._cache = SuffixCache(
            max_bytes=max_bytes,
            max_responses=max_cached_requests if max_cached_requests > 0 else None,
            caching=max_cached_requests != 0,
        )
        self._cache.warmup()

    @property
    def max_tree_depth(self) -> int:
        """Most draft tokens where ``max_spec_tokens`` is left out."""
        return self._max_tree_depth

    @property
    def max_cached_requests(self) -> int:
        """Responses kept; -1 = bounded by memory only."""
        return self._max_cached_requests

    @property
    def active_requests(self) -> KeysView[Hashable]:
        """Requests that were started and not stopped."""
        return self._cache.active_requests.keys()

    @property
    def cached_requests(self) -> KeysView[Hashable]:
        """Requests whose responses are kept."""
        return self._cache.index("").responses.keys()

    def start_request(self, req_id: Hashable, prompt_token_ids: npt.NDArray[np.int32] | Sequence[int]) -> None:
        """Take up a request; a response kept under its id is evicted.

        Raises:
            ValueError: the request is active, or an array is not one-dimensional, int32 and contiguous.
        """
        if req_id in self._cache.active_requests:
            raise ValueError(f"Request '{req_id}' is already active")
        self._cache.start(req_id, _checked(prompt_token_ids))

    def stop_request(self, req_id: Hashable) -> None:
        """Let a request go; its response stays.

        Raises:
            ValueError: the request is not active.
        """
        self._require_active(req_id)
        self._cache.finish(req_id)

    def add_active_response(self, req_id: Hashable, token_ids: npt.NDArray[np.int32] | Sequence[int]) -> None:
        """Append tokens to an active request's response.

        Raises:
            ValueError: the request is not active, or an array is not one-dimensional, int32 and contiguous.
        """
        self._require_active(req_id)
        self._cache.advance(req_id, _checked(token_ids), budget=0, threshold=1.0, as_tree=False)

    def evict_cached_response(self, req_id: Hashable) -> None:
        """Delete a kept response.

        Raises:
            ValueError: none is kept under this id.
        """
        if req_id not in self.cached_requests:
            raise ValueError(f"Request '{req_id}' is not cached")
        self._cache.forget(req_id)

    def speculate(
        self,
        req_id: Hashable,
        context: npt.NDArray[np.int32] | Sequence[int],
        max_spec_tokens: int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
    ) -> SuffixDecodingDraft:
        """Draft the continuation of a context.

        Args:
            req_id: an active request.
            context: the end of its prompt and response. If it is anything else, it is looked up by itself.
            max_spec_tokens: most draft tokens; None or 0: ``max_tree_depth``.
            max_spec_factor: with ``limit_by_match``: draft tokens per matched token.
            max_spec_offset: with ``limit_by_match``: draft tokens beyond that.
            min_token_prob: least probability that the path to a drafted token is accepted.
            use_tree_spec: draft a tree; else a path.

        Raises:
            ValueError: the request is not active, or an array is not one-dimensional, int32 and contiguous.
        """
        self._require_active(req_id)
        last = _checked(context[-_CHECKED:])
        if len(last) == 0:
            return SuffixDecodingDraft()
        limit = max_spec_tokens or self._max_tree_depth
        live = self._cache.advance(req_id, _NOTHING, budget=limit, threshold=min_token_prob, as_tree=use_tree_spec)
        if not _ends_with(live.text, last):
            return self._speculate_alone(context, limit, min_token_prob, use_tree_spec)
        match = self._cache.match_length(req_id)
        count = live.count
        if self._limit_by_match:
            count = min(count, max(0, int(match * max_spec_factor + max_spec_offset + 1e-6)))
        probs = live.values[:count].tolist()
        return SuffixDecodingDraft(
            live.draft[:count, 0].tolist(), live.draft[:count, 1].tolist(), probs, sum(probs), match
        )

    def _speculate_alone(
        self, context: npt.NDArray[np.int32] | Sequence[int], limit: int, threshold: float, as_tree: bool
    ) -> SuffixDecodingDraft:
        key = object()
        self._cache.start(key, _checked(context), caching=False)
        live = self._cache.advance(key, _NOTHING, budget=limit, threshold=threshold, as_tree=as_tree)
        match = self._cache.match_length(key)
        self._cache.finish(key)
        probs = live.values[: live.count].tolist()
        nodes = live.draft[: live.count]
        return SuffixDecodingDraft(nodes[:, 0].tolist(), nodes[:, 1].tolist(), probs, sum(probs), match)

    def _require_active(self, req_id: Hashable) -> None:
        if req_id not in self._cache.active_requests:
            raise ValueError(f"Request '{req_id}' is not active")


def _ends_with(text: npt.NDArray[np.int32], last: npt.NDArray[np.int32]) -> bool:
    return len(text) >= len(last) and bool((text[len(text) - len(last) :] == last).all())


def _checked(token_ids: npt.NDArray[np.int32] | Sequence[int]) -> npt.NDArray[np.int32]:
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1:
            raise ValueError(f"ndarray input must have ndim=1, got ndim={token_ids.ndim}")
        if token_ids.dtype != np.int32:
            raise ValueError(f"ndarray input must have dtype=int32, got dtype={token_ids.dtype.name}")
        if not token_ids.flags["CONTIGUOUS"]:
            raise ValueError("ndarray input must be contiguous")
        return token_ids
    return as_tokens(token_ids)
