"""Where a model runs: on the device of its weights, or where accelerate brings them for each layer's turn.

A model that `device_map` has spread over memory and disk (offloaded weights are on the meta device between their turns)
runs on one device all the same, and is served like any other. One whose layers *run* on several devices takes its
inputs and gives its logits on one of them, the main device; accelerate's hooks carry the states from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedError

__all__ = ["device_of", "is_offloaded", "is_split"]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's inputs and logits: that of its layers, or the main one of several.

    Raises:
        UnsupportedError: its layers run on several devices and nothing carries states between them; the message names
            them.
    """
    places = _places(model)
    if len(places) > 1:
        for hook in _hooks_of(model):
            if getattr(hook, "io_same_device", False) and hook.execution_device is not None and _is_dispatched(model):
                return torch.device(hook.execution_device)
    if len(places) != 1:
        named = ", ".join(sorted(map(str, places))) or "none"
        raise UnsupportedError(
            f"the layers of {type(model).__name__} must run on one device, got {named}: load it onto one "
            "(offloading to memory or disk is no obstacle), load it by device_map, or share it out by tp_plan under "
            "torchrun"
        )
    return places.pop()


def is_split(model: nn.Module) -> bool:
    """True if the model's layers run on several devices."""
    return len(_places(model)) > 1


def is_offloaded(model: nn.Module) -> bool:
    """True if accelerate brings weights to their device for each layer's turn only."""
    return any(getattr(hook, "offload", False) for hook in _hooks(model))


def _places(model: nn.Module) -> set[torch.device]:
    """Where the layers run."""
    places = {torch.device(hook.execution_device) for hook in _hooks(model) if hook.execution_device is not None}
    if not places or not is_offloaded(model):
        places = {parameter.device for parameter in model.parameters()}
    return places


def _is_dispatched(model: nn.Module) -> bool:
    """True if accelerate's hooks move what comes in to each of the blocks that it has placed."""
    return bool(getattr(model, "hf_device_map", None))


def _hooks(model: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks that know a device."""
    for module in model.modules():
        yield from _hooks_of(module)


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device"):
            yield one
