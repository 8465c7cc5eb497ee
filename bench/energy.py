"""Joules of the GPU, where NVML counts them; elsewhere nothing, and nothing is estimated."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

__all__ = ["EnergyMeter"]

logger = logging.getLogger(__name__)


class EnergyMeter:
    """Reads the GPU's own energy counter before and after a piece of work.

    ``is_available`` is False without a GPU, without the ``pynvml`` module, or on a GPU that has no counter.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._start_mj = 0
        if not torch.cuda.is_available():
            return
        try:
            pynvml = importlib.import_module("pynvml")  # optional, and without types
        except ImportError:
            logger.info("no energy figures: the pynvml module is not installed")
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except pynvml.NVMLError as error:
            logger.info("no energy figures: %s", error)
            return
        self._nvml = pynvml

    @property
    def is_available(self) -> bool:
        """True if ``stop`` gives real joules."""
        return self._nvml is not None

    def start(self) -> None:
        """Note the counter."""
        self._start_mj = self._read()

    def stop(self) -> float:
        """Joules since ``start``; 0 where nothing counts them."""
        return (self._read() - self._start_mj) / 1e3

    def _read(self) -> int:
        return 0 if self._nvml is None else int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
