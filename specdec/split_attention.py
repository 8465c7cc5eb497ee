"""Attention of a model whose layers run on several devices: one step for each device, over the K/V that lie there.

What a step says of its requests is the same on all of them; it is sent to every device once, and each attention call
is answered by the step of its own device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.attention import AttentionStep
from specdec.kernels.tree_batch import TreeBatch

__all__ = ["SplitAttention", "batch_on"]


class SplitAttention:
    """Hands every call to the step of its device (an ``AttentionStep``).

    Args:
        steps: by device; each knows all calls.
        devices: of each attention call of the forward, in order.
    """

    def __init__(self, steps: Mapping[torch.device, AttentionStep], devices: Sequence[torch.device]) -> None:
        self._steps = steps
        self._devices = devices
        self.num_calls = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """One attention call of the forward; see ``StepAttention.attend``."""
        ordinal = self.num_calls
        self.num_calls += 1
        step = self._steps[self._devices[min(ordinal, len(self._devices) - 1)]]
        step.num_calls = ordinal  # one that the probe never saw is the step's to refuse
        return step.attend(query, key, value, scaling, softcap, sinks)


def batch_on(batch: TreeBatch, device: torch.device) -> TreeBatch:
    """The same batch on another device. Of the slot tables only the rows and columns in use travel."""
    if batch.slots.device == device:
        return batch
    names = ("cu_queries", "cu_keys", "contexts", "firsts", "positions", "ancestors")
    moved = {name: getattr(batch, name).to(device) for name in names}
    slots = batch.slots[batch.rows.long(), : batch.max_columns].to(device)
    rows = torch.arange(len(slots), dtype=torch.int32, device=device)
    paths = None if batch.paths is None else batch.paths.to(device)
    return replace(batch, slots=slots, rows=rows, paths=paths, **moved)
