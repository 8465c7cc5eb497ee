"""Several processes that hold one tensor-parallel model must take the same steps: rank 0 decides what is drafted.

Each rank runs an engine of its own over the same requests, in the same order. Logits are the same on all of them after
the model's own reductions, so are verification and scheduling. What a clock or the memory of one machine could change
is taken from rank 0: budgets, drafts, and the size of the KV pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed

from specdec.protocols import Controller, Load
from specdec.types import DraftTree, RequestState, StepEvent

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AgreedController", "from_rank_0", "is_spread"]

_T = TypeVar("_T")


def is_spread(model: nn.Module) -> bool:
    """True if the model's parameters are shared out among the ranks of this process's group."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def from_rank_0(value: _T) -> _T:
    """Rank 0's value, on every rank."""
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


class AgreedController:
    """A controller whose budgets and admitted drafts are rank 0's (`specdec.protocols.Controller`).

    Drafters run on every rank, for they may compute in parallel themselves; what the others guess is not used.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        return from_rank_0(self._controller.plan(states, load))

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return from_rank_0(self._controller.admit(states, trees))

    def observe(self, events: Sequence[StepEvent]) -> None:
        self._controller.observe(events)
