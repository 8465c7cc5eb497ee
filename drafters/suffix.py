"""SuffixDecoding with calibrated values: drafts from the request's own text and its tenant's earlier responses.

Source: SuffixDecoding (Oliaro et al. 2024, 2411.04975) for the idea, ``specdec.suffix_tree`` for what is different:
candidates instead of counts, acceptance probabilities learned online instead of frequencies, draft length from cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError, InternalError, RequestError
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["SuffixDrafter"]


class SuffixDrafter:
    """Guesses that text seen before goes on as it did (`specdec.protocols.Drafter`).

    Args:
        threshold: the cost of a draft token over the cost of a step, in [0, 1]. No token is drafted whose path is
            accepted with a smaller probability, and long copies are drafted in pieces (`specdec.suffix_tree.stopping`).
            0.05 suits a target that is bound by memory.
        as_tree: draft trees; False: paths only.
        caching: keep responses for later requests of the same tenant.
        store: where text is kept; a private one if None. Several drafters and engines may share a store.
        max_bytes: of a private store: bound of each tenant's index in bytes.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.05,
        as_tree: bool = True,
        caching: bool = True,
        store: RetrievalStore | None = None,
        max_bytes: int | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1], got {threshold}")
        if store is not None and max_bytes is not None:
            raise ConfigError("give a store or max_bytes, not both")
        self.needs = DrafterNeeds()
        self.store = store or (RetrievalStore() if max_bytes is None else RetrievalStore(max_bytes=max_bytes))
        self.min_value = float(threshold)
        self._as_tree = as_tree
        self._caching = caching
        self._live: dict[str, tuple[RequestState, int]] = {}  # and how many of its tokens the cache has

    def start(self, states: Sequence[RequestState]) -> None:
        started: list[str] = []
        try:
            for state in states:
                request = state.request
                self.store.suffix.start(
                    request.request_id, state.token_ids, tenant=request.tenant, caching=self._caching
                )
                started.append(request.request_id)
                self._live[request.request_id] = (state, state.num_tokens)
        except ValueError as error:
            for request_id in started:
                self.store.suffix.finish(request_id)
                del self._live[request_id]
            raise RequestError(str(error)) from error

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        ids, new_ids = [], []
        for state in states:
            request_id = state.request_id
            if request_id not in self._live:
                raise InternalError(f"request {request_id!r} was not started")
            ids.append(request_id)
            new_ids.append(state.token_ids[self._live[request_id][1] :])
            self._live[request_id] = (state, state.num_tokens)
        drafts = self.store.suffix.step(ids, new_ids, budgets, threshold=self.min_value, as_tree=self._as_tree)
        offsets = drafts.offsets.tolist()
        trees = []
        for state, first, last in zip(states, offsets, offsets[1:], strict=False):
            drafts.token_ids[first] = state.token_ids[-1]
            part = slice(first, last)
            trees.append(DraftTree(drafts.token_ids[part], drafts.parents[part], drafts.values[part]))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to do: what came of a draft shows in the tokens that the next ``propose`` or ``stop`` appends."""

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            state, seen = self._live.pop(request_id, (None, 0))
            if state is None:
                continue
            if state.num_tokens > seen:
                self.store.suffix.extend([request_id], [state.token_ids[seen:]])
            self.store.suffix.finish(request_id)

    @property
    def nbytes(self) -> int:
        """Bytes in use by the store's suffix part."""
        return self.store.suffix.nbytes

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        self.store.suffix.warmup()
