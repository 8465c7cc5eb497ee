"""A causal LM as a drafter's scorer: its own KV pool, and trees that grow level by level within a step.

Only committed tokens stay cached. A step first reads the tokens that are new since the last one, all requests in one
forward; the last position of that forward gives the first level of the draft for nothing. Draft nodes live in reserved
slots and are dropped when the tree is done: reading the accepted ones again rides along with the next step's first
forward, so nothing has to be matched, cropped or moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from specdec.errors import UnsupportedError
from specdec.kv_cache import Keep
from specdec.query_layout import QueryLayout
from specdec.routes import choose_route
from specdec.tree_target import TreeTarget
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DraftModel", "Growth"]

_PIECE = 512  # most tokens of one request that are read in one forward: masks grow with its square


@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """New nodes of one request's tree.

    Args:
        request_id: whose.
        token_ids: [W] int32.
        parents: [W] int32: places among the request's nodes so far, these included; -1: the root.
    """

    request_id: str
    token_ids: IntArray
    parents: IntArray


@dataclass(slots=True, eq=False)
class _Held:
    """What the model holds of one request."""

    num_read: int = 0  # committed tokens in the cache
    depths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # [E] of the nodes
    ancestors: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), dtype=np.bool_))  # [E, E]


class DraftModel:
    """Scores growing trees of many requests with one small model.

    Args:
        model: a causal LM in evaluation mode whose attention can see trees.
        kv_tokens: tokens that it holds over all requests.
        max_length: longest text that it reads; 2 or more.
        max_requests: most requests at a time.
        self_test: False trusts the attention probe alone; for tests.

    Raises:
        UnsupportedError: the model cannot score trees; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_tokens: int,
        max_length: int,
        max_requests: int = 64,
        self_test: bool = True,
    ) -> None:
        route = choose_route(model, max_length=max_length, self_test=self_test)
        if route.kind != "tree":
            raise UnsupportedError(f"{type(model).__name__} cannot be a draft model: {' '.join(route.reasons)}")
        self.max_length = max_length
        self._target = TreeTarget(
            model, route.calls, kv_tokens=kv_tokens, max_length=max_length, max_batch_size=max_requests,
            max_step_tokens=max_requests * _PIECE,
        )  # fmt: skip
        self.vocab_size = self._target.vocab_size
        self.device = self._target.device
        self._held: dict[str, _Held] = {}

    @property
    def num_used(self) -> int:
        """KV slots taken; 0 when no request is held."""
        return self._target.pool.num_used

    def num_read(self, request_id: str) -> int:
        """How many leading tokens of the request's text are cached."""
        held = self._held.get(request_id)
        return held.num_read if held else 0

    def read(self, request_ids: Sequence[str], texts: Sequence[IntArray]) -> tuple[list[int], torch.Tensor]:
        """Read every text to its end and keep it.

        Args:
            request_ids: R different ones.
            texts: [n] int32 each: what was read before, and at least one token more.

        Returns:
            Which of them could be read (indices; the others are too long or the pool is full), and the logits after
            their last tokens, [served, V].
        """
        rest: dict[int, IntArray] = {}
        num_free = self._target.pool.num_free
        for index, (request_id, text) in enumerate(zip(request_ids, texts, strict=True)):
            new = text[self._held.setdefault(request_id, _Held()).num_read :]
            if len(text) <= self.max_length and len(new) <= num_free:
                rest[index] = new
                num_free -= len(new)
        last: dict[int, torch.Tensor] = {}
        while rest:
            pieces = {
                index: tokens[:_PIECE]
                for index, tokens in rest.items()
                if self._reserve(request_ids[index], len(tokens[:_PIECE]))
            }
            last |= zip(pieces, self._read_pieces(request_ids, pieces), strict=True)
            rest = {index: rest[index][_PIECE:] for index in pieces if len(rest[index]) > _PIECE}
            last = {index: row for index, row in last.items() if index not in rest}
        served = sorted(last)
        logits = torch.stack([last[index] for index in served]) if served else torch.empty(0, self.vocab_size)
        return served, logits

    def _read_pieces(self, request_ids: Sequence[str], pieces: Mapping[int, IntArray]) -> torch.Tensor:
        """Read and keep a stretch of some texts: logits after each, [pieces, V]."""
        if not pieces:
            return torch.empty(0, self.vocab_size)
        growths = [
            Growth(request_ids[index], tokens, np.arange(-1, len(tokens) - 1, dtype=np.int32))
            for index, tokens in pieces.items()
        ]
        rows = self._forward(growths, np.cumsum([len(tokens) for tokens in pieces.values()]) - 1)
        nothing = np.empty(0, dtype=np.int32)
        self._target.pool.commit([Keep(request_ids[i], len(tokens), nothing) for i, tokens in pieces.items()])
        for index, tokens in pieces.items():
            held = self._held[request_ids[index]]
            held.num_read += len(tokens)
            self._clear(held)
        return rows

    def grow(self, growths: Sequence[Growth]) -> torch.Tensor | None:
        """Score the next nodes of some trees: [sum of W, V], or None if the pool is full; nothing is changed then."""
        reserved: list[str] = []
        for growth in growths:
            if not self._reserve(growth.request_id, len(growth.token_ids)):
                self.drop(reserved)
                return None
            reserved.append(growth.request_id)
        num_rows = sum(len(growth.token_ids) for growth in growths)
        return self._forward(growths, np.arange(num_rows))

    def drop(self, request_ids: Sequence[str]) -> None:
        """Drop the trees of these requests, not their texts."""
        for request_id in request_ids:
            if request_id in self._held:
                self._clear(self._held[request_id])
        held = [Keep(request_id, 0, np.empty(0, np.int32)) for request_id in request_ids if request_id in self._held]
        self._target.pool.commit(held)

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are no error."""
        for request_id in request_ids:
            if self._held.pop(request_id, None) is not None:
                self._target.pool.release(request_id)

    def _reserve(self, request_id: str, count: int) -> bool:
        return self._target.pool.reserve(request_id, count, count + _PIECE)

    def _clear(self, held: _Held) -> None:
        held.depths, held.ancestors = held.depths[:0], held.ancestors[:0, :0]

    def _forward(self, growths: Sequence[Growth], rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Run new nodes, whose slots are reserved, and remember their places."""
        layouts: list[QueryLayout] = []
        start = 0
        for growth in growths:
            held, width = self._held.setdefault(growth.request_id, _Held()), len(growth.token_ids)
            num_earlier = len(held.depths)
            held.depths, held.ancestors = _extended(held, growth.parents)
            layouts.append(
                QueryLayout(
                    growth.request_id,
                    start,
                    width,
                    held.num_read,
                    held.num_read + held.depths,
                    held.ancestors[num_earlier:],
                    num_earlier,
                )  # fmt: skip
            )
            start += width
        positions = np.concatenate([layout.positions[layout.num_earlier :] for layout in layouts])
        input_ids = np.concatenate([growth.token_ids for growth in growths], dtype=np.int64)
        return self._target.run(layouts, input_ids, positions, rows)


def _extended(held: _Held, parents: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Depths [E + W] (0: right after the text) and ancestors [E + W, E + W] with W more nodes."""
    old = len(held.depths)
    total = old + len(parents)
    depths = np.empty(total, dtype=np.int64)
    depths[:old] = held.depths
    ancestors = np.zeros((total, total), dtype=np.bool_)
    ancestors[:old, :old] = held.ancestors
    for node, parent in enumerate(parents.tolist(), start=old):
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
        if parent >= 0:
            ancestors[node] = ancestors[parent]
        ancestors[node, node] = True
    return depths, ancestors
