"""Text of an output while it grows. Nothing here decides where an output ends: see ``specdec.stopping``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]

_INCOMPLETE = "\ufffd"  # what tokenizers put for bytes that do not make a character yet


class TextStream:
    """Turns the tokens of one output into pieces of text that never change afterwards.

    All pieces together are what ``tokenizer.decode`` gives for all tokens. A piece is held back while its last
    character is incomplete. Each call decodes the last few tokens only, however long the output is.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave out end-of-sequence marks and their like.
    """

    __slots__ = ("_ids", "_num_shown", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The tokens that the next piece is decoded with: those of the last piece, because many tokenizers write a
        # token differently at the start of a text (no leading space), then those without text so far.
        self._ids: list[int] = []
        self._num_shown = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; the text that is certain now, which may be empty."""
        self._ids.extend(int(token_id) for token_id in token_ids)
        piece = self._rest()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return piece

    def flush(self) -> str:
        """The text that is still held back, at the end of the output."""
        piece, self._ids, self._num_shown = self._rest(), [], 0
        return piece

    def _rest(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_shown])) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)
