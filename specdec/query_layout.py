"""Where one request's query tokens lie in a step, and which of them each one sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["QueryLayout"]


@dataclass(frozen=True, slots=True, eq=False)
class QueryLayout:
    """One request's query tokens within the flat row of a step.

    Args:
        request_id: whose tokens.
        start: index of the first in the flat row.
        num_tokens: how many.
        num_cached: context length; the position of the first token after it.
        positions: [E + num_tokens] int64: absolute, of the tokens after the context.
        ancestors: [num_tokens, E + num_tokens] bool: (i, j) is True if j is query i or an ancestor of it.
        num_earlier: E: tokens after the context whose K/V earlier forwards of this step wrote, in the reserved slots
            before the query tokens'. Drafters grow trees like this; a target has none.
    """

    request_id: str
    start: int
    num_tokens: int
    num_cached: int
    positions: npt.NDArray[np.int64]
    ancestors: npt.NDArray[np.bool_]
    num_earlier: int = 0
