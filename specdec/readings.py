"""What drafters may read of the target beside the logits of their trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from specdec.errors import InternalError
from specdec.tree import IntArray

if TYPE_CHECKING:
    import torch

    from specdec.device_work import LateCopy

__all__ = ["HiddenStates", "LateSuccessors", "Successors"]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenStates:
    """States of some of the target's layers at n tokens. Several drafters may have asked; each takes its own by name.

    Args:
        layers: L indices into ``output_hidden_states``, all different: 0 is the embedding, i what layer i - 1 put out,
            the last one is normed, as the head reads it.
        rows: [n, L * E] in the model's dtype: the layers side by side, in the order of ``layers``.
    """

    layers: tuple[int, ...]
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, layers: Sequence[int]) -> torch.Tensor:
        """[n, len(layers) * E]: the states of these layers, side by side.

        Raises:
            InternalError: nobody asked for one of them.
        """
        if tuple(layers) == self.layers:
            return self.rows
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise InternalError(f"states {missing} are read, but only {list(self.layers)} were asked for")
        by_layer: torch.Tensor = self.rows.unflatten(-1, (len(self.layers), -1))  # [n, L, E]
        chosen: torch.Tensor = by_layer[:, [self.layers.index(layer) for layer in layers]].flatten(1)
        return chosen

    def at(self, places: Sequence[int]) -> HiddenStates:
        """The states at some of the tokens."""
        return HiddenStates(self.layers, self.rows[list(places)])


@dataclass(frozen=True, slots=True, eq=False)
class Successors:
    """What the target finds likeliest after each different token of a chunk's prefix, where it stands last.

    Args:
        token_ids: [D] int32, all different.
        next_ids: [D, k] int32: the k likeliest next tokens after each, best first.
    """

    token_ids: IntArray
    next_ids: IntArray


class LateSuccessors(Sequence[Successors]):
    """The successors of every chunk of a step, read from the device once somebody looks.

    Args:
        token_ids: by chunk, [D] int32.
        next_ids: [n, k], of which the last rows are the chunks', one after the other.
    """

    def __init__(self, token_ids: Sequence[IntArray], next_ids: LateCopy) -> None:
        self._token_ids, self._next_ids = token_ids, next_ids

    @cached_property
    def _parts(self) -> list[Successors]:
        ends = np.cumsum([len(ids) for ids in self._token_ids])
        rows = self._next_ids.read()
        parts = np.split(rows[len(rows) - ends[-1] :], ends[:-1])
        return [Successors(ids, part) for ids, part in zip(self._token_ids, parts, strict=True)]

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, index: int) -> Successors: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Successors]: ...
    def __getitem__(self, index: int | slice) -> Successors | Sequence[Successors]:
        return self._parts[index]
