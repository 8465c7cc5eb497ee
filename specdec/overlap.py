"""Drafting beside verification, and verification in parts: what a step does not verify, a later one finds ready.

Two ways, both exact under match, because a draft is only a guess, whenever it was made:

- **halves**: a step serves one half of the batch; while the target verifies it, the other half is drafted for.
- **chunks**: of a draft the first levels are verified; the rest waits. Where the target's own tokens lead into it, it
  is the request's next draft, at once and for nothing; else it is dropped. So whole rows are spared where a draft
  fails early. A drafter that can forget again drafts the levels behind the chunk while that is verified.

Every step is an ordinary one: requests may come, go, be preempted or fail in between.

Sources: FASER (2604.20503), frontiers; CoSine (2503.10325), batches that alternate between the stages. That the rest of
a draft is the next step's draft, so that other requests lose no step, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from specdec.beside import Beside
from specdec.protocols import Drafter, TargetModel
from specdec.scheduler import Part
from specdec.types import Chunk, DraftTree, IntArray, RequestState, StepEvent, TargetOutput

__all__ = ["OverlapPolicy", "Rewinds", "StepOverlap", "grafted", "rest_of"]


class OverlapPolicy(Protocol):
    """Decides when a step overlaps."""

    def splits(self, num_requests: int, context: float) -> bool:
        """True if the batch is served in halves from now on."""

    def levels(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> int:
        """How many levels of these drafts are verified first; 0: all of them."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn from a step."""


@runtime_checkable
class Rewinds(Protocol):
    """A drafter that can be shown text which may not come true."""

    def rewind(self, request_id: str, num_tokens: int) -> None:
        """Forget what it read of the request from ``num_tokens`` on; nothing if it has not read so far."""


@dataclass(slots=True, eq=False)
class _Ready:
    """A draft that waits for its step."""

    num_tokens: int  # of the request, when it is of use
    tree: DraftTree


def rest_of(tree: DraftTree, token_ids: IntArray | Sequence[int]) -> DraftTree | None:
    """What is left of a draft behind some tokens: rooted at the last of them; None: they leave it, or nothing is left.

    Args:
        tree: rooted before the first token.
        token_ids: that came true.
    """
    node = 0
    for token_id in token_ids:
        children = np.flatnonzero((tree.parents == node) & (tree.token_ids == token_id))
        if not len(children):
            return None
        node = int(children[0])
    below = np.zeros(len(tree), dtype=np.bool_)
    below[node] = True
    for child in range(node + 1, len(tree)):
        below[child] = below[tree.parents[child]]
    if np.count_nonzero(below) < 2:
        return None
    nodes = np.flatnonzero(below)
    parents = np.searchsorted(nodes, tree.parents[nodes]).astype(np.int32)
    parents[0] = -1
    values = None
    if tree.values is not None:
        values = np.minimum(tree.values[nodes] / max(float(tree.values[node]), 1e-9), 1.0).astype(np.float32)
        values[0] = 1.0
    return DraftTree(tree.token_ids[nodes], parents, values, None if tree.sources is None else tree.sources[nodes])


def grafted(tree: DraftTree, node: int, more: DraftTree) -> DraftTree:
    """``tree`` with the nodes of ``more`` below ``node``, which is the root of ``more`` and has no children."""
    parents = np.where(more.parents[1:] == 0, node, more.parents[1:] + len(tree) - 1).astype(np.int32)
    values = None
    if tree.values is not None:
        below = np.ones(len(more), np.float32) if more.values is None else more.values
        values = np.append(tree.values, tree.values[node] * below[1:]).astype(np.float32)
    return DraftTree(np.append(tree.token_ids, more.token_ids[1:]), np.append(tree.parents, parents), values)


