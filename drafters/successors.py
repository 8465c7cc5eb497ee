"""The successor matrix of Token Recycling and the template that is filled from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specdec.tree import FloatArray, IntArray

__all__ = ["TEMPLATE", "SuccessorTable", "Template"]

_UNSEEN = -1
_PRIOR_TRIES = 8.0  # outcomes that the prior acceptance of a template node counts for
# Children per node of the published template "2.2.2", path -> number of children; 80 nodes on levels of 8, 21, 25, 15,
# 8 and 3. Source: paper and released code, table in the appendix.
_CHILDREN: Mapping[tuple[int, ...], int] = {
    (): 8,
    (0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1,
    (0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1, (1, 0): 2, (1, 1): 1,
    (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
    (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1, (0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1,
    (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A static tree: node 0 is the root, parents come before children.

    Args:
        parents: [N] int32.
        ranks: [N] int32: which successor of its parent's token a node carries.
        levels: nodes of each depth, the root's first.
        width: successors kept per token.
    """

    parents: IntArray
    ranks: IntArray
    levels: tuple[IntArray, ...]
    width: int

    @classmethod
    def of(cls, children: Mapping[tuple[int, ...], int]) -> Template:
        """The template with the given number of children per path."""
        paths = [(), *sorted((p + (i,) for p, n in children.items() for i in range(n)), key=lambda p: (len(p), p))]
        number = {path: i for i, path in enumerate(paths)}
        parents = np.array([-1, *(number[path[:-1]] for path in paths[1:])], np.int32)
        ranks = np.array([0, *(path[-1] for path in paths[1:])], np.int32)
        depths = np.array([len(path) for path in paths])
        levels = tuple(np.flatnonzero(depths == d).astype(np.int32) for d in range(depths.max() + 1))
        return cls(parents, ranks, levels, max(children.values()))


TEMPLATE = Template.of(_CHILDREN)


def _prior_rates() -> FloatArray:
    # The first successor is right in about four of ten cases, each further one about half as often.
    return (0.4 * 0.5 ** TEMPLATE.ranks.astype(np.float64)).astype(np.float32)


