"""Which causal law a mask predicate of transformers follows, found by evaluating it.

| law | a query sees the keys with |
| --- | --- |
| full | ``key <= query`` |
| sliding W | ``query - W < key <= query`` |
| chunked C | ``key <= query`` and ``key // C == query // C`` |
| other | none of these |
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

__all__ = ["MaskKind", "MaskPredicate", "classify"]

logger = logging.getLogger(__name__)

MaskKind: TypeAlias = Literal["full", "sliding", "chunked", "other"]
# (batch, head, query, key) index tensors that broadcast against each other -> bool, True where the key is visible.
MaskPredicate: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NUM_NEAR = 64  # positions 0..63 are compared densely, far positions by single rows


def _rows(predicate: MaskPredicate, queries: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[Q, num_keys] bool: which keys each query sees."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=queries.device)
    keys = torch.arange(num_keys, device=queries.device)
    seen = torch.as_tensor(predicate(zero, zero, queries[None, None, :, None], keys[None, None, None, :]))
    return seen.to(queries.device, torch.bool).expand(1, 1, len(queries), num_keys)[0, 0]


def _law(kind: MaskKind, window: int | None, queries: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[Q, num_keys] bool: what a query sees under the laws "full", "sliding" and "chunked"."""
    keys = torch.arange(num_keys, device=queries.device)[None]
    queries = queries[:, None]
    seen = keys <= queries
    if window is None:
        return seen
    if kind == "sliding":
        return seen & (keys > queries - window)
    return seen & (keys // window == queries // window)


def classify(predicate: MaskPredicate, limit: int, device: torch.device) -> tuple[MaskKind, int | None]:
    """The law that a predicate follows at positions below ``limit``, found on a few rows and checked on all of them.

    Args:
        predicate: which keys a query sees.
        limit: positions below it matter (>= 2); a longer window or chunk is the same as full attention.
        device: to evaluate on; predicates may hold tensors of the model's device.

    Returns:
        The kind, and W of "sliding" or C of "chunked".

    The first key that the last query sees gives W (sliding) or the start of its chunk; the query before that start
    then gives the start of the previous chunk, and the difference is C.
    """
    last = limit - 1
    far = torch.tensor(sorted({last, max(last - 1, 0), last // 2, last // 3}), device=device)
    near = torch.arange(min(_NUM_NEAR, limit), device=device)
    try:
        far_seen = _rows(predicate, far, limit + 1)
        near_seen = _rows(predicate, near, len(near) + 1)
        first = int(far_seen[-1].int().argmax())
        candidates: list[tuple[MaskKind, int | None]] = [("full", None), ("sliding", limit - first)]
        if first > 0:
            before = _rows(predicate, torch.tensor([first - 1], device=device), first)[0]
            candidates.append(("chunked", first - int(before.int().argmax())))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        # Predicates that look tables up by index, or branch on a value, only work for the tokens they were made for.
        logger.debug("the mask predicate cannot be evaluated away from its own tokens: %s", error)
        return "other", None
    for kind, window in candidates:
        if torch.equal(_law(kind, window, far, limit + 1), far_seen) and torch.equal(
            _law(kind, window, near, len(near) + 1), near_seen
        ):
            return kind, window
    return "other", None