class StepOverlap:
    """What an engine asks before, within and behind a step. Not thread-safe: the engine's thread owns it.

    Args:
        policy: decides.
        beside: what runs beside the target.
        looks_ahead: a drafter that rewinds drafts behind a chunk while that is verified.
    """

    def __init__(self, policy: OverlapPolicy, beside: Beside, *, looks_ahead: bool = True) -> None:
        self.policy = policy
        self._beside, self._looks_ahead = beside, looks_ahead
        self._drafter: Drafter | None = None  # the engine's, and the same if it rewinds
        self._rewinds: Rewinds | None = None
        self._ready: dict[str, _Ready] = {}
        self._whole: dict[str, DraftTree] = {}  # drafts of this step of which only a part is verified
        # Tokens that the drafter was shown behind the text, and how long that was.
        self._shown: dict[str, tuple[int, IntArray]] = {}
        self._limits: dict[str, int] = {}  # what each request was allowed last
        self._served: set[str] = set()
        self._others: list[RequestState] = []
        self._ahead: list[RequestState] = []  # whose drafts go on behind the chunk
        self.num_split_steps = self.num_chunked_steps = self.num_reused = 0

    def select(self, parts: Sequence[Part]) -> Sequence[Part]:
        """The parts of this step: all of them, or those of one half and of whoever has no token yet."""
        decoding = [part for part in parts if part.decodes]
        self._others = []
        context = sum(part.state.num_tokens for part in decoding) / max(len(decoding), 1)
        if len(decoding) < 2 or not self.policy.splits(len(decoding), context):
            self._served.clear()
            return parts
        waiting = {part.state.request_id for part in decoding} - self._served
        if not waiting or len(waiting) == len(decoding):
            waiting = {part.state.request_id for part in decoding[: (len(decoding) + 1) // 2]}
        self._served = waiting
        self._others = [part.state for part in decoding if part.state.request_id not in waiting and not part.num_prefix]
        self.num_split_steps += 1
        return [part for part in parts if not part.decodes or part.state.request_id in waiting]

    def propose(self, drafter: Drafter, states: Sequence[RequestState], limits: Sequence[int]) -> list[DraftTree]:
        """Drafts: those that are ready, and new ones of the engine's drafter for the other requests."""
        if drafter is not self._drafter:
            self._drafter = drafter
            self._rewinds = drafter if self._looks_ahead and isinstance(drafter, Rewinds) else None
        for request_id in list(self._shown):  # of a step that failed
            self._take_back(request_id, ())
        trees: dict[str, DraftTree] = {}
        for state, limit in zip(states, limits, strict=True):
            self._limits[state.request_id] = limit
            ready = self._ready.pop(state.request_id, None)
            if ready is not None and ready.num_tokens == state.num_tokens and limit:
                kept = min(len(ready.tree), limit + 1)  # parents come before their children
                trees[state.request_id] = ready.tree.subtree(np.arange(kept))
                self.num_reused += 1
        rows = [row for row, state in enumerate(states) if state.request_id not in trees]
        if rows:
            asked = [states[row] for row in rows]
            for state, tree in zip(asked, _draft(drafter, asked, [limits[row] for row in rows]), strict=True):
                trees[state.request_id] = tree
        return [trees[state.request_id] for state in states]

    def split(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> list[DraftTree]:
        """The part of each draft that this step verifies."""
        self._whole.clear()
        self._ahead = []
        levels = self.policy.levels(states, trees)
        if not levels:
            return list(trees)
        first = []
        for state, tree in zip(states, trees, strict=True):
            nodes = np.flatnonzero(tree.depths() <= levels)
            first.append(tree if len(nodes) == len(tree) else tree.subtree(nodes))
            if len(nodes) < len(tree):
                self._whole[state.request_id] = tree
            elif self._rewinds is not None and tree.depths().max() == levels:
                self._ahead.append(state)  # it may have stopped because the chunk was full
        self.num_chunked_steps += bool(self._whole or self._ahead)
        return first

    def forward(self, target: TargetModel, chunks: Sequence[Chunk]) -> TargetOutput:
        """Let the target score the chunks; what may be drafted meanwhile is."""
        served = {chunk.state.request_id: chunk for chunk in chunks}
        others = [
            (state, self._limits[state.request_id])
            for state in self._others
            if state.request_id not in self._ready and state.request_id not in served
            and self._limits.get(state.request_id)
        ]  # fmt: skip
        ahead = [(state, chunk.tree) for state in self._ahead if (chunk := served.get(state.request_id)) and chunk.tree]
        drafter = self._drafter
        if drafter is None or not (others or ahead):
            return target.forward(chunks)

        def work() -> None:
            if others:
                self._draft_for(drafter, *zip(*others, strict=True))
            if ahead:
                self._draft_behind(drafter, *zip(*ahead, strict=True))

        finish = self._beside.start(work)
        try:
            return target.forward(chunks)
        finally:
            finish()

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Keep of the drafts what the step's tokens lead into."""
        for event in events:
            state = event.state
            whole = self._whole.pop(state.request_id, None)
            rest = rest_of(whole, event.emitted_ids) if whole is not None else None
            if rest is not None:
                self._ready[state.request_id] = _Ready(state.num_tokens, rest)
            self._take_back(state.request_id, event.emitted_ids)
        self.policy.observe(events)

    def _take_back(self, request_id: str, emitted_ids: IntArray | Sequence[int]) -> None:
        """Let the drafter forget what it was shown and did not come true."""
        num_tokens, shown = self._shown.pop(request_id, (0, np.empty(0, np.int32)))
        if num_tokens and self._rewinds is not None:
            differs = np.append(shown[: len(emitted_ids)] != emitted_ids[: len(shown)], True)
            self._rewinds.rewind(request_id, num_tokens + int(np.argmax(differs)))

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""
        for held in (self._ready, self._whole, self._shown, self._limits):
            for request_id in request_ids:
                held.pop(request_id, None)

    def close(self) -> None:
        """Give back the thread or the stream."""
        self._beside.close()

    def _draft_for(self, drafter: Drafter, states: Sequence[RequestState], limits: Sequence[int]) -> None:
        """Drafts of requests that this step does not serve."""
        for state, tree in zip(states, _draft(drafter, states, limits), strict=True):
            if tree.num_draft_tokens:
                self._ready[state.request_id] = _Ready(state.num_tokens, tree)

    def _draft_behind(self, drafter: Drafter, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> None:
        """Go on behind the chunks, as if the best path of each came true."""
        ends = [_best_leaf(tree) for tree in trees]
        paths = [tree.token_ids[tree.path(end)[1:]] for tree, end in zip(trees, ends, strict=True)]
        guesses, limits = [], []
        for state, path in zip(states, paths, strict=True):
            guess = RequestState(state.request)
            guess.append(np.append(state.output_ids, path).astype(np.int32))
            guesses.append(guess)
            limits.append(max(self._limits[state.request_id] - len(path), 0))
            self._shown[state.request_id] = (state.num_tokens, path)
        found = drafter.propose(guesses, limits)
        for state, tree, end, more in zip(states, trees, ends, found, strict=True):
            if more.num_draft_tokens:
                self._whole[state.request_id] = grafted(tree, end, more)


def _draft(drafter: Drafter, states: Sequence[RequestState], limits: Sequence[int]) -> list[DraftTree]:
    trees = drafter.propose(states, limits)
    for state in states:
        state.hidden = None
    return trees


def _best_leaf(tree: DraftTree) -> int:
    """The leaf that the draft's own values, or its depth, say to be likeliest to be reached."""
    depths, leaves = tree.depths(), np.setdiff1d(np.arange(len(tree)), tree.parents)
    deepest = leaves[depths[leaves] == depths[leaves].max()]
    values = np.zeros(len(tree)) if tree.values is None else tree.values
    return int(deepest[np.argmax(values[deepest])])
