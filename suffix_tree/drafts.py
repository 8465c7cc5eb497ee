"""The drafts of a batch, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.memory import Int32Array, Int64Array

__all__ = ["Drafts"]


@dataclass(frozen=True, slots=True, eq=False)
class Drafts:
    """The drafts of a batch, one after the other, each with a root in front (token 0, parent -1, value 1).

    Args:
        offsets: [R + 1] int64: draft r is ``[offsets[r], offsets[r + 1])`` of the arrays below.
        token_ids: [T] int32.
        parents: [T] int32, counted from the draft's own root.
        values: [T] float32: calibrated probability that the path to the node is accepted.
    """

    offsets: Int64Array
    token_ids: Int32Array
    parents: Int32Array
    values: npt.NDArray[np.float32]
