"""A causal LM as a drafter's scorer: its own KV pool, and trees that grow level by level within a step.

Only committed tokens stay cached. A step first reads the tokens that are new since the last one, all requests in one
forward; the last position of that forward gives the first level of the draft for nothing. Draft nodes live in reserved
slots and are dropped when the tree is done: reading the accepted ones again rides along with the next step's first
forward, so nothing has to be matched, cropped or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from specdec.drafters.growing import GrowingCache, Growth, chain_growth
from specdec.drafters.head_runner import GRAPH_REQUESTS
from specdec.errors import UnsupportedError
from specdec.kernels.launch import Backend
from specdec.packed_linear import pack_linears, unpack_linears
from specdec.routes import choose_route
from specdec.step_buffers import BUCKETS
from specdec.tree_target import TreeTarget
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DraftModel"]

_PIECE = 512  # most tokens of one request that are read in one forward: masks grow with its square


class DraftModel:
    """Scores growing trees of many requests with one small model.

    Args:
        model: a causal LM in evaluation mode whose attention can see trees.
        kv_tokens: tokens that it holds over all requests.
        max_length: longest text that it reads; 2 or more.
        max_requests: most requests at a time.
        self_test: False trusts the attention probe alone; for tests.
        around_growth: entered around every forward over draft nodes, never around one over committed tokens.
        around_forward: entered around every forward; with one of the two nothing is captured.
        kernels: who attends; see ``specdec.kernels.launch.uses_triton``.
        graphs: capture forwards of up to 256 tokens as CUDA graphs where there are any.
        max_tree: most nodes of a request's tree in earlier forwards of a step that a captured one has room for.

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
        around_growth: Callable[[], AbstractContextManager[None]] = nullcontext,
        around_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
        kernels: Backend = "auto",
        graphs: bool = True,
        max_tree: int = 64,
    ) -> None:
        route = choose_route(model, max_length=max_length, self_test=self_test, kernels=kernels)
        if route.kind != "tree":
            raise UnsupportedError(f"{type(model).__name__} cannot be a draft model: {' '.join(route.reasons)}")
        self.max_length = max_length
        self._around_growth, self._around_forward = around_growth, around_forward
        is_captured = graphs and around_growth is nullcontext and around_forward is nullcontext
        self._target = TreeTarget(
            model, route.calls, kv_tokens=kv_tokens, max_length=max_length, max_batch_size=max_requests,
            max_step_tokens=max_requests * _PIECE, kernels=kernels, buckets=BUCKETS if is_captured else (),
            max_earlier=GRAPH_REQUESTS * max_tree,
        )  # fmt: skip
        if self._target.runner is not None and is_captured:
            from specdec.kernel_runner import capture_if_possible  # imports Triton, which is not everywhere

            capture_if_possible(self._target.runner, self._target.device, type(model).__name__)
        self.vocab_size = self._target.vocab_size
        self.device = self._target.device
        self._cache = GrowingCache(self._target.pool)

    def pack(self) -> None:
        """Bring the weights of linear layers into the layout in which a CPU reads them (`specdec.packed_linear`)."""
        pack_linears(self._target.model, self)

    def unpack(self) -> None:
        """Give the weights back as they were; without ``pack`` nothing happens."""
        unpack_linears(self._target.model, self)

    @property
    def hf_model(self) -> PreTrainedModel:
        """The model itself."""
        return self._target.model

    @property
    def num_used(self) -> int:
        """KV slots taken; 0 when no request is held."""
        return self._target.pool.num_used

    def num_read(self, request_id: str) -> int:
        """How many leading tokens of the request's text are cached."""
        return self._cache.num_read(request_id)

    def read(self, request_ids: Sequence[str], texts: Sequence[IntArray]) -> tuple[list[int], torch.Tensor]:
        """Read every text to its end and keep it.

        Args:
            request_ids: R different ones.
            texts: [n] int32 each: what was read before, and mostly more; without more, as after a draft that was never
                verified, the last token is read again.

        Returns:
            Which of them could be read (indices; the others are too long or the pool is full), and the logits after
            their last tokens, [served, V].
        """
        rest: dict[int, IntArray] = {}
        num_free = self._target.pool.num_free
        for index, (request_id, text) in enumerate(zip(request_ids, texts, strict=True)):
            if self.num_read(request_id) >= len(text):
                self.rewind(request_id, len(text) - 1)
            new = text[self.num_read(request_id) :]
            if len(text) <= self.max_length and len(new) <= num_free:
                rest[index] = new
                num_free -= len(new)
        last: dict[int, torch.Tensor] = {}
        while rest:
            pieces = {index: tokens[:_PIECE] for index, tokens in rest.items()}
            growths = [chain_growth(request_ids[index], tokens) for index, tokens in pieces.items()]
            if not self._cache.reserve(growths):
                last = {index: row for index, row in last.items() if index not in rest}
                break
            rows = self._forward(growths, np.cumsum([len(tokens) for tokens in pieces.values()]) - 1)
            self._cache.keep({growth.request_id: len(growth.token_ids) for growth in growths})
            # Copies: the next forward may overwrite the outputs of a captured one.
            last |= zip(pieces, rows if self._target.runner is None else rows.clone(), strict=True)
            rest = {index: tokens[_PIECE:] for index, tokens in rest.items() if len(tokens) > _PIECE}
        served = sorted(last)
        logits = torch.stack([last[index] for index in served]) if served else torch.empty(0, self.vocab_size)
        return served, logits

    def grow(self, growths: Sequence[Growth]) -> torch.Tensor | None:
        """Score the next nodes of some trees: [sum of W, V], or None if the pool is full: then they are done."""
        if not self._cache.reserve(growths):
            return None
        with self._around_growth():
            return self._forward(growths, np.arange(sum(len(growth.token_ids) for growth in growths)))

    def drop(self, request_ids: Sequence[str]) -> None:
        """Drop the trees of these requests, not their texts."""
        self._cache.drop(request_ids)

    def rewind(self, request_id: str, num_tokens: int) -> None:
        """Forget a request's text from ``num_tokens`` on; nothing if it was not read so far."""
        self._cache.cut(request_id, num_tokens)

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are no error."""
        self._cache.release(request_ids)

    def _forward(self, growths: Sequence[Growth], rows: npt.NDArray[np.int64]) -> torch.Tensor:
        layouts, positions = self._cache.lay_out(growths)
        input_ids = np.concatenate([growth.token_ids for growth in growths], dtype=np.int64)
        with self._around_forward():
            return self._target.run(layouts, input_ids, positions, rows)[0]
