"""The draft tree: what a drafter hands over and a verifier walks. Part of the words in ``specdec.types``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["DraftTree", "FloatArray", "IntArray"]

IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]


class DraftTree:
    """One request's guesses for one step.

    Args:
        token_ids: [N] int32; ``token_ids[0]`` is the root.
        parents: [N] int32; ``parents[0] = -1`` and ``parents[i] < i``. Siblings carry different tokens, unless
            ``draft_probs`` says that they were drawn: with replacement, equal draws are nodes of their own.
        values: [N] float32: calibrated probability that the path to the node is accepted; ``values[0] = 1``.
        sources: [N] uint8: which drafter proposed the node (0 = the only one).
        draft_probs: [N, V] or None: row i is q over the children of node i. Only the rejection rules read it.
    """

    __slots__ = ("draft_probs", "parents", "sources", "token_ids", "values")

    def __init__(
        self,
        token_ids: IntArray,
        parents: IntArray,
        values: FloatArray | None = None,
        sources: npt.NDArray[np.uint8] | None = None,
        draft_probs: torch.Tensor | None = None,
    ) -> None:
        self.token_ids = token_ids
        self.parents = parents
        self.values = values
        self.sources = sources
        self.draft_probs = draft_probs

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_draft_tokens(self) -> int:
        """Nodes without the root."""
        return len(self.token_ids) - 1

    @classmethod
    def root_only(cls, root: int) -> DraftTree:
        """The tree of plain decoding: no guess at all."""
        return cls(np.array([root], dtype=np.int32), np.array([-1], dtype=np.int32))

    @classmethod
    def chain(cls, root: int, draft_ids: Sequence[int] | IntArray) -> DraftTree:
        """A tree without branches: ``draft_ids`` one after the other."""
        token_ids = np.empty(len(draft_ids) + 1, dtype=np.int32)
        token_ids[0] = root
        token_ids[1:] = draft_ids
        return cls(token_ids, np.arange(-1, len(draft_ids), dtype=np.int32))

    def depths(self) -> IntArray:
        """[N] int32: distance of every node from the root."""
        depths = np.zeros(len(self), dtype=np.int32)
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def path(self, node: int) -> list[int]:
        """The nodes from the root to ``node``, both included."""
        nodes = [node]
        while (node := int(self.parents[node])) >= 0:
            nodes.append(node)
        return nodes[::-1]

    def ancestor_mask(self) -> npt.NDArray[np.bool_]:
        """[N, N] bool: entry (i, j) is True if j is i or an ancestor of i."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask

    @property
    def is_chain(self) -> bool:
        """True if no node has two children."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    def to_chain(self) -> DraftTree:
        """The chain from the root that follows the best-valued child.

        Without values, or where the tree states draft laws, it follows the first child: the first draw is an honest
        draw, while the best of several draws is not.
        """
        if self.is_chain:
            return self
        best: dict[int, int] = {}
        for node in range(1, len(self)):
            parent = int(self.parents[node])
            rival = best.get(parent)
            if rival is None or (
                self.values is not None and self.draft_probs is None and self.values[node] > self.values[rival]
            ):
                best[parent] = node
        nodes = [0]
        while nodes[-1] in best:
            nodes.append(best[nodes[-1]])
        return self.subtree(np.array(nodes))

    def subtree(self, nodes: npt.NDArray[np.integer]) -> DraftTree:
        """The tree of some nodes: ascending, the root first, each with its parent."""
        number = np.full(len(self) + 1, -1, dtype=np.int32)  # the last entry is that of parent -1
        number[nodes] = np.arange(len(nodes), dtype=np.int32)
        values = None if self.values is None else self.values[nodes]
        sources = None if self.sources is None else self.sources[nodes]
        probs = None if self.draft_probs is None else self.draft_probs[nodes]
        return DraftTree(self.token_ids[nodes], number[self.parents[nodes]], values, sources, probs)

    def check(self, vocab_size: int) -> None:
        """Raise ``ValueError`` unless every rule of the class docstring holds. For tests and for foreign drafters."""
        if len(self) < 1 or self.parents.shape != self.token_ids.shape or self.parents[0] != -1:
            raise ValueError("a tree needs a root with parents[0] = -1 and as many parents as token_ids")
        if not (self.parents < np.arange(len(self))).all() or (self.parents[1:] < 0).any():
            raise ValueError(f"parents must satisfy 0 <= parents[i] < i, got {self.parents.tolist()}")
        if (self.token_ids < 0).any() or (self.token_ids >= vocab_size).any():
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {self.token_ids.tolist()}")
        for name, values in (("values", self.values), ("sources", self.sources), ("draft_probs", self.draft_probs)):
            if values is not None and len(values) != len(self):
                raise ValueError(f"{name} must have one row per node, got {len(values)} for {len(self)} nodes")
        if self.values is not None and not (self.values[0] == 1 and ((self.values >= 0) & (self.values <= 1)).all()):
            raise ValueError(f"values must be in [0, 1] and 1 at the root, got {self.values.tolist()}")
        edges = {(int(p), int(t)) for p, t in zip(self.parents[1:], self.token_ids[1:], strict=True)}
        if len(edges) != self.num_draft_tokens and self.draft_probs is None:
            raise ValueError("siblings must carry different tokens")
