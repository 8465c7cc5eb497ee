"""Attention of one step by the Triton kernels: what ``specdec.attention.StepAttention`` does, from the device's data.

Nothing here looks at the layouts: all that a step is stands in device buffers. So the forward makes the same launches
for every step of a size, and a captured graph of them stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specdec.errors import InternalError
from specdec.kernels.launch import Backend
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_batch import TreeBatch
from specdec.kv_cache import GroupKey, KVPool
from specdec.prompt_attention import PromptChunks

__all__ = ["KernelAttention"]


class KernelAttention:
    """Writes the new K/V of a step into the pool and attends, call by call (an ``AttentionStep``).

    Args:
        pool: the KV pool.
        batches: who sees what, for each group of the pool.
        slots: [T] int64 on the device for each group: where the step's K/V go.
        is_strict: a query's bits depend on its own path only.
        backend: of the attention; the torch reference is for tests.
        prompts: the step's prompt chunks, where torch's attention may be the faster one; None: all is the kernel's.
    """

    def __init__(
        self,
        pool: KVPool,
        batches: Mapping[GroupKey, TreeBatch],
        slots: Mapping[GroupKey, torch.Tensor],
        *,
        is_strict: bool = False,
        backend: Backend = "triton",
        prompts: PromptChunks | None = None,
    ) -> None:
        self.pool = pool
        self.batches = batches
        self.slots = slots
        self.is_strict = is_strict
        self.backend = backend
        self.prompts = prompts
        self.num_calls = 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One attention call of the forward; see ``StepAttention.attend``."""
        ordinal = self.num_calls
        self.num_calls += 1
        if ordinal >= len(self.pool.group_of_call):
            raise InternalError(f"the forward makes more than the {ordinal} attention calls that the probe saw")
        group_key = self.pool.group_of_call[ordinal]
        group, slots = self.pool.groups[group_key], self.slots[group_key]
        keys, values = group.keys[ordinal], group.values[ordinal]
        keys.index_copy_(0, slots, key[0].transpose(0, 1))
        values.index_copy_(0, slots, value[0].transpose(0, 1))
        mask, size = group_key
        kind = AttentionKind(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=size if mask == "sliding" else 0,
            chunk=size if mask == "chunked" else 0,
            softcap=softcap or 0.0,
        )
        rows = query[0].transpose(0, 1)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()

        def by_kernel(some: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
            return tree_attention(
                some, keys, values, batch, kind, sinks=None if sinks is None else sinks.float().contiguous(),
                is_strict=self.is_strict, backend=self.backend,
            )  # fmt: skip

        batch = self.batches[group_key]
        if self.prompts is None or mask != "full" or kind.softcap or sinks is not None:
            return by_kernel(rows, batch)[None]
        return self.prompts.attend(rows, keys, values, batch, kind.scale, by_kernel)[None]
