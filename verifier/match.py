"""The match rule: what the target draws itself decides, and a draft token counts only if it equals that draw.

At every node the target's token is drawn from its own law (the caller's sampler does that for all nodes at once). The
walk starts at the root: a child that carries the drawn token is accepted and the walk goes on from it; if there is
none, the drawn token is the bonus token. So each emitted token is a plain draw of the target, and no draft process
whatsoever (retrieved, pruned, fused, dynamic, hostile) can bias the text. For deterministic drafts its law and its mean
acceptance equal those of testing the children one after the other with removal (Leviathan et al. 2023, section 2.3,
with q a point mass).

This module does not draw: see `specdec.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numba import njit

from specdec.errors import InternalError
from specdec.protocols import Draws
from specdec.types import DraftTree, IntArray, RequestState, TargetOutput, VerifyResult

__all__ = ["LaunchingSampler", "MatchVerifier", "TargetSampler", "match_walk"]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def match_walk(
    target_ids: IntArray, token_ids: IntArray, parents: IntArray, cu_nodes: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """The accepted path of every tree of a flat batch, and the token after it.

    A child always has a larger index than its parent, so one pass over the nodes finds the path.

    Args:
        target_ids: [T] int32: the target's own token after each node.
        token_ids: [T] int32: the trees one after the other, root first; ``token_ids`` of roots are not read.
        parents: [T] int32: indices within the node's own tree, less than the node's own index.
        cu_nodes: [R + 1] int32 with a leading zero: tree r owns rows ``cu_nodes[r]`` to ``cu_nodes[r + 1]``.

    Returns:
        Accepted nodes [sum of A] int32, indices within their own tree, root excluded, in path order;
        cu_accepted [R + 1] int32 with a leading zero; bonus_ids [R] int32.

    Example:
        >>> #        root 7 -> 1 -> 2         the target wants 1 after the root, 5 after that
        >>> #               -> 3
        >>> ids = lambda *values: np.array(values, dtype=np.int32)
        >>> nodes, cu_accepted, bonus_ids = match_walk(ids(1, 5, 0, 0), ids(7, 1, 3, 2), ids(-1, 0, 0, 1), ids(0, 4))
        >>> nodes.tolist(), cu_accepted.tolist(), bonus_ids.tolist()
        ([1], [0, 1], [5])
    """
    num_trees = len(cu_nodes) - 1
    nodes = np.empty(len(token_ids), dtype=np.int32)
    cu_accepted = np.zeros(num_trees + 1, dtype=np.int32)
    bonus_ids = np.empty(num_trees, dtype=np.int32)
    num_accepted = 0
    for tree in range(num_trees):
        first = cu_nodes[tree]
        node = 0
        wanted = target_ids[first]
        for child in range(1, cu_nodes[tree + 1] - first):
            if parents[first + child] == node and token_ids[first + child] == wanted:
                nodes[num_accepted] = child
                num_accepted += 1
                node = child
                wanted = target_ids[first + child]
        cu_accepted[tree + 1] = num_accepted
        bonus_ids[tree] = wanted
    return nodes[:num_accepted], cu_accepted, bonus_ids


class TargetSampler(Protocol):
    """Draws the target's own token at every node of a batch of trees."""

    def start(self, state: RequestState) -> None:
        """Take up a request."""

    def target_ids(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> IntArray:
        """[T] int32: the target's token after every node, in the order of ``output.logits``."""

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        """Follow a request's committed tokens."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


@runtime_checkable
class LaunchingSampler(TargetSampler, Protocol):
    """A sampler on a device that works on its own."""

    def launch(
        self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
    ) -> Callable[[], IntArray]:
        """Start to draw; what is returned waits for ``target_ids``."""


class MatchVerifier:
    """Keeps of each tree the path that the target would have written itself (`specdec.protocols.Verifier`).

    Args:
        sampler: draws the target's tokens.
    """

    draws: frozenset[Draws] | None = None  # any draft will do
    is_lossless = True

    def __init__(self, sampler: TargetSampler) -> None:
        self._sampler = sampler
        # Asked once: a protocol's members are looked up anew at every isinstance.
        self._launch = sampler.launch if isinstance(sampler, LaunchingSampler) else None

    def start(self, state: RequestState) -> None:
        self._sampler.start(state)

    def verify(
        self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
    ) -> list[VerifyResult]:
        if not trees:
            return []
        sampler = self._sampler
        launched = self._launch(states, trees, output) if self._launch is not None else None
        # From here to the wait the host works while the device does.
        token_ids = np.concatenate([tree.token_ids for tree in trees])  # [T]
        parents = np.concatenate([tree.parents for tree in trees])  # [T]
        # The walk runs without bounds checks, so its lengths must agree before it starts.
        num_nodes, num_trees = int(output.cu_nodes[-1]), len(output.cu_nodes) - 1
        target_ids = launched() if launched is not None else sampler.target_ids(states, trees, output)
        if not len(target_ids) == len(token_ids) == len(parents) == num_nodes or len(trees) != num_trees:
            raise InternalError(
                f"the target scored {num_nodes} nodes of {num_trees} trees, the sampler drew {len(target_ids)} tokens, "
                f"and {len(trees)} trees with {len(token_ids)} nodes were to be verified"
            )
        nodes, cu_accepted, bonus_ids = match_walk(target_ids, token_ids, parents, output.cu_nodes)
        results = []
        first = 0
        for tree, last, bonus_id in zip(trees, cu_accepted[1:].tolist(), bonus_ids.tolist(), strict=True):
            accepted = nodes[first:last]
            results.append(VerifyResult(accepted, tree.token_ids[accepted], bonus_id))
            first = last
        return results

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        self._sampler.commit(state, emitted_ids)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._sampler.stop(request_ids)

    def warmup(self) -> None:
        """Compile the walk, so that no request waits for it."""
        one = np.zeros(1, dtype=np.int32)
        match_walk(one, one, one, np.array([0, 1], dtype=np.int32))
