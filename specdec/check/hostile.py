"""A drafter that makes every kind of step happen: right paths of all lengths, hidden among wrong ones.

Random tokens alone are hardly ever accepted, and what is never accepted tests no commit. So the likely continuations
of a request are known to this drafter and grafted, in pieces, into random trees: steps that accept nothing, a part of
a branch, a whole branch, a node with many wrong siblings before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["HostileDrafter"]

_SHARE_GRAFTED: Final = 0.6


class HostileDrafter:
    """Drafts random trees that hold pieces of the given outputs (`specdec.protocols.Drafter`).

    A tree depends on (seed, request, position, output so far) only.

    Args:
        likely: request id -> outputs that the request may have; only those that go on from its present output are used.
        vocab_size: wrong tokens are drawn from ``range(vocab_size)``.
        seed: which trees.
    """

    def __init__(self, likely: Mapping[str, Sequence[Sequence[int]]], vocab_size: int, *, seed: int = 0) -> None:
        self.needs = DrafterNeeds()
        self._likely = likely
        self._vocab_size = vocab_size
        self._seed = seed

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing to prepare."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing to forget."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._tree(state, budget) for state, budget in zip(states, budgets, strict=True)]

    def _tree(self, state: RequestState, budget: int) -> DraftTree:
        rng = np.random.default_rng((self._seed, zlib.crc32(state.request_id.encode()), state.num_tokens))
        futures = self._futures(state)
        token_ids, parents = [int(state.token_ids[-1])], [-1]
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        for _ in range(int(rng.integers(0, max(budget, 0) + 1))):
            edge = (int(rng.integers(len(parents))), int(rng.integers(self._vocab_size)))
            if futures and rng.random() < _SHARE_GRAFTED:
                edge = _next_edge(futures[int(rng.integers(len(futures)))], nodes) or edge
            if edge not in nodes:
                nodes[edge] = len(parents)
                parents.append(edge[0])
                token_ids.append(edge[1])
        return DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32))

    def _futures(self, state: RequestState) -> list[Sequence[int]]:
        done = state.output_ids.tolist()
        likely = self._likely.get(state.request_id, ())
        return [
            output[len(done) :] for output in likely if list(output[: len(done)]) == done and len(output) > len(done)
        ]


def _next_edge(future: Sequence[int], nodes: Mapping[tuple[int, int], int]) -> tuple[int, int] | None:
    """The first edge of a path that the tree does not have yet; None if it has all of them."""
    node = 0
    for token_id in future:
        edge = (node, int(token_id))
        if edge not in nodes:
            return edge
        node = nodes[edge]
    return None
