"""Times launches on a device, each from a cold cache: what a layer meets whose neighbours' weights went through before.

On a CPU the same functions run with the interpreter and a wall clock, so that a mistake in a benchmark shows up without
a GPU; those times mean nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

__all__ = ["Clock"]

_FLUSH_BYTES = 256 * 2**20  # more than any level-2 cache


class Clock:
    """Milliseconds of work on one device.

    Args:
        device: a CUDA device, or the CPU.
        repeats: timed runs of each piece of work, after two untimed ones.
    """

    def __init__(self, device: torch.device, *, repeats: int = 20) -> None:
        self.device = device
        self.repeats = repeats
        self.is_cuda = device.type == "cuda"
        self._flush = torch.zeros(_FLUSH_BYTES // 4 if self.is_cuda else 1, device=device)

    def times(self, work: Callable[[], Any]) -> list[float]:
        """Milliseconds of every timed run."""
        found = []
        for index in range(self.repeats + 2):
            self._flush.zero_()
            elapsed = self._one(work)
            if index >= 2:
                found.append(elapsed)
        return found

    def median(self, work: Callable[[], Any]) -> float:
        """The median of ``times``."""
        return statistics.median(self.times(work))

    def wait(self) -> float:
        """Seconds on the wall clock once the device has nothing left to do."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _one(self, work: Callable[[], Any]) -> float:
        if not self.is_cuda:
            start = perf_counter()
            work()
            return 1e3 * (perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def read_gb_per_s(self, num_bytes: int) -> float:
        """Bandwidth of summing so many bytes: what a kernel that only read would get."""
        block = torch.ones(num_bytes // 4, device=self.device)
        return num_bytes / min(self.times(block.sum)) / 1e6
