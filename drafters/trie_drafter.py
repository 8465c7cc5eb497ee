"""What drafters that count strings in tries share: texts are caught up with lazily, before a draft and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.drafters.store import RetrievalStore
from specdec.errors import InternalError
from specdec.protocols import DrafterNeeds
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.count_trie import CountTrie
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["LiveText", "TrieDrafter"]

_MAX_OWN_NODES = 1 << 22  # 128 MB at the very most, for prompts of 300 thousand tokens


@dataclass(slots=True, eq=False)
class LiveText:
    """A request's text and what is counted of it."""

    state: RequestState
    memory: BranchMemory
    own: CountTrie
    windows: IntArray
    num_seen: int
    tree: IntArray | None = None  # [3, N]: the pending draft, of drafters that judge it


class TrieDrafter:
    """A trie of each request's own text, and one of its tenant's outputs (`specdec.protocols.Drafter`).

    Args:
        store: where outputs are kept; a private one if None.
        depth: the longest strings that are counted, in tokens.
    """

    def __init__(self, store: RetrievalStore | None, depth: int) -> None:
        self.needs = DrafterNeeds()
        self.store = store or RetrievalStore()
        self._depth = depth
        self._live: dict[str, LiveText] = {}

    def _memory(self, tenant: str) -> BranchMemory:
        """The tenant's; called with the store locked."""
        raise NotImplementedError

    def _judge(self, live: LiveText, token_ids: IntArray) -> None:
        """Learn from what came behind the first ``live.num_seen`` of a request's tokens, not counted yet."""
        raise NotImplementedError

    def _draft(self, live: LiveText, token_ids: IntArray, budget: int) -> DraftTree:
        """At most ``budget`` nodes, >= 1, behind a request's tokens."""
        raise NotImplementedError

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            with self.store.lock:
                memory = self._memory(state.request.tenant)
                memory.open(state.request_id)
            longest = state.num_tokens + state.request.sampling.max_new_tokens
            own = CountTrie(self._depth, min(longest * self._depth + 2, _MAX_OWN_NODES))
            live = LiveText(state, memory, own, own.new_windows(), state.num_tokens)
            self._live[state.request_id] = live
            own.append(live.windows, state.token_ids)

    def _catch_up(self, live: LiveText) -> IntArray:
        """Learn from the committed tokens that are new, count them, and return all tokens."""
        token_ids = live.state.token_ids
        new_ids = token_ids[live.num_seen :]
        if len(new_ids):
            self._judge(live, token_ids)
            live.own.append(live.windows, new_ids)
            live.memory.append(live.state.request_id, new_ids)
            live.num_seen = len(token_ids)
        live.tree = None
        return token_ids

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            live = self._live.get(state.request_id)
            if live is None:
                raise InternalError(f"request {state.request_id!r} was not started")
            with self.store.lock:
                token_ids = self._catch_up(live)
                if budget < 1:
                    trees.append(DraftTree.root_only(int(token_ids[-1])))
                else:
                    trees.append(self._draft(live, token_ids, int(budget)))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to do: what came of a draft shows in the tokens that the next ``propose`` or ``stop`` counts."""

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None:
                with self.store.lock:
                    self._catch_up(live)
                    live.memory.close(request_id)
