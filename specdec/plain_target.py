"""The target of last resort: no cache of any kind is trusted, every step recomputes every request from its first token.

Slow, and right for any causal LM whose forward can be run without a cache. A chain of draft tokens is still verified
in the same pass, so speculation pays here more than anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from specdec.errors import ConfigError, InternalError
from specdec.row_forward import RowForward, join_rows, vocab_size_of
from specdec.types import Chunk, RequestState, TargetOutput

__all__ = ["PlainTarget"]


class PlainTarget:
    """A ``TargetModel`` without any cache.

    Args:
        model: a causal LM of transformers in evaluation mode.
        max_length: most tokens of one request.
        max_draft_tokens: most draft tokens of a chain. 0 for a model whose logits depend on later tokens of the row:
            then every forward ends at the token whose successor is asked for.

    Raises:
        ConfigError: a size is outside its rule.
    """

    supports_trees = False

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int,
        max_draft_tokens: int = 64,
    ) -> None:
        if max_length < 1:
            raise ConfigError(f"max_length must be >= 1, got {max_length}")
        if max_draft_tokens < 0:
            raise ConfigError(f"max_draft_tokens must be >= 0, got {max_draft_tokens}")
        self.vocab_size = vocab_size_of(model)
        self.max_length = max_length
        self.max_draft_tokens = max_draft_tokens
        self._row = RowForward(model)

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        return True

    def has_room(self, num_tokens: int) -> bool:
        return True

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_length

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        rows = []
        for chunk in chunks:
            if chunk.tree is None:  # nobody asks for logits, and nothing would be kept
                continue
            if not chunk.tree.is_chain:
                raise InternalError(f"request {chunk.state.request_id}: a tree with branches went to a chain target")
            num_context = chunk.state.num_cached + len(chunk.prefix_ids)
            token_ids = np.concatenate((chunk.state.token_ids[:num_context], chunk.tree.token_ids))
            rows.append(self._row(token_ids, first_row=num_context))
        return join_rows(rows, self.vocab_size, self._row.device)

    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        """Nothing is held, so nothing is dropped."""

    def recall(self, state: RequestState) -> int:
        return 0

    def retire(self, state: RequestState) -> None:
        self.release(state)

    def release(self, state: RequestState) -> None:
        """Nothing is held."""
