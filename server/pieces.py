"""From the tokens of one choice to the text that a client sees: stop strings cut off, nothing taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specdec.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChoiceText"]


class ChoiceText:
    """The growing text of one choice.

    The engine says at which token an output ends; this class only leaves out what clients do not see: the end token
    and a stop string with what follows it. Text that might be the beginning of a stop string is held back.

    Args:
        tokenizer: the model's.
        stop_strings: the request's.
        stop_token_ids: end tokens.
    """

    __slots__ = ("_held", "_hold", "_stop_ids", "_stops", "_stream")

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], stop_token_ids: Sequence[int]
    ) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stop_strings)
        self._stop_ids = frozenset(stop_token_ids)
        self._hold = max(map(len, self._stops), default=1) - 1  # characters that may yet turn out to begin a stop
        self._held = ""

    def feed(self, token_ids: Sequence[int], *, is_last: bool) -> str:
        """Take the next tokens; the text that is certain now.

        Args:
            token_ids: new tokens of the output.
            is_last: no more will come.
        """
        ids = list(token_ids)
        if is_last and ids and ids[-1] in self._stop_ids:
            ids.pop()
        self._held += self._stream.feed(ids)
        if is_last:
            self._held += self._stream.flush()
            found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
            piece, self._held = self._held[: min(found, default=len(self._held))], ""
            return piece
        cut = max(len(self._held) - self._hold, 0)
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece
