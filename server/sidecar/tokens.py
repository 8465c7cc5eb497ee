"""Text and tokens, where a tokenizer was given: what is learned, where text may be cut, and what a chat's prompt is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from specdec.errors import LoadError
from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.requests import Asked
from specdec.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextCutter", "Tokens", "load_tokens"]


class Tokens:
    """The upstream's tokenizer, or none.

    Args:
        tokenizer: None where the upstream tells token ids itself.

    Attributes:
        special_ids: tokens that are no text, those that end one among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer = tokenizer
        self.special_ids: frozenset[int] = frozenset(map(int, tokenizer.all_special_ids if tokenizer else ()))

    def encode(self, text: str) -> list[int] | None:
        """Token ids of a text, without special tokens around it; None without a tokenizer."""
        if self.tokenizer is None or not text:
            return None if self.tokenizer is None else []
        return [int(token_id) for token_id in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """The text of token ids; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def prompt_ids(self, asked: Asked) -> list[int] | None:
        """What the prompt probably is, for drafts only; None if that cannot be said."""
        if asked.kind == "text":
            prompt = asked.body.get("prompt")
            if isinstance(prompt, list) and all(type(x) is int for x in prompt):
                return list(prompt)
            return self.encode(prompt) if isinstance(prompt, str) else None
        if self.tokenizer is None:
            return None
        try:
            made: Any = self.tokenizer.apply_chat_template(
                asked.body.get("messages"), tools=asked.body.get("tools") or None, add_generation_prompt=True,
                tokenize=True, return_dict=False,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  a template may raise whatever it likes
            del error
            return None
        return [int(token_id) for token_id in made]


class TextCutter:
    """Follows one output's text, so that an event can be cut between two of its tokens.

    Args:
        tokens: with a tokenizer, or nothing can be cut.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokenizer = tokens.tokenizer
        self._ids: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """The client received these tokens."""
        self._ids += token_ids
        del self._ids[:-32]  # what stands further back does not change how a token is written

    def cut(self, piece: Piece, count: int) -> Piece | None:
        """The piece with its first tokens only; None if its text does not begin with what they say."""
        if self._tokenizer is None:
            return None
        stream = TextStream(self._tokenizer)
        stream.feed(self._ids)
        text = stream.feed(piece.token_ids[:count])
        if not text or not piece.text.startswith(text):
            return None
        return Piece(piece.raw, piece.token_ids[:count], text, None, piece.prompt_ids, piece.event)

    def shown(self, token_ids: Sequence[int], hidden: Collection[int]) -> list[Piece]:
        """An event for each token that follows, as far as characters are complete and none is hidden.

        Args:
            token_ids: behind what the client received.
            hidden: tokens that end a text or are no text.
        """
        if self._tokenizer is None:
            return []
        stream, pieces, num_complete = TextStream(self._tokenizer), list[Piece](), 0
        stream.feed(self._ids)
        for token in token_ids:
            if token in hidden:
                break
            text = stream.feed([token])
            pieces.append(Piece(token_ids=(token,), text=text))
            if text and not text.endswith("\ufffd"):
                num_complete = len(pieces)
        return pieces[:num_complete]


def load_tokens(path: str | None) -> Tokens:
    """The tokenizer of a directory or of the hub.

    Raises:
        LoadError: there is none that can be read.
    """
    if path is None:
        return Tokens()
    from transformers import AutoTokenizer

    try:
        return Tokens(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load the tokenizer {path!r}: {error}") from error
