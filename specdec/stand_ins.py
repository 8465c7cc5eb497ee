"""Layers of a model replaced by ones that compute the same, for as long as somebody holds them.

A stand-in owns the parameters of the layer that it stands for, under the same names. A copy of a model with stand-ins
is an ordinary model, and when the last holder lets go, the layers are back, the same objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedError

__all__ = ["StandIn", "children", "is_free", "let_go"]


class StandIn(nn.Module):
    """Stands in for a layer.

    Args:
        layer: what it stands for.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.holders: set[Hashable] = set()
        self._hidden = (layer,)  # in a tuple, so that it is no submodule

    def restored(self) -> nn.Module:
        """The layer, everything in place again."""
        return self._hidden[0]

    def let_go(self, holders: set[Hashable]) -> None:
        """Some hold it no longer."""
        self.holders -= holders

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of a model with stand-ins is an ordinary one."""
        return copy.deepcopy(self._hidden[0], memo)

    def _load_from_state_dict(self, *_: Any) -> None:
        raise UnsupportedError("weights cannot be loaded into a packed model: close its engines, or unpack_linears(it)")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        weight = next(iter(self._parameters.values()))
        assert weight is not None
        before = torch.empty(1, dtype=weight.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise UnsupportedError(
                f"packed weights cannot become {after.dtype} on {after.device}: close the model's engines first, "
                "or unpack_linears(it)"
            )
        return self


def children(model: nn.Module, kind: type[Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, child) of every place that holds a layer of ``kind``; for torch's own kinds exactly that class."""
    is_exact = kind in (nn.Linear, nn.Embedding)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if type(child) is kind if is_exact else isinstance(child, kind):
                yield parent, name, child


def is_free(layer: nn.Module) -> bool:
    """True if nobody watches the layer, or has put a forward or a kind of weight of their own into it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # Quantised and tensor-parallel weights are tensors of their own kind, under an ordinary layer.
    is_ordinary = all(type(parameter.data) is torch.Tensor for parameter in layer.parameters(recurse=False))
    return not any(hooks) and "forward" not in layer.__dict__ and is_ordinary


def let_go(model: nn.Module, holder: Hashable | None) -> None:
    """Restore every layer whose stand-in nobody but ``holder`` holds; None: all of them."""
    places = [(parent, name) for parent, name, _ in children(model, StandIn)]
    for parent, name in places:  # one at a time, so that only one weight is there twice
        stand_in = parent._modules[name]
        assert isinstance(stand_in, StandIn)
        stand_in.let_go(set(stand_in.holders) if holder is None else {holder})
        if not stand_in.holders:
            setattr(parent, name, stand_in.restored())
