"""What the host must know of a device that works on its own: when a copy has arrived, and how long a launch ran.

On a CPU everything is done when its call returns; a copy is none, and a time is a wall clock's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from specdec.types import IntArray

__all__ = ["Clock", "DeviceClock", "HostCopy", "LateCopy", "start_copy"]

HostCopy: TypeAlias = Callable[[], IntArray]  # waits for the copy; the values


def start_copy(ids: Tensor) -> HostCopy:
    """Bring [n] integers to the host as int32, in pinned memory and without waiting.

    The values are read by calling what is returned, which waits for this copy and for nothing that is launched later.
    """
    if not ids.is_cuda:
        values: IntArray = ids.to("cpu", torch.int32).numpy()
        return lambda: values
    on_host = torch.empty(ids.shape, dtype=torch.int32, pin_memory=True)  # from torch's cache of such memory
    on_host.copy_(ids, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(ids.device))

    def wait() -> IntArray:
        arrived.synchronize()
        return on_host.numpy()

    return wait


class LateCopy:
    """Integers that wait on the device for somebody else's copy, so that a step needs one only.

    Args:
        values: int32 of any shape.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._on_host: IntArray | None = None

    def ride(self, ids: Tensor, copy: Callable[[Tensor], HostCopy]) -> HostCopy:
        """Start one copy of ``ids`` [n] and of these values; what is returned waits for it and gives the ids."""
        both = copy(torch.cat((ids.to(torch.int32), self._values.flatten())))

        def wait() -> IntArray:
            values = both()
            self._on_host = values[len(ids) :].reshape(self._values.shape)
            return values[: len(ids)]

        return wait

    def read(self) -> IntArray:
        """The values; where nobody took them along, by a copy of their own."""
        if self._on_host is None:
            self._on_host = start_copy(self._values.flatten())().reshape(self._values.shape)
        return self._on_host


class Clock(Protocol):
    """Times what happens between two marks."""

    def mark(self) -> Any:
        """A point in the order of work."""

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks that are both behind."""


class DeviceClock:
    """A clock of one device: of its own time where it has one, else of the wall's (`Clock`).

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def ms(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return 1e3 * float(end - begin)
        return float(begin.elapsed_time(end))
