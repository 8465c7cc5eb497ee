"""Attention of prompt chunks by torch's flash attention, where the device has shown that it is faster than our kernel.

A tree needs the kernel's ancestor bits; a prompt chunk is a chain, which flash attention knows as causal. The kernel
reads K and V where they lie, flash attention needs them gathered in one row. What that costs against what its larger
tiles save depends on the device and the shape, so both are timed at the first chunk of every shape. Both round
differently, so the verdict is kept on disk: the same prompt gives the same text in the next process, too.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from specdec.cost_model import cost_file
from specdec.device_work import DeviceClock
from specdec.kernels.tree_batch import TreeBatch
from specdec.query_layout import QueryLayout

__all__ = [
    "LEAST_TOKENS",
    "PromptAttention",
    "PromptChunks",
    "Timer",
    "causal_attention",
    "device_timer",
    "verdict_file",
]

logger = logging.getLogger(__name__)

LEAST_TOKENS = 64  # shorter chains are the kernel's: there is nothing to win
_WARM, _TIMED = 2, 3

Timer: TypeAlias = Callable[[Callable[[], Tensor]], float]  # milliseconds of some work
ByKernel: TypeAlias = Callable[[Tensor, TreeBatch], Tensor]  # queries [T, Hq, D] -> [T, Hq, Dv]
_Shape: TypeAlias = tuple[torch.dtype, int, int, int, int, int, int]


def device_timer(device: torch.device) -> Timer:
    """The median of a few runs by the device's own clock, after untimed ones that compile."""
    clock = DeviceClock(device)

    def ms(work: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(_WARM + _TIMED):
            begin = clock.mark()
            work()
            end = clock.mark()
            if device.type == "cuda":
                end.synchronize()
            times.append(clock.ms(begin, end))
        return statistics.median(times[_WARM:])

    return ms


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float) -> Tensor:
    """One request's chunk, whose tokens are its last keys.

    Args:
        query: [T, Hq, D].
        keys: [num_slots, Hkv, D].
        values: [num_slots, Hkv, Dv].
        slots: [n] int64, n >= T: of all its keys in the order of their positions.
        scale: factor on the scores.

    Returns:
        [T, Hq, Dv]. On CUDA by flash attention; elsewhere with a mask of [T, n].
    """
    q, k, v = _row(query), _row(keys.index_select(0, slots)), _row(values.index_select(0, slots))
    visible = causal_lower_right(len(query), len(slots))
    out: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _row(x: Tensor) -> Tensor:
    """[n, H, D] as a batch of one, [1, H, n, D]."""
    return x.transpose(0, 1)[None]


