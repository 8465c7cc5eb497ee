"""Training rows for the bundled model: packed plain code, edit conversations and copy drills.

A row is a fixed number of tokens with one loss weight per token. Copy drills and edits live inside the chat format
only, so that plain text never teaches the model to repeat itself.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec.bench.edit_tasks import make_task, snippets, source_files
from specdec.errors import ConfigError, LoadError

__all__ = ["PAD", "SPECIAL_TOKENS", "Corpus", "Mixture", "RowStream", "load_corpus", "train_tokenizer"]

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>")
BOS, EOS, PAD, USER, ASSISTANT = range(5)

# Identifiers stay whole (underscore counts as a letter), a space belongs to the word after it, indentation is one
# piece. The same name then has the same tokens nearly everywhere, which is what copying needs.
_SPLIT = r" ?[\p{L}\p{M}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}_]+|\s+(?!\S)|\s+"
_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|eos|>' }}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with chat template; any bytes that are UTF-8 survive a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts of one side of the split: whole files, prose, and the snippets that edits start from."""

    files: tuple[str, ...]
    prose: tuple[str, ...]
    snippets: tuple[tuple[str, str], ...]  # (path, snippet)


def _read_prose(path: Path) -> tuple[str, ...]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"prose must be a gzip file of UTF-8 text, got {path}: {error}") from error
    return tuple(text[i : i + 20_000] for i in range(0, len(text), 20_000))


def load_corpus(root: Path, prose: Path | None, *, heldout: bool = False) -> Corpus:
    """Return the corpus below ``root``; test suites count once, all other code twice, because it reads better."""
    files: list[str] = []
    found: list[tuple[str, str]] = []
    for file in source_files(root, heldout=heldout):
        copies = 1 if "test" in file.path else 2
        files += [file.text] * copies
        found += [(file.path, snippet) for snippet in snippets(file.text, min_lines=5, max_lines=120)] * copies
    if not found:
        raise LoadError(f"no Python functions or classes below {root}")
    return Corpus(tuple(files), _read_prose(prose) if prose else (), tuple(found))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the row material; they need not add up to 1.

    ``prompt_weight`` is the loss weight of the user message, ``answer_weight`` that of the reply.
    """

    edit: float = 0.7
    plain: float = 0.25
    prose: float = 0.05
    drill: float = 0.05
    prompt_weight: float = 0.4
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        shares = (self.edit, self.plain, self.prose, self.drill, self.prompt_weight, self.answer_weight)
        if min(shares) < 0 or self.edit + self.plain + self.prose + self.drill <= 0:
            raise ConfigError(f"mixture shares must be >= 0 and not all 0, got {shares}")


Piece = tuple[list[int], list[float]]  # token ids, loss weight of each token


class RowStream:
    """Draws packed rows for any step; the same corpus, tokenizer, seed and step give the same rows."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer.backend_tokenizer
        self._vocab_size = len(tokenizer)
        self._seed = seed
        self._rng = random.Random(seed)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _chat(self, user: list[int], answer: list[int], mixture: Mixture) -> Piece:
        prompt = [BOS, USER, *user, ASSISTANT]
        reply = [*answer, EOS]
        return prompt + reply, [mixture.prompt_weight] * len(prompt) + [mixture.answer_weight] * len(reply)

    def _edit(self, room: int, mixture: Mixture) -> Piece | None:
        for _ in range(8):
            path, snippet = self._rng.choice(self._corpus.snippets)
            if len(snippet) > room * 2:  # about 3.3 characters per token, prompt and answer: cannot fit
                continue
            task = make_task(self._rng, path, snippet)
            if task is None:
                continue
            piece = self._chat(self._encode(task.user), self._encode(task.answer), mixture)
            if len(piece[0]) <= room:
                return piece
        return None

    def edits(self, step: int, count: int, size: tuple[int, int]) -> list[tuple[list[int], list[int]]]:
        """Return (prompt, answer) token ids of edits whose source has a size in characters within ``size``."""
        rng, found = random.Random(f"edits-{self._seed}-{step}"), list[tuple[list[int], list[int]]]()
        while len(found) < count:
            path, snippet = rng.choice(self._corpus.snippets)
            task = make_task(rng, path, snippet) if size[0] < len(snippet) < size[1] else None
            if task is not None:
                found.append(([BOS, USER, *self._encode(task.user), ASSISTANT], self._encode(task.answer)))
        return found

    def _drill(self, room: int, mixture: Mixture) -> Piece | None:
        """A span of random tokens to repeat: copying by position and content alone, no help from the language."""
        fence, close = self._encode("```python\n"), self._encode("```")
        length = (room - 8) // 2 - len(fence) - len(close)
        if length < 8:
            return None
        length = self._rng.randint(8, min(length, 256))
        span = [self._rng.randrange(len(SPECIAL_TOKENS), self._vocab_size) for _ in range(length)]
        ids, weights = self._chat([*fence, *span, *close], [*fence, *span, *close], mixture)
        weights[: length + 2] = [0.0] * (length + 2)  # noise has nothing to teach
        return ids, weights

    def _text(self, texts: tuple[str, ...], room: int) -> Piece:
        text = self._rng.choice(texts)
        start = self._rng.randrange(max(1, len(text) - room * 2))
        if start:
            start = text.find("\n", start) + 1
        ids = self._encode(text[start : start + room * 6])
        ids = ([BOS, *ids] if start == 0 else ids)[:room]
        return ids, [1.0] * len(ids)

    def _piece(self, room: int, mixture: Mixture) -> Piece:
        corpus = self._corpus
        makers: list[tuple[float, Callable[[], Piece | None]]] = [
            (mixture.edit, lambda: self._edit(room, mixture)),
            (mixture.drill, lambda: self._drill(room, mixture)),
            (mixture.plain, lambda: self._text(corpus.files, min(room, 512))),
            (mixture.prose if corpus.prose else 0.0, lambda: self._text(corpus.prose, min(room, 512))),
        ]
        make = self._rng.choices([m for _, m in makers], [share for share, _ in makers])[0]
        piece = make()
        if piece is None:  # nothing that fits: fill up with code, which counts only where plain code is wanted
            ids, _ = self._text(corpus.files, room)
            piece = ids, [1.0 if mixture.plain else 0.0] * len(ids)
        return piece

    def rows(self, step: int, count: int, length: int, mixture: Mixture) -> tuple[IntArray, FloatArray]:
        """Return the packed rows of a step: token ids [count, length] int32, loss weights [count, length] float32."""
        self._rng = random.Random(f"rows-{self._seed}-{step}")  # a resumed run sees what an unbroken one would
        ids = np.full((count, length), PAD, np.int32)
        weights = np.zeros((count, length), np.float32)
        for row in range(count):
            filled = 0
            while filled < length:
                piece_ids, piece_weights = self._piece(length - filled, mixture)
                end = filled + len(piece_ids)
                ids[row, filled:end] = piece_ids
                weights[row, filled:end] = piece_weights
                filled = end if piece_ids else length
        return ids, weights
