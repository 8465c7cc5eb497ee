"""A draft model with another tokenizer than the target's: what it writes goes over as text.

The committed text is encoded with the draft model's tokenizer, the draft model continues it, and the continuation is
encoded with the target's tokenizer behind the target's own last tokens. Where that encoding does not begin with those
tokens (the continuation would merge with the last one), or the text ends within a character, there is no guess. The
match rule keeps the text whatever comes out of this.

Encoding can change the last few tokens when text is appended, so these are never kept in the cache: they are grown
anew in each step, as the first nodes of the draft. Chains only; and greedy, for noise by token id means nothing across
vocabularies.

Compare transformers' "universal assisted decoding", which aligns by longest common subsequence; here a tail that does
not come back exactly is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.growing import Growth
from specdec.errors import ConfigError
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextLmDrafter"]

_UNSETTLED = 8  # own tokens at the end of the text that more text may change
_TAILS = (16, 4, 1)  # last tokens of the target that its encoding must bring back, the longest first
_NOTHING: IntArray = np.empty(0, dtype=np.int32)
_BROKEN = "�"  # what an incomplete character decodes to


class _Writing:
    """One request's text in the draft model's tokens while a draft grows."""

    def __init__(self, row: int, request_id: str, own_ids: IntArray) -> None:
        self.row, self.request_id, self.own_ids = row, request_id, own_ids
        self.num_settled = max(0, len(own_ids) - _UNSETTLED)
        self.new_ids: list[int] = []
        self.num_grown = 0

    def next_growth(self) -> Growth:
        """The unsettled end of the text, and later one drafted token after the other."""
        ids = np.array(self.new_ids[-1:] or self.own_ids[self.num_settled :], dtype=np.int32)
        parents = np.arange(self.num_grown - 1, self.num_grown - 1 + len(ids), dtype=np.int32)
        self.num_grown += len(ids)
        return Growth(self.request_id, ids, parents)


class TextLmDrafter:
    """Drafts chains with a causal LM that has its own tokenizer (`specdec.protocols.Drafter`).

    Args:
        model: holds the draft model's cache.
        own: its tokenizer.
        target: the target's tokenizer.
        vocab_size: of the target.
        depth: own tokens per draft, >= 1.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        model: DraftModel,
        *,
        own: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        vocab_size: int,
        depth: int = 6,
    ) -> None:
        if depth < 1:
            raise ConfigError(f"depth must be >= 1, got {depth}")
        self.needs = DrafterNeeds(needs_match=True)
        self.model = model
        self._own: Any = own
        self._target: Any = target
        self._vocab_size = vocab_size
        self._depth = depth
        start = [token_id for token_id in own("")["input_ids"] if token_id == own.bos_token_id]
        self._start = start[:1]
        self._cached: dict[str, IntArray] = {}  # own tokens in the cache

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing: a prompt is read with the request's first draft."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        writings: Sequence[_Writing] = [
            writing
            for row, (state, budget) in enumerate(zip(states, budgets, strict=True))
            if budget > 0 and (writing := self._encoded(row, state)) is not None
        ]
        writings = self._with_settled_read(writings)
        for _ in range(self._depth):
            growths = [writing.next_growth() for writing in writings]
            logits = self.model.grow(growths) if growths else None
            if logits is None:
                break
            last = np.cumsum([len(growth.token_ids) for growth in growths]) - 1
            for writing, token_id in zip(writings, logits[last].argmax(dim=-1).tolist(), strict=True):
                writing.new_ids.append(token_id)
        self.model.drop([writing.request_id for writing in writings])
        for writing in writings:
            guess = self._translated(writing, states[writing.row].token_ids)[: budgets[writing.row]]
            trees[writing.row] = DraftTree.chain(int(states[writing.row].token_ids[-1]), guess)
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        self.model.release(request_ids)
        for request_id in request_ids:
            self._cached.pop(request_id, None)

    def _encoded(self, row: int, state: RequestState) -> _Writing | None:
        """The committed text in own tokens; None where it ends within a character or does not fit the context."""
        text = _decoded(self._target, state.token_ids)
        if not text or text.endswith(_BROKEN):
            return None
        ids = self._start + self._own(text, add_special_tokens=False)["input_ids"]
        if len(ids) + self._depth > self.model.max_length:
            return None
        return _Writing(row, state.request_id, np.array(ids, dtype=np.int32))

    def _with_settled_read(self, writings: Sequence[_Writing]) -> list[_Writing]:
        """Bring the cache up to the settled part of every text; those that there was room for."""
        behind = []
        for writing in writings:
            cached = self._cached.get(writing.request_id, _NOTHING)
            if len(cached) > writing.num_settled or (cached != writing.own_ids[: len(cached)]).any():
                self.model.release([writing.request_id])
                cached = self._cached[writing.request_id] = _NOTHING
            if len(cached) < writing.num_settled:
                behind.append(writing)
        settled = [writing.own_ids[: writing.num_settled] for writing in behind]
        served, _ = self.model.read([writing.request_id for writing in behind], settled)
        for index in served:
            self._cached[behind[index].request_id] = settled[index]
        left_out = {id(writing) for index, writing in enumerate(behind) if index not in served}
        return [writing for writing in writings if id(writing) not in left_out]

    def _translated(self, writing: _Writing, token_ids: IntArray) -> list[int]:
        """The drafted text in the target's tokens, as far as it is known; empty where it cannot be told."""
        before = _decoded(self._own, writing.own_ids)
        after = _decoded(self._own, [*writing.own_ids, *writing.new_ids])
        if not after.startswith(before):
            return []
        drafted = after[len(before) :].rstrip(_BROKEN)
        whole = _decoded(self._target, token_ids)
        for size in _TAILS:
            if size > len(token_ids):
                continue
            tail = whole[len(_decoded(self._target, token_ids[:-size])) :]
            ids: list[int] = self._target(tail + drafted, add_special_tokens=False)["input_ids"]
            if ids[:size] == token_ids[-size:].tolist():
                guess = ids[size:]
                return guess[: next((i for i, one in enumerate(guess) if one >= self._vocab_size), len(guess))]
        return []


def _decoded(tokenizer: Any, ids: Sequence[int] | IntArray) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
