"""Runs a target's forwards with the Triton kernels: in buffers of the step's size, or of the next larger bucket.

A bucket is a number of tokens whose launches never change: on a GPU they are captured once as a CUDA graph and a step
costs one upload and one replay. A step that fits no bucket (a prompt chunk, a tree of unusual size) runs eagerly, with
the same code on buffers of its own size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from specdec.attention import AttentionStep
from specdec.device_tables import DeviceTables
from specdec.errors import ConfigError
from specdec.kernel_attention import KernelAttention
from specdec.kernels.tree_batch import TreeBatch
from specdec.kv_cache import GroupKey, KVPool
from specdec.prompt_attention import PromptAttention, PromptChunks
from specdec.split_attention import SplitAttention, batch_on
from specdec.step_buffers import Outputs, Step, StepBuffers, StepSizes

__all__ = ["Capture", "Captured", "Forward", "KernelRunner", "capture_cuda_graphs", "capture_if_possible"]

logger = logging.getLogger(__name__)

_WORD_BITS = 32
_COLUMN_STEP = 1024  # eager steps bound the columns by multiples of it: the number of splits stays put


class Forward(Protocol):
    """The model over one flat row."""

    def __call__(
        self,
        step: AttentionStep,
        input_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        *,
        states: Tensor | None = None,
    ) -> Outputs:
        """Logits of ``logit_rows`` [L] int64, and the hidden states that somebody reads.

        ``input_ids`` and ``positions`` are [T] int64, ``states`` the step's [T, W], if it has any.
        """


@dataclass(frozen=True, slots=True)
class Captured:
    """A bucket's launches, made once.

    Args:
        replay: runs them on what its buffers hold; the outputs are overwritten by the next replay.
        num_bytes: of device memory that they hold on to.
    """

    replay: Callable[[], Outputs]
    num_bytes: int


# Turns launches into something that repeats them.
Capture: TypeAlias = Callable[[Callable[[], Outputs]], Captured]


class KernelRunner:
    """Forwards of a flat row of query tokens over a pool, on the device that holds it.

    Args:
        pool: whose slots of the query tokens have been reserved.
        forward: the model.
        max_length: most tokens of a request, drafts included.
        max_batch_size: most requests of a step in a bucket.
        device: of the model's inputs; the pool's, unless that lies on several.
        is_strict: a token's bits depend on its own path only.
        buckets: numbers of tokens, ascending; none: everything runs eagerly.
        max_earlier: most nodes of earlier forwards of a step, over all its requests, that a bucket has room for.
        state_width: W of the states that come with every step; 0: none come.
        prompts: who attends to prompt chunks of eager steps; None: the kernel. Not for strict attention.
    """

    def __init__(
        self,
        pool: KVPool,
        forward: Forward,
        *,
        max_length: int,
        max_batch_size: int,
        device: torch.device,
        is_strict: bool = False,
        buckets: Sequence[int] = (),
        max_earlier: int = 0,
        state_width: int = 0,
        prompts: PromptAttention | None = None,
    ) -> None:
        if list(buckets) != sorted(set(buckets)) or (buckets and buckets[0] < 1):
            raise ConfigError(f"buckets must be ascending numbers of tokens from 1 on, got {tuple(buckets)}")
        self._pool = pool
        self._forward = forward
        self._is_strict = is_strict
        self._state_width = state_width
        self.prompts = prompts
        self._tables = DeviceTables(pool, 2 * max_batch_size, max_length, device)
        self._sizes = [self._bucket_sizes(tokens, max_batch_size, max_earlier) for tokens in buckets]
        self._captured: dict[int, tuple[StepBuffers, Captured]] = {}  # index into _sizes
        self.num_replays = 0
        self.num_eager = 0

    @property
    def graph_bytes(self) -> int:
        """Device memory that captured graphs hold on to."""
        return sum(captured.num_bytes for _, captured in self._captured.values())

    def capture(self, capture: Capture, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture every bucket, the largest first: the smaller ones then live in its memory.

        Args:
            capture: see ``Capture``; on a GPU ``capture_cuda_graphs``.
            on_progress: (buckets done, buckets in all).
        """
        for done, index in enumerate(reversed(range(len(self._sizes)))):
            buffers = self._buffers(self._sizes[index])
            self._captured[index] = buffers, capture(lambda buffers=buffers: self._launch(buffers, None))  # type: ignore[misc]
            on_progress(done + 1, len(self._sizes))

    def forget_captured(self) -> None:
        """Run everything eagerly from now on."""
        self._captured.clear()

    def run(self, step: Step) -> Outputs:
        """One forward. The outputs of a captured bucket live until its next step."""
        edits = self._tables.edits([layout.request_id for layout in step.layouts])
        needed = step.sizes(len(edits[0]), has_paths=self._is_strict)
        index = next((i for i, sizes in enumerate(self._sizes) if needed.fit_in(sizes)), None)
        if index is None or index not in self._captured:
            self.num_eager += 1
            buffers = self._buffers(needed)
            buffers.put(step, edits)
            columns = max(layout.num_cached + layout.ancestors.shape[1] for layout in step.layouts)
            prompts = self.prompts.chunks_of(step.layouts) if self.prompts is not None else None
            return self._launch(buffers, -(-columns // _COLUMN_STEP) * _COLUMN_STEP, prompts)
        self.num_replays += 1
        buffers, captured = self._captured[index]
        buffers.put(step, edits)
        logits, hidden, best = captured.replay()
        return Outputs(
            logits[: needed.num_logits],
            None if hidden is None else hidden[: needed.num_tokens],
            None if best is None else best[: needed.num_logits],
        )

    def _buffers(self, sizes: StepSizes) -> StepBuffers:
        return StepBuffers(sizes, self._pool, self._tables, state_width=self._state_width)

    def _bucket_sizes(self, tokens: int, max_batch_size: int, max_earlier: int) -> StepSizes:
        # What was sent for a step's tree is sent again for its accepted nodes, at most, with the next tree.
        num_edits = len(self._pool.groups) * 2 * max(tokens, 64)
        num_words = -(-(tokens + max_earlier) // _WORD_BITS)
        return StepSizes(
            tokens, max_batch_size, tokens + max_earlier, num_edits, tokens, num_words,
            tokens + max_earlier if self._is_strict else 0,
        )  # fmt: skip

    def _launch(self, buffers: StepBuffers, max_columns: int | None, prompts: PromptChunks | None = None) -> Outputs:
        on = buffers.device
        self._tables.write(on["edit_places"], on["edit_slots"])
        columns = min(max_columns or self._tables.num_columns, self._tables.num_columns)
        step = self._attention(buffers.batches(columns), buffers.slots(), prompts)
        ids, positions, rows = (on[name].long() for name in ("input_ids", "positions", "logit_rows"))
        return self._forward(step, ids, positions, rows, states=buffers.states)

    def _attention(
        self, batches: Mapping[GroupKey, TreeBatch], slots: Mapping[GroupKey, Tensor], prompts: PromptChunks | None
    ) -> AttentionStep:
        places = self._pool.device_of_call
        if len(set(places)) == 1:
            return KernelAttention(self._pool, batches, slots, is_strict=self._is_strict, prompts=prompts)
        steps = {
            place: KernelAttention(
                self._pool,
                {key: batch_on(batch, place) for key, batch in batches.items()},
                {key: rows.to(place) for key, rows in slots.items()},
            )
            for place in set(places)
        }
        return SplitAttention(steps, places)


def capture_if_possible(runner: KernelRunner, device: torch.device, name: str) -> None:
    """Capture a drafter's forwards where there are CUDA graphs; one that cannot be captured runs eagerly, and says so.

    Args:
        runner: with buckets.
        device: of its pool.
        name: of what runs there, for the warning.
    """
    if device.type != "cuda":
        return
    try:
        with torch.inference_mode():
            runner.capture(capture_cuda_graphs(device))
    except RuntimeError as error:
        runner.forget_captured()
        line = str(error).splitlines()[0]
        logger.warning("%s cannot be captured as CUDA graphs, its forwards are launched one by one: %s", name, line)


def capture_cuda_graphs(device: torch.device) -> Capture:
    """A ``Capture`` that records CUDA graphs, all in one memory pool.

    Source: torch's notes on CUDA graphs: warm up on a side stream, then capture.
    """
    memory = torch.cuda.graph_pool_handle()

    def capture(launch: Callable[[], Outputs]) -> Captured:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and lets libraries make their handles
                launch()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            outputs = launch()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return Captured(replay, max(torch.cuda.memory_reserved(device) - before, 0))

    return capture