def _has_flash(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """False where torch would fall back to attention that writes all scores: it could need any amount of memory."""
    if not query.is_cuda:
        return True
    few: tuple[Any, ...] = tuple(_row(x[:1]) for x in (query, keys, values))
    parameters: Any = torch.backends.cuda.SDPAParams  # its stub knows no arguments
    return torch.backends.cuda.can_use_flash_attention(parameters(*few, None, 0.0, True, True))


class PromptAttention:
    """Which of the two attends to the prompt chunks of each shape; decided once for each.

    A shape is dtype, heads and widths, and the powers of two that tokens and keys of the step's longest chunk reach.

    Args:
        timer: of the device.
        file: where verdicts are kept for other processes; None: they last as long as this.
    """

    def __init__(self, timer: Timer, file: Path | None = None) -> None:
        self._timer = timer
        self._file = file
        self.by_torch: dict[str, bool] = {}  # by shape: what was measured so far

    def chunks_of(self, layouts: Sequence[QueryLayout]) -> PromptChunks | None:
        """The prompt chunks of a step; None: it has none."""
        chosen = [
            index
            for index, layout in enumerate(layouts)
            if layout.num_tokens >= LEAST_TOKENS and not layout.num_earlier and _is_chain(layout)
        ]
        return PromptChunks(self, layouts, chosen) if chosen else None

    def prefers_torch(self, shape: _Shape, by_kernel: Callable[[], Tensor], by_torch: Callable[[], Tensor]) -> bool:
        """True if torch's way was the faster one when this shape was first seen, in whichever process that was."""
        name = " ".join(map(str, shape))
        if name not in self.by_torch:
            self.by_torch |= _read_verdicts(self._file)
        if name not in self.by_torch:
            kernel_ms, torch_ms = self._timer(by_kernel), self._timer(by_torch)
            self.by_torch[name] = torch_ms < kernel_ms
            logger.info(
                "prompt chunks of up to %d tokens and %d keys go to %s: the kernel takes %.3f ms, flash attention %.3f",
                shape[-2], shape[-1], "flash attention" if torch_ms < kernel_ms else "the kernel", kernel_ms, torch_ms,
            )  # fmt: skip
            _write_verdicts(self._file, self.by_torch)
        return self.by_torch[name]


def verdict_file(device: torch.device) -> Path:
    """Where the verdicts about one kind of device are kept between runs, beside the tables of costs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cost_file(["prompt-attention", name, torch.__version__])


def _read_verdicts(file: Path | None) -> dict[str, bool]:
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(verdict, bool) for verdict in found.values()):
            return found
        problem = "it holds something else"
    except (OSError, ValueError) as error:
        problem = str(error)
    logger.warning("cannot read how prompt chunks were attended to from %s, so it is measured again: %s", file, problem)
    return {}


def _write_verdicts(file: Path | None, by_torch: dict[str, bool]) -> None:
    """All or nothing; verdicts that another process has written meanwhile stand."""
    if file is None:
        return
    by_torch |= _read_verdicts(file)
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(by_torch, indent=1, sort_keys=True), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        logger.warning("how prompt chunks are attended to may differ in the next run, it cannot be kept: %s", error)


class PromptChunks:
    """The prompt chunks of one step over a flat row of tokens, and the requests beside them.

    Args:
        choice: made for each shape.
        layouts: all requests in flat order.
        chosen: indices of the chunks; at least one.
    """

    def __init__(self, choice: PromptAttention, layouts: Sequence[QueryLayout], chosen: Sequence[int]) -> None:
        self._choice = choice
        self._layouts = layouts
        self._chosen = chosen
        self._others = sorted(set(range(len(layouts))) - set(chosen))
        self._slots: dict[int, Tensor] = {}  # of each chunk's keys
        self._parts: dict[tuple[int, ...], tuple[Tensor, TreeBatch]] = {}

    @cached_property
    def _longest(self) -> int:
        return max(self._chosen, key=lambda index: self._layouts[index].num_tokens)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: TreeBatch, scale: float, by_kernel: ByKernel
    ) -> Tensor:
        """One call of full attention without soft-cap and sinks, the faster way.

        Args:
            query: [T, Hq, D].
            keys: [num_slots, Hkv, D].
            values: [num_slots, Hkv, Dv].
            batch: of the whole step, in the group that forgets nothing; the same for all calls.
            scale: factor on the scores.
            by_kernel: attends to any batch of the step's requests.

        Returns:
            [T, Hq, Dv].
        """
        if not _has_flash(query, keys, values) or not self._prefers_torch(query, keys, values, batch, scale, by_kernel):
            return by_kernel(query, batch)
        out = query.new_empty(*query.shape[:2], values.shape[2])
        for index in self._chosen:
            rows = self._rows(index)
            out[rows] = causal_attention(query[rows], keys, values, self._slots_of(batch, index), scale)
        if self._others:
            places, part = self._part(batch, self._others)
            out.index_copy_(0, places, by_kernel(query.index_select(0, places), part))
        return out

    def _prefers_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: TreeBatch, scale: float, by_kernel: ByKernel
    ) -> bool:
        longest, rows = self._longest, self._rows(self._longest)
        num_keys = self._layouts[longest].num_cached + self._layouts[longest].num_tokens
        shape = (query.dtype, *query.shape[1:], *values.shape[1:], _power(rows.stop - rows.start), _power(num_keys))
        return self._choice.prefers_torch(
            shape,
            lambda: by_kernel(query[rows], self._part(batch, [longest])[1]),
            lambda: causal_attention(query[rows], keys, values, self._slots_of(batch, longest), scale),
        )

    def _rows(self, index: int) -> slice:
        layout = self._layouts[index]
        return slice(layout.start, layout.start + layout.num_tokens)

    def _slots_of(self, batch: TreeBatch, index: int) -> Tensor:
        if index not in self._slots:
            layout = self._layouts[index]
            row = batch.slots.index_select(0, batch.rows[index : index + 1])[0]
            self._slots[index] = row[: layout.num_cached + layout.num_tokens].long()
        return self._slots[index]

    def _part(self, batch: TreeBatch, chosen: Sequence[int]) -> tuple[Tensor, TreeBatch]:
        """Where the queries of some requests stand [t] int64, and a batch of these requests alone."""
        key = tuple(chosen)
        if key not in self._parts:
            self._parts[key] = _part(batch, self._layouts, chosen)
        return self._parts[key]


def _is_chain(layout: QueryLayout) -> bool:
    """The last token of a chain is as deep as there are tokens, and of nothing else."""
    return int(layout.positions[-1]) == layout.num_cached + layout.num_tokens - 1


def _power(number: int) -> int:
    """The power of two that a number reaches."""
    return 1 << (number - 1).bit_length()


def _part(batch: TreeBatch, layouts: Sequence[QueryLayout], chosen: Sequence[int]) -> tuple[Tensor, TreeBatch]:
    device = batch.slots.device
    first_keys = np.cumsum([0, *(layout.ancestors.shape[1] for layout in layouts)])
    some = [layouts[index] for index in chosen]

    def on_device(numbers: Sequence[int] | Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.hstack(numbers)).to(device, dtype)

    queries = on_device([np.arange(one.start, one.start + one.num_tokens) for one in some], torch.int64)
    tree_keys = on_device([np.arange(first_keys[i], first_keys[i + 1]) for i in chosen], torch.int64)
    requests = on_device(chosen, torch.int64)
    return queries, TreeBatch(
        cu_queries=on_device(np.cumsum([0, *(one.num_tokens for one in some)]).tolist(), torch.int32),
        cu_keys=on_device(np.cumsum([0, *(one.ancestors.shape[1] for one in some)]).tolist(), torch.int32),
        contexts=batch.contexts[requests], firsts=batch.firsts[requests], rows=batch.rows[requests],
        slots=batch.slots, positions=batch.positions[tree_keys], ancestors=batch.ancestors[queries],
        max_columns=batch.max_columns,
    )  # fmt: skip
