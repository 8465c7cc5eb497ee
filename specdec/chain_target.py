"""The target for models that cannot verify a tree in one pass: one transformers cache per request, drafts are chains.

Recurrent and hybrid models have one state and one order, so a branch cannot share a pass with its sibling. A chain can;
when a part of it is rejected the state must go back. Attention layers are cropped. A recurrent or convolutional state
cannot be: it is put back to what it was before the step, and the accepted tokens are fed again *together with the
next step's tokens*, so that a rejection costs a few more tokens in the next forward and no forward of its own.

Each request is one row of its own: flattening or padding requests together would leak state between them.

With ``max_draft_tokens=0`` the target feeds what ``model.generate`` feeds, the whole prompt at once and then token by
token, for models whose cache takes more than one token at a time only at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from specdec.errors import ConfigError, InternalError, UnsupportedError
from specdec.row_forward import RowForward, join_rows, vocab_size_of
from specdec.types import Chunk, IntArray, RequestState, TargetOutput

__all__ = ["ChainTarget"]

# Accepted tokens that wait to be fed again. More than this and they get a forward of their own: a long tail would
# make every following step pay for it.
_MAX_PENDING = 32
# Layers that only ever replace their tensors (by concatenation or slicing): a reference is as good as a copy.
_REPLACING = {"keys", "values", "indexer_keys", "indexer_position_ids"}


@dataclass(slots=True)
class _Row:
    """One request's cache.

    ``num_cached`` committed tokens count as cached: the first ``position`` of them are in ``cache``, the others are
    ``pending``. While a step is open, ``step_ids`` are ``pending`` and its own tokens.
    """

    cache: Any
    num_cached: int = 0
    num_held: int = 0  # tokens counted against the capacity: cached and reserved
    position: int = 0
    pending: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    step_ids: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    is_fed: bool = True  # False: this step held its tokens back
    before: list[dict[str, Any]] | None = None  # the layers as they were before the step


class ChainTarget:
    """A ``TargetModel`` over transformers' own caches.

    Args:
        model: a causal LM of transformers in evaluation mode.
        kv_tokens: tokens that all requests together may hold.
        max_length: most tokens of one request.
        max_draft_tokens: most draft tokens of a chain; 0: plain decoding, prompts are never cut into pieces.

    Raises:
        ConfigError: a size is outside its rule.
        UnsupportedError: the model takes no cache, or transformers has no cache class for one of its layers.
    """

    supports_trees = False

    def __init__(
        self,
        model: nn.Module,
        *,
        kv_tokens: int,
        max_length: int,
        max_draft_tokens: int = 64,
    ) -> None:
        for name, value in (("kv_tokens", kv_tokens), ("max_length", max_length)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if max_draft_tokens < 0:
            raise ConfigError(f"max_draft_tokens must be >= 0, got {max_draft_tokens}")
        self.vocab_size = vocab_size_of(model)
        self.kv_tokens = kv_tokens
        self.max_length = max_length
        self.max_draft_tokens = max_draft_tokens
        self._row = RowForward(model)
        self._config: Any = getattr(model, "config", None)
        self._rows: dict[str, _Row] = {}
        self._num_held = 0
        self._crops = False
        self._crops = self._learn_to_crop() and max_draft_tokens > 0

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        if not self.has_room(num_tokens):
            return False
        row = self._rows.get(state.request_id)
        if row is None:
            row = self._rows[state.request_id] = _Row(self._new_cache())
        row.num_held += num_tokens
        self._num_held += num_tokens
        return True

    def has_room(self, num_tokens: int) -> bool:
        return self._num_held + num_tokens <= self.kv_tokens

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= min(self.kv_tokens, self.max_length)

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        rows = [self._forward_one(chunk) for chunk in chunks]
        return join_rows([row for row in rows if row is not None], self.vocab_size, self._row.device)

    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        for chunk, nodes in zip(chunks, keep, strict=True):
            row = self._rows[chunk.state.request_id]
            num_new = len(chunk.prefix_ids) + len(nodes)
            num_dropped = chunk.num_tokens - num_new
            kept_ids = row.step_ids[: len(row.step_ids) - num_dropped]
            if self._crops:
                row.cache.crop(-num_dropped)  # 0 too: it trims sliding windows, which record their past during a step
            elif num_dropped:
                _put_back(row.cache, row.before)
            if not row.is_fed or (num_dropped and not self._crops):
                row.pending = kept_ids
            else:
                row.pending = kept_ids[:0]
                row.position += len(kept_ids)
            row.before = None
            row.num_cached += num_new
            self._num_held += row.num_cached - row.num_held
            row.num_held = row.num_cached

    def recall(self, state: RequestState) -> int:
        return 0

    def retire(self, state: RequestState) -> None:
        self.release(state)

    def release(self, state: RequestState) -> None:
        row = self._rows.pop(state.request_id, None)
        if row is not None:
            self._num_held -= row.num_held

    def _forward_one(self, chunk: Chunk) -> torch.Tensor | None:
        request_id, tree = chunk.state.request_id, chunk.tree
        row = self._rows[request_id]
        if row.num_cached != chunk.state.num_cached:
            raise InternalError(
                f"request {request_id}: {row.num_cached} cached tokens, {chunk.state.num_cached} expected"
            )
        if tree is not None and not tree.is_chain:
            raise InternalError(f"request {request_id}: a tree with branches went to a chain target")
        new_ids = chunk.prefix_ids if tree is None else np.concatenate((chunk.prefix_ids, tree.token_ids))
        if self.max_draft_tokens and len(row.pending) > _MAX_PENDING:
            self._feed(row, row.pending, num_wanted=1)
            row.position += len(row.pending)
            row.pending = row.pending[:0]
        row.step_ids = np.concatenate((row.pending, new_ids))
        row.is_fed = tree is not None or self.max_draft_tokens > 0
        if not row.is_fed:
            return None
        if self.max_draft_tokens == 0:
            return self._feed_like_generate(row, chunk.state.num_prompt_tokens)
        can_drop = tree is not None and tree.num_draft_tokens > 0
        row.before = _take_down(row.cache) if can_drop and not self._crops else None
        out = self._feed(row, row.step_ids, num_wanted=1 if tree is None else len(tree))
        return None if tree is None else out

    def _feed(self, row: _Row, token_ids: IntArray, *, num_wanted: int, skip: int = 0) -> torch.Tensor:
        """Feed tokens that follow ``skip`` already fed ones of this step."""
        first_row = len(token_ids) - num_wanted
        return self._row(token_ids, first_row=first_row, position=row.position + skip, cache=row.cache)

    def _feed_like_generate(self, row: _Row, num_prompt_tokens: int) -> torch.Tensor:
        """The prompt at once, then token by token: also when a preempted request is computed again."""
        done = max(1, num_prompt_tokens - row.position)
        out = self._feed(row, row.step_ids[:done], num_wanted=1)
        for skip in range(done, len(row.step_ids)):
            out = self._feed(row, row.step_ids[skip : skip + 1], num_wanted=1, skip=skip)
        return out

    def _new_cache(self) -> Any:
        cache = DynamicCache(config=self._config.get_text_config(decoder=True))
        if self._crops:
            cache.activate_past_recording()
        return cache

    def _learn_to_crop(self) -> bool:
        """True if every layer can drop its last tokens; known for sure only once each layer has held some."""
        name = type(self._row.model).__name__
        if self._row.cache_name is None:
            raise UnsupportedError(f"{name}.forward takes no cache")
        try:
            cache = self._new_cache()
            self._row(np.array([3, 4], dtype=np.int32), first_row=1, cache=cache)
        except Exception as error:
            raise UnsupportedError(
                f"{name} does not run with transformers' DynamicCache: {type(error).__name__}: {error}"
            ) from error
        # Layer classes of single models may inherit the flag without being able to.
        general = all(type(layer).__module__ == DynamicCache.__module__ for layer in cache.layers)
        return general and bool(cache.is_croppable)


def _take_down(cache: Any) -> list[dict[str, Any]]:
    """Every layer's attributes; tensors that a forward may change in place are copied."""
    return [{name: _copy(name, value) for name, value in vars(layer).items()} for layer in cache.layers]


def _put_back(cache: Any, before: list[dict[str, Any]] | None) -> None:
    if before is None:
        raise InternalError("tokens of a step were dropped, but the state before it is not known")
    del cache.layers[len(before) :]  # made by the step itself, in caches that grow their layers on first use
    for layer, attributes in zip(cache.layers, before, strict=True):
        vars(layer).clear()
        vars(layer).update(attributes)


def _copy(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if name in _REPLACING else value.clone()
    if isinstance(value, dict):
        return {key: _copy("", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy("", inner) for inner in value)
    return value
