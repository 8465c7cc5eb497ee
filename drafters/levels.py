"""Grows the trees of a batch level by level with whatever scores nodes, for the match rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, from_numpy, stack, tensor

from specdec.drafters.growing import Growth
from specdec.drafters.tree_search import Frontier, TreeSearch
from specdec.kernels.launch import Backend, uses_triton
from specdec.rng import TARGET, gumbel
from specdec.types import DraftTree, RequestState

__all__ = ["MAX_KERNEL_K", "Scores", "Words", "best_children", "pack_best", "search_trees"]

MAX_KERNEL_K = 64  # ``specdec.kernels.top_k.MAX_K``, without importing Triton
_BLOCK = 128  # columns; of the sizes that were timed for 32,000 to 150,000 columns the fastest


class Scores(NamedTuple):
    """What a drafter finds after M nodes.

    Args:
        logits: [M, D].
        best: [M, 2, K] of ``pack_best``, where the forward has found them already; None: they are looked for.
    """

    logits: Tensor
    best: Tensor | None = None


# (new nodes by request, for each of them the rows of the last logits that their parents are) -> their scores, or None
Grow: TypeAlias = Callable[[Sequence[Growth], npt.NDArray[np.int64]], Tensor | Scores | None]


class Words:
    """The words of a drafter that knows only some of the target's.

    Args:
        target_ids: [D] int64: the target's id of each.
        vocab_size: V of the target.
    """

    def __init__(self, target_ids: Tensor, vocab_size: int) -> None:
        self.target_ids, self.vocab_size = target_ids, vocab_size
        self.ids = target_ids.cpu().numpy()


def pack_best(logits: Tensor, count: int, *, backend: Backend = "auto") -> Tensor:
    """The likeliest tokens of every row by the top-k kernel, in one tensor that goes to the host in one copy.

    Args:
        logits: [M, D].
        count: K, at most the kernel's ``MAX_K``.
        backend: see ``uses_triton``.

    Returns:
        [M, 2, K] float64: ids, best first, and the logs of their chances.
    """
    from specdec.kernels.top_k import top_k  # imports Triton, which is not everywhere

    return stack([part.double() for part in top_k(logits, count, backend=backend)], 1)


def best_children(
    logits: Tensor,
    states: Sequence[RequestState],
    depths: Sequence[int],
    count: int,
    words: Words | None = None,
    *,
    best: Tensor | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The likeliest tokens of the target after some draft nodes, as far as a draft model can tell.

    Args:
        logits: [M, D] of the drafter, one row per node.
        states: M: whose node each is.
        depths: M: of the children, 1 = the children of the root.
        count: K.
        words: what the columns of ``logits`` stand for; None: the target's ids.
        best: [M, 2, K] of ``pack_best``, where it is known already; sampled requests add noise before they choose.

    Returns:
        Token ids [M, K] int64, best first, and the log of their chances [M, K] float64.
    """
    count = min(count, logits.shape[1])
    sampled = [row for row, state in enumerate(states) if not state.request.sampling.is_greedy]
    if not sampled and (best is not None or _has_kernel(logits, count)):
        found = (pack_best(logits, count) if best is None else best).cpu().numpy()
        ids, log_probs = found[:, 0].astype(np.int64), found[:, 1]
        return ids if words is None else words.ids[ids], log_probs
    scores = logits.float()
    if sampled:
        seeds = np.array([states[row].request.sampling.seed for row in sampled], dtype=np.uint64)
        places = np.array([states[row].num_tokens + depths[row] - 1 for row in sampled], dtype=np.uint64)
        keys, which = np.unique(np.stack([seeds, places]), axis=1, return_inverse=True)  # nodes of a level share noise
        num_words = scores.shape[1] if words is None else words.vocab_size
        noise = gumbel(keys[0], keys[1], num_words, device=scores.device, stream=TARGET)
        noise = noise if words is None else noise[:, words.target_ids]
        heat = tensor([states[row].request.sampling.temperature for row in sampled], device=scores.device)
        scores = scores.clone()
        scores[sampled] = scores[sampled] / heat[:, None] + noise[from_numpy(which.ravel()).to(scores.device)]
    log_probs, ids = _largest(scores.log_softmax(dim=-1), count)
    return ids if words is None else words.ids[ids], log_probs.astype(np.float64)


