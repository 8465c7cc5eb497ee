"""The Triton kernels and CUDA graphs for a drafter's own forwards: a head, its cache, and inputs that never move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specdec.kernels.launch import Backend, uses_triton
from specdec.kv_cache import KVPool
from specdec.step_buffers import BUCKETS

if TYPE_CHECKING:
    from specdec.kernel_runner import Forward, KernelRunner

__all__ = ["GRAPH_REQUESTS", "head_runner"]

GRAPH_REQUESTS = 8  # the trees of so many requests fit into a captured forward; more of them run eagerly


def head_runner(
    pool: KVPool,
    forward: Forward,
    *,
    kernels: Backend,
    graphs: bool,
    max_requests: int,
    max_tree: int,
    state_width: int = 0,
    name: str,
) -> KernelRunner | None:
    """What runs a head's forwards by the kernels, captured where there are CUDA graphs; None: torch's operations do.

    Args:
        pool: of the head.
        forward: over one flat row.
        kernels: see ``uses_triton``; float64 is torch's on every device.
        graphs: capture forwards of up to 256 rows.
        max_requests: most requests at a time.
        max_tree: most nodes of a request's tree in earlier forwards of a step.
        state_width: see ``KernelRunner``.
        name: of the drafter, for a warning.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on the pool's device.
    """
    if not uses_triton(kernels, pool.device) or pool.dtype.itemsize > torch.float32.itemsize:
        return None
    from specdec.kernel_runner import KernelRunner, capture_if_possible  # imports Triton, which is not everywhere

    runner = KernelRunner(
        pool, forward, max_length=pool.num_tokens + max_tree + 1, max_batch_size=max_requests, device=pool.device,
        buckets=BUCKETS if graphs else (), max_earlier=GRAPH_REQUESTS * max_tree, state_width=state_width,
    )  # fmt: skip
    capture_if_possible(runner, pool.device, name)
    return runner
