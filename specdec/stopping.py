"""When the output of one request ends, decided token by token inside an accepted block.

The verdicts are those of ``transformers``' stopping criteria after each single token, so that a block of several tokens
ends exactly where plain decoding would have ended. Nothing here draws, scores or edits tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from specdec.errors import RequestError, UnsupportedError
from specdec.types import FinishReason, IntArray, SamplingParams, StoppingCriterion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StopChecker"]

_HF_MODULE: Final = "transformers.generation.stopping_criteria"
_BYTE_TOKEN: Final = re.compile("<0x([0-9a-fA-F]{2})>")
_PROBE: Final = "abcdef"  # plain letters, which no decoder joins, strips or completes


class StopChecker:
    """Where the new tokens of one request end, and why.

    Args:
        params: the request's rules.
        num_prompt_tokens: P; the output starts after it.
        max_length: most tokens that the target can hold of one request, prompt and output together.
        tokenizer: needed for stop strings only.

    Raises:
        RequestError: stop strings without a tokenizer, or a prompt that leaves no room for one new token.
        UnsupportedError: a stopping criterion that needs the scores of every step.
    """

    __slots__ = ("_criteria", "_eos_ids", "_limit", "_strings")

    def __init__(
        self,
        params: SamplingParams,
        *,
        num_prompt_tokens: int,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        if num_prompt_tokens >= max_length:
            raise RequestError(
                f"the prompt must leave room for at least one new token: it has {num_prompt_tokens} tokens and the "
                f"maximal length is {max_length}"
            )
        if params.stop_strings and tokenizer is None:
            raise RequestError(f"stop_strings need the model's tokenizer, got {params.stop_strings!r} and no tokenizer")
        self._eos_ids = frozenset(int(token_id) for token_id in params.stop_token_ids)
        self._limit = min(num_prompt_tokens + params.max_new_tokens, max_length)
        self._strings = _StopStrings(params.stop_strings, tokenizer) if params.stop_strings else None
        self._criteria: tuple[StoppingCriterion, ...] = ()
        for criterion in _flatten(params.stopping_criteria):
            self._add(criterion, num_prompt_tokens)

    def cut(self, token_ids: IntArray, new_ids: Sequence[int] | IntArray) -> tuple[int, FinishReason | None]:
        """How many of the new tokens to keep, and why the output ends there.

        The first token at which any rule fires is the last one kept, as ``transformers`` keeps the end-of-sequence
        token. A rule of its own ("stop") goes before the length when both fire at one token.

        Args:
            token_ids: [n] the committed tokens before this step, prompt included.
            new_ids: the tokens that the step would emit.

        Returns:
            The number of kept tokens, and "stop", "length", or None if the output goes on.
        """
        room = max(self._limit - len(token_ids), 0)
        num_new = min(len(new_ids), room)
        if self._strings is None and not self._criteria:
            eos_ids = self._eos_ids
            if eos_ids:
                for index in range(num_new):
                    if new_ids[index] in eos_ids:
                        return index + 1, "stop"
        else:
            fired = self._first_stop(token_ids, np.asarray(new_ids[:num_new], dtype=np.int64))
            if fired is not None:
                return fired + 1, "stop"
        return num_new, "length" if num_new == room else None

    def _first_stop(self, token_ids: IntArray, new_ids: np.ndarray[Any, Any]) -> int | None:
        """Index of the first new token at which a rule other than the length fires."""
        verdicts = self._strings.scan(token_ids, new_ids.tolist()) if self._strings is not None else None
        if self._criteria:
            import torch

            everything = torch.from_numpy(np.concatenate([token_ids, new_ids]).astype(np.int64))[None]  # [1, n + new]
        for index, token_id in enumerate(new_ids.tolist()):
            stopped = token_id in self._eos_ids
            if verdicts is not None:
                stopped |= next(verdicts)
            for criterion in self._criteria:  # each one sees every token once, as in transformers: it may count
                stopped |= _verdict(criterion, everything[:, : len(token_ids) + index + 1])
            if stopped:
                return index
        return None

    def _add(self, criterion: StoppingCriterion, num_prompt_tokens: int) -> None:
        """Take up one user criterion; the known cheap ones become the built-in rules."""
        kind: Any = type(criterion)
        name = kind.__qualname__ if kind.__module__ == _HF_MODULE else ""
        known: Any = criterion
        if name == "EosTokenCriteria":
            self._eos_ids |= frozenset(known.eos_token_id.tolist())
        elif name == "MaxLengthCriteria":  # fires after a token, so one token always comes out
            self._limit = min(self._limit, max(int(known.max_length), num_prompt_tokens + 1))
        elif name == "ConfidenceCriteria":
            raise UnsupportedError("ConfidenceCriteria needs the scores of every step, which are not kept")
        elif not callable(criterion):
            raise RequestError(f"stopping_criteria must be callables (input_ids, scores) -> bool, got {criterion!r}")
        else:
            self._criteria += (criterion,)


def _flatten(criteria: Sequence[Any]) -> Iterator[Any]:
    """The criteria one by one; a ``StoppingCriteriaList`` is a list."""
    for criterion in criteria:
        if isinstance(criterion, list):
            yield from _flatten(criterion)
        else:
            yield criterion


def _verdict(criterion: StoppingCriterion, input_ids: Any) -> bool:
    result = criterion(input_ids, None)
    if getattr(result, "shape", ()) not in ((), (1,)):
        raise RequestError(
            f"a stopping criterion must return one bool for one sequence, "
            f"{type(criterion).__name__} returned {result!r}"
        )
    return bool(result)


class _StopStrings:
    """Finds the first token that completes a stop string.

    Works on bytes: each token has a fixed piece of the text, and a stop string is found where it *ends* inside the
    piece of the newest token. So a string that the older text already holds does not fire, while one that starts in it
    does; a token that holds the string in its middle fires, and so do the bytes of a character that several tokens
    share. These are the verdicts of ``transformers``' ``StopStringCriteria``, which prepares the whole vocabulary up
    front; here a piece is looked up when its token appears.
    """

    __slots__ = ("_pieces", "_stops", "_tail_nbytes")

    def __init__(self, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._stops = [text.encode("utf-8", "surrogatepass") for text in stop_strings]
        self._tail_nbytes = max(len(stop) for stop in self._stops) - 1
        self._pieces = _Pieces(tokenizer)

    def scan(self, token_ids: IntArray, new_ids: Sequence[int]) -> Iterator[bool]:
        """For each new token in turn: whether it completes a stop string."""
        tail = self._tail(token_ids)
        for token_id in new_ids:
            piece = self._pieces[token_id]
            if piece is None:  # no text at all: nothing matches across it
                tail = b""
                yield False
                continue
            window = tail + piece
            # An occurrence that ends in the piece starts at most len(stop) - 1 bytes before it.
            yield any(window.find(stop, max(len(tail) - len(stop) + 1, 0)) >= 0 for stop in self._stops)
            tail = window[max(len(window) - self._tail_nbytes, 0) :]

    def _tail(self, token_ids: IntArray) -> bytes:
        """The last bytes of the committed text: as many as a stop string can have before the next token."""
        tail = b""
        index = len(token_ids)
        while len(tail) < self._tail_nbytes and index > 0:
            index -= 1
            piece = self._pieces[int(token_ids[index])]
            if piece is None:
                break
            tail = piece + tail
        return tail[max(len(tail) - self._tail_nbytes, 0) :]


class _Pieces(dict[int, bytes | None]):
    """Token id -> the bytes that the token adds to a text, None for an id without a token; filled on demand.

    A token's own string does not tell its piece (``##ing``, ``▁the``, ``Ġthe``, ``<0xE2>``), and decoding it alone
    does not either (a leading space is stripped, half a character becomes U+FFFD). Byte-level and byte-fallback tokens
    are mapped byte by byte; all others are decoded behind a fixed text, and what follows that text is the piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        decoders = _decoder_types(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._has_byte_fallback = "ByteFallback" in decoders
        self._is_byte_level = "ByteLevel" in decoders and not self._has_byte_fallback
        probe_ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        self._probe_tokens = tokenizer.convert_ids_to_tokens(probe_ids)

    def __missing__(self, token_id: int) -> bytes | None:
        piece = self[token_id] = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> bytes | None:
        try:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, OverflowError):  # how tokenizers in Python and Rust refuse an id
            return None
        if token is None:
            return None
        if self._is_byte_level and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        if self._has_byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        text: str = self._tokenizer.convert_tokens_to_string([*self._probe_tokens, token])
        start = text.find(_PROBE)
        if start < 0:  # a vocabulary without these letters: what the token adds to whatever they became
            start = 0
            skipped = len(self._tokenizer.convert_tokens_to_string(self._probe_tokens))
        else:
            skipped = len(_PROBE)
        return text[start + skipped :].encode("utf-8", "surrogatepass")


def _decoder_types(decoder: Any) -> set[str]:
    """The types named anywhere in the description of a ``tokenizers`` decoder."""
    if decoder is None:
        return set()
    try:
        description = json.loads(decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):  # a decoder written in Python has no description
        return {type(decoder).__name__}
    found: set[str] = set()
    stack = [description]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found.add(str(item.get("type")))
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return found


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 bytes are themselves, the others U+0100 upwards.

    Source: the byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_of_char()
