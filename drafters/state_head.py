"""What a head must offer that drafts from the target's states: its attention calls, and one pass over new rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from specdec.kv_cache import CallShape, GroupKey

__all__ = ["Attend", "HeadCall", "StateHead"]

# (query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv], scaling, softcap, sinks) -> [1, T, Hq, Dv]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float | None, float | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One attention call of a pass of a head.

    Args:
        group: which keys a query sees.
        shape: of a row's key and value.
        num_query_groups: query heads per KV head.
    """

    group: GroupKey
    shape: CallShape
    num_query_groups: int


class StateHead(Protocol):
    """A head whose row t pairs the target's state at token t with token t + 1."""

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """States that it reads, as indices into ``output_hidden_states``."""

    @property
    def width(self) -> int:
        """H."""

    @property
    def calls(self) -> tuple[HeadCall, ...]:
        """The attention calls of a pass, in order."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Tensors that may be overwritten while the head serves, by name."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its keys and values."""

    @property
    def target_ids(self) -> Tensor | None:
        """[D] int64: the target's id of every draft id; None: they are the same."""

    def pack(self) -> None:
        """Compute from packed copies of the weights from now on, where that pays: no gradients any more."""

    def fuse(self, states: Tensor) -> Tensor:
        """[T, H] inputs from the target's states [T, layers * E] at the same tokens."""

    def forward(self, token_ids: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[T, H] outputs from tokens [T] int64, fused states or fed-back outputs [T, H], and positions [T] of rows."""

    def feedback(self, outputs: Tensor) -> Tensor:
        """[T, H]: the states of the next level from the outputs of this one."""

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, D] over the head's own vocabulary."""