class SuccessorTable:
    """One tenant's matrix: the eight likeliest successors of every token, and who wrote each row last."""

    def __init__(self) -> None:
        self.rows = np.full((0, TEMPLATE.width), _UNSEEN, np.int32)
        self.owners = np.zeros(0, np.int32)
        self.tries = np.zeros(len(TEMPLATE.parents), np.float32)
        self.hits = np.zeros(len(TEMPLATE.parents), np.float32)
        self.owner_numbers: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.rows.nbytes + self.owners.nbytes

    def _reach(self, largest: int) -> None:
        size = len(self.rows)
        if largest >= size:
            more = max(largest + 1, 2 * size, 1024) - size
            self.rows = np.concatenate([self.rows, np.full((more, TEMPLATE.width), _UNSEEN, np.int32)])
            self.owners = np.concatenate([self.owners, np.zeros(more, np.int32)])

    def _owner(self, request_id: str) -> int:
        number = self.owner_numbers.get(request_id)
        if number is None:
            if len(self.owner_numbers) > max(1024, len(self.rows)):  # most of them own no row any more
                present = set(self.owners.tolist())
                self.owner_numbers = {name: n for name, n in self.owner_numbers.items() if n in present}
            number = self.owner_numbers[request_id] = max(self.owner_numbers.values(), default=0) + 1
        return number

    def seed(self, token_ids: IntArray, request_id: str) -> None:
        """Give tokens without a row the successors that they have in a prompt, latest first."""
        if len(token_ids) < 2:
            return
        self._reach(int(token_ids.max()))
        owner = self._owner(request_id)
        heads, tails = token_ids[:-1][::-1], token_ids[1:][::-1]  # latest first
        fresh = self.rows[heads, 0] == _UNSEEN
        pairs, first = np.unique(heads[fresh].astype(np.int64) << 32 | tails[fresh], return_index=True)
        order = np.lexsort((first, pairs >> 32))
        heads, tails = (pairs[order] >> 32).astype(np.int32), (pairs[order] & 0xFFFFFFFF).astype(np.int32)
        ranks = np.arange(len(heads)) - np.searchsorted(heads, heads)
        kept = ranks < TEMPLATE.width
        self.rows[heads[kept], ranks[kept]] = tails[kept]
        self.owners[heads] = owner

    def seed_logits(self, token_ids: IntArray, successors: IntArray, request_id: str) -> None:
        """Write rows from prompt logits; where a token occurs twice the later place wins.

        Args:
            token_ids: [D] int32 prompt tokens, at least one.
            successors: [D, k] int32: the likeliest tokens after each, best first; k at most the width of a row.
            request_id: whose prompt it is.
        """
        self.update(token_ids, np.arange(len(token_ids), dtype=np.int32), [], successors, request_id)

    def update(
        self, token_ids: IntArray, depths: IntArray, accepted: Sequence[int], successors: IntArray, request_id: str
    ) -> None:
        """Write one row per verified node; where a token occurs twice the accepted, then the deeper node wins.

        Args:
            token_ids: [N] int32: tokens of the tree, the root's first.
            depths: [N] their depths.
            accepted: nodes of the accepted path without the root.
            successors: [N, width] int32: the likeliest next tokens after each node, best first.
            request_id: who writes.
        """
        self._reach(int(max(token_ids.max(), successors.max())))
        on_path = np.zeros(len(token_ids), bool)
        on_path[[0, *accepted]] = True
        order = np.lexsort((np.arange(len(token_ids)), depths, on_path))  # the last write stays
        targets = token_ids[order]
        self.rows[targets] = _UNSEEN
        self.rows[targets, : successors.shape[1]] = successors[order]
        self.owners[targets] = self._owner(request_id)

    def _values(self) -> FloatArray:
        """[N] float32: probability that each template node's path is accepted, from what was measured."""
        rates = (self.hits + _PRIOR_TRIES * _prior_rates()) / (self.tries + _PRIOR_TRIES)
        values = np.ones(len(rates), np.float32)
        for level in TEMPLATE.levels[1:]:
            values[level] = values[TEMPLATE.parents[level]] * rates[level]
        return values

    def fill(self, root: int, budget: int) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
        """The template filled from a root token.

        Args:
            root: token id.
            budget: most nodes below the root; the likeliest are taken.

        Returns:
            Tokens, parents and values of the tree, and the template node of each.
        """
        self._reach(root)
        values = self._values()
        tokens = np.full(len(values), _UNSEEN, np.int32)
        tokens[0] = root
        for level in TEMPLATE.levels[1:]:
            above = tokens[TEMPLATE.parents[level]]
            known = (above >= 0) & (above < len(self.rows))
            tokens[level] = np.where(known, self.rows[np.where(known, above, 0), TEMPLATE.ranks[level]], _UNSEEN)
        seen = np.flatnonzero(tokens[1:] >= 0) + 1
        # Values fall along every path, so the best nodes are closed under parents; ties go to the parent.
        chosen = np.sort(seen[np.lexsort((seen, -values[seen]))][: max(budget, 0)])
        nodes = np.concatenate([[0], chosen]).astype(np.int32)
        number = np.zeros(len(values), np.int32)
        number[nodes] = np.arange(len(nodes))
        parents = number[TEMPLATE.parents[nodes]]
        parents[0] = -1
        return tokens[nodes], parents, values[nodes], nodes

    def count(self, nodes: IntArray, parents: IntArray, accepted: Sequence[int]) -> None:
        """Note which template nodes were right, of those whose parents were."""
        on_path = np.zeros(len(nodes), bool)
        on_path[[0, *accepted]] = True
        tried = np.flatnonzero(on_path[parents[1:]]) + 1
        self.tries[nodes[tried]] += 1
        self.hits[nodes[tried[on_path[tried]]]] += 1
        self.tries *= np.float32(0.999)  # half of an observation is forgotten after 700 steps
        self.hits *= np.float32(0.999)

    def forget(self, request_id: str) -> bool:
        """Clear the rows that a request wrote last; False if it wrote none."""
        owner = self.owner_numbers.pop(request_id, None)
        if owner is None:
            return False
        self.rows[self.owners == owner] = _UNSEEN
        self.owners[self.owners == owner] = 0
        return True

    def arrays(self) -> dict[str, np.ndarray]:
        """What must be saved, by name."""
        return {"rows": self.rows, "owners": self.owners, "tries": self.tries, "hits": self.hits}

    def restore(self, owner_numbers: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
        """Become the saved table."""
        self.rows, self.owners = arrays["rows"], arrays["owners"]
        self.tries, self.hits = arrays["tries"], arrays["hits"]
        self.owner_numbers = dict(owner_numbers)