def _has_kernel(logits: Tensor, count: int) -> bool:
    """True if the top-k kernel is there for such rows."""
    return count <= MAX_KERNEL_K and logits.dtype.itemsize <= 4 and uses_triton("auto", logits.device)


def _largest(rows: Tensor, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values and indices of ``rows.topk(count)``, [M, K]; of wide rows on a CPU sooner: only the best blocks count.

    The ``count`` largest values lie in ``count`` blocks whose maxima no other block's exceeds.
    """
    num_blocks, rest = divmod(rows.shape[1], _BLOCK)
    if rows.device.type != "cpu" or rest or num_blocks < 4 * count:
        whole = rows.topk(count, dim=-1)
        if rows.device.type == "cpu":
            return whole.values.numpy(), whole.indices.numpy()
        both = stack((whole.values.double(), whole.indices.double())).cpu().numpy()  # in one copy
        return both[0], both[1].astype(np.int64)
    blocks = rows.unflatten(1, (num_blocks, _BLOCK))
    chosen = blocks.amax(dim=-1).topk(count, dim=-1, sorted=False).indices  # [M, K]
    kept = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, _BLOCK)).flatten(1)
    best = kept.topk(count, dim=-1)
    block, place = np.divmod(best.indices.numpy(), _BLOCK)
    return best.values.numpy(), chosen.numpy()[np.arange(len(rows))[:, None], block] * _BLOCK + place


def search_trees(
    states: Sequence[RequestState],
    searches: Sequence[TreeSearch],
    scores: Tensor | Scores,
    top_k: int,
    grow: Grow,
    words: Words | None = None,
) -> list[DraftTree]:
    """Run the searches of a batch side by side: each level of all of them is one call of ``grow``.

    Args:
        states: R requests.
        searches: theirs, untouched.
        scores: logits [R, V] after their roots, or more of them.
        top_k: children per node.
        grow: scores new nodes; None ends all searches.
        words: what the columns of all logits stand for; None: the target's ids.
    """
    logits, best = scores if isinstance(scores, Scores) else (scores, None)
    growing = list(range(len(states)))
    num_grown = [0] * len(states)  # nodes that were scored
    sizes = [1] * len(states)  # rows of ``logits`` by request
    depth = 1
    while growing:
        owners = [states[one] for one in growing for _ in range(sizes[one])]
        ids, log_probs = best_children(logits, owners, [depth] * len(owners), top_k, words, best=best)
        frontiers: dict[int, tuple[Frontier, int]] = {}
        start = 0
        for one in growing:
            rows = slice(start, start + sizes[one])
            frontier = searches[one].add(ids[rows], log_probs[rows])
            if frontier is not None:
                frontiers[one] = frontier, start
            start += sizes[one]
        growths, parent_rows = [], []
        for one, (frontier, first_row) in frontiers.items():
            before = num_grown[one] - sizes[one]  # where the nodes of the frontier's parents begin
            parents = frontier.parents + before if depth > 1 else frontier.parents
            growths.append(Growth(states[one].request_id, frontier.token_ids, parents))
            parent_rows.append(first_row + np.maximum(frontier.parents, 0))
            sizes[one] = len(frontier.token_ids)
            num_grown[one] += sizes[one]
        growing = list(frontiers)
        new = grow(growths, np.concatenate(parent_rows).astype(np.int64)) if growths else None
        if new is None:
            break
        logits, best = new if isinstance(new, Scores) else (new, None)
        depth += 1
    return [search.tree() for search in searches]
