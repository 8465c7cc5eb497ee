"""Where a model runs: on the device of its weights, or where accelerate brings them for each layer's turn.

A model that `device_map` has spread over memory and disk (offloaded weights are on the meta device between their turns)
runs on one device all the same, and is served like any other. One whose layers *run* on several devices is not: queries
would come from each of them to one KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedError

__all__ = ["device_of", "is_offloaded"]


def device_of(model: nn.Module) -> torch.device:
    """The one device on which the model's layers run and its inputs must be.

    Raises:
        UnsupportedError: there are several; the message names them.
    """
    places = {torch.device(hook.execution_device) for hook in _hooks(model) if hook.execution_device is not None}
    if not places or not is_offloaded(model):
        places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1:
        named = ", ".join(sorted(map(str, places))) or "none"
        raise UnsupportedError(
            f"the layers of {type(model).__name__} must run on one device, got {named}: load it onto one "
            "(offloading to memory or disk is no obstacle), or share it out by tp_plan under torchrun"
        )
    return places.pop()


def is_offloaded(model: nn.Module) -> bool:
    """True if accelerate brings weights to their device for each layer's turn only."""
    return any(getattr(hook, "offload", False) for hook in _hooks(model))


def _hooks(model: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks that know a device."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if hasattr(one, "execution_device"):
                yield one
