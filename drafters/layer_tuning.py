"""Whether drafting in groups of layers pays here: both ways are timed on one level of a draft, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.growing import Growth
from specdec.errors import ConfigError

__all__ = ["LayerTimes", "same_logits", "time_forms"]

_WIDTH = 4  # nodes of the level
_CONTEXT = 128
_ROUNDS = 7
# EasySpec reports up to 7 % fewer accepted draft tokens; what is gained must be clearly more (section 5).
_LOSS = 0.07


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of a level of a draft, medians.

    Args:
        exact_ms: layer by layer.
        groups_ms: in groups.
    """

    exact_ms: float
    groups_ms: float

    def gain(self, depth: int) -> float:
        """How much sooner a draft of ``depth`` levels is there: its first level is exact in both (EasySpec, 3.3)."""
        return depth * self.exact_ms / (self.exact_ms + (depth - 1) * self.groups_ms)

    def pays(self, depth: int) -> bool:
        """True if the gain makes up for what groups cost in acceptance."""
        return self.gain(depth) > 1 / (1 - _LOSS)


@contextmanager
def _level(model: DraftModel) -> Iterator[Callable[[], Tensor]]:
    """A function that scores a level of a draft after some text, the same one again and again."""
    name = "layer-tuning"
    text = (np.arange(min(_CONTEXT, model.max_length - 1), dtype=np.int64) * 40503 % model.vocab_size).astype(np.int32)
    width = min(_WIDTH, model.vocab_size)
    level = Growth(name, np.arange(width, dtype=np.int32), np.full(width, -1, dtype=np.int32))

    def grow() -> Tensor:
        logits = model.grow([level])
        model.drop([name])
        if logits is None:
            raise ConfigError("the draft model's kv_tokens leave no room for a text to be timed on")
        return logits

    try:
        model.read([name], [text])
        yield grow
    finally:
        model.release([name])


def same_logits(model: DraftModel, switch: Callable[[bool], None]) -> bool:
    """True if a level gets the same logits both ways, up to rounding.

    Args:
        model: holds no requests.
        switch: False: the one way; True: the other way.
    """
    with _level(model) as grow:
        switch(False)
        expected = grow()
        switch(True)
        return torch.allclose(grow(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def time_forms(model: DraftModel, switch: Callable[[bool], None]) -> LayerTimes:
    """Time a level both ways.

    Args:
        model: holds no requests.
        switch: True: levels run in groups from now on.

    Effects: where there are several ranks, all get the times of the first one, so that all decide alike.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with _level(model) as grow:
        for turn in range(_ROUNDS + 1):
            for is_grouped, found in seconds.items():
                switch(is_grouped)
                begin = perf_counter()
                logits = grow()
                if logits.is_cuda:
                    torch.cuda.synchronize(logits.device)
                if turn:  # the first one fills caches
                    found.append(perf_counter() - begin)
    times = [1e3 * median(seconds[False]), 1e3 * median(seconds[True])]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(times, src=0)
    return LayerTimes(*times)
