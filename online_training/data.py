"""Training examples: a prompt and the target's own answer to it, read from JSON lines and put into batches.

A line is one of

    {"token_ids": [...], "prompt_length": 12}       what `specdec regenerate` writes
    {"messages": [{"role": "user", ...}, ...]}      the last message is the answer; needs a chat template
    {"prompt": "...", "response": "..."}

A drafter learns what its target would say, so the answers should be the target's own (EAGLE-3, Li et al. 2025, arXiv
2503.01840, section 4; DFlash, arXiv 2602.06036): answers from elsewhere cost acceptance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError, LoadError
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BatchOrder", "Example", "TrainBatch", "collate", "frequent_ids", "read_examples"]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One text: token_ids [T] int32, of which the first ``prompt_length`` teach nothing."""

    token_ids: IntArray
    prompt_length: int

    def as_json(self) -> str:
        """The line of a data file."""
        return json.dumps({"token_ids": self.token_ids.tolist(), "prompt_length": self.prompt_length})


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """What one forward and backward pass works on; rows are padded on the right.

    Args:
        token_ids: [B, T] int64.
        weights: [B, T] float32, >= 0: how much it counts that this token is guessed right; 0: prompt and padding.
        states: [B, T, layers * H], the target's states that the drafter reads; None: computed when needed.
        last: [B, T, H], the input of the target's ``lm_head``; None: computed when needed.
        seed: of whatever a drafter draws to learn from this batch (the anchors of blocks).
    """

    token_ids: Tensor
    weights: Tensor
    states: Tensor | None = None
    last: Tensor | None = None
    seed: int = 0

    def to(self, device: torch.device) -> TrainBatch:
        """The same on a device."""
        states, last = (None if one is None else one.to(device) for one in (self.states, self.last))
        return TrainBatch(self.token_ids.to(device), self.weights.to(device), states, last, self.seed)


def read_examples(
    paths: Sequence[Path], *, max_length: int, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Example]:
    """All examples of some files, cut to ``max_length`` tokens; those whose prompt alone fills it are left out.

    Raises:
        LoadError: a file cannot be read, or a line breaks a rule; the message names the file and the line.
    """
    found = []
    for path in paths:
        for number, line in _lines(path):
            try:
                example = _example(json.loads(line), tokenizer)
                if len(example.token_ids) and not 0 <= example.token_ids.min() <= example.token_ids.max() < vocab_size:
                    raise ValueError(f"token ids must be in [0, {vocab_size})")
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise LoadError(f"{path}, line {number}: {error}") from error
            if example.prompt_length < min(max_length, len(example.token_ids)):
                found.append(Example(example.token_ids[:max_length], example.prompt_length))
    if not found:
        raise LoadError(f"no example with an answer within {max_length} tokens in {', '.join(map(str, paths))}")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}") from error


def _example(row: Any, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"a line must hold an object, got {type(row).__name__}")
    if "token_ids" in row:
        ids, length = row["token_ids"], row["prompt_length"]
    elif tokenizer is None:
        raise ValueError("text needs the target's tokenizer, which has none")
    elif "messages" in row:
        ids, length = _chat_ids(row["messages"], tokenizer)
    elif {"prompt", "response"} <= row.keys():
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids, length = [*prompt, *tokenizer(row["response"], add_special_tokens=False)["input_ids"]], len(prompt)
    else:
        raise ValueError("a line must hold token_ids, messages, or prompt and response")
    if not isinstance(length, int) or not 0 < length <= len(ids):
        raise ValueError(f"prompt_length must be in 1..{len(ids)}, got {length!r}")
    return Example(np.array(ids, dtype=np.int32), length)


def _chat_ids(messages: Any, tokenizer: Any) -> tuple[list[int], int]:
    if not tokenizer.chat_template:
        raise ValueError("messages need a chat template, and the target's tokenizer has none")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("messages must be a list of at least two, the last of which is the answer")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError("the chat template does not put the answer behind its own generation prompt")
    return list(whole), len(prompt)


def collate(examples: Sequence[Example], *, seed: int = 0) -> TrainBatch:
    """One batch, with weight 1 on every token of an answer."""
    width = max(len(example.token_ids) for example in examples)
    token_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        token_ids[row, :length] = torch.from_numpy(example.token_ids.astype(np.int64))
        weights[row, example.prompt_length : length] = 1.0
    return TrainBatch(token_ids, weights, seed=seed)


class BatchOrder:
    """Which examples make up the n-th batch: a function of (lengths, size, seed, n), so a run can go on anywhere.

    Every epoch is shuffled anew. Examples of like length share a batch, so that little is padding; the batches of an
    epoch come in random order.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: most tokens of a batch, padding included; a longer example is a batch of its own.
        seed: of the order.

    Raises:
        ConfigError: there is no example, or ``tokens_per_batch`` < 1.
    """

    def __init__(self, lengths: Sequence[int], *, tokens_per_batch: int, seed: int) -> None:
        if not lengths or tokens_per_batch < 1:
            raise ConfigError(
                f"batches need examples and tokens_per_batch >= 1, got {len(lengths)}, {tokens_per_batch}"
            )
        self._lengths, self._tokens, self._seed = np.array(lengths), tokens_per_batch, seed
        self._epoch, self._first, self._batches = -1, 0, list[list[int]]()

    def at(self, index: int) -> list[int]:
        """The examples of batch ``index`` (>= 0), counted through all epochs."""
        if self._epoch < 0 or index < self._first:
            self._epoch, self._first, self._batches = 0, 0, self._shuffled(0)
        while index >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._epoch += 1
            self._batches = self._shuffled(self._epoch)
        return self._batches[index - self._first]

    def count(self, epochs: float) -> int:
        """Batches in so many epochs, at least 1; a part of an epoch is a part of its batches."""
        whole = int(epochs)
        sizes = [len(self._shuffled(epoch)) for epoch in range(whole + 1)]
        return max(1, sum(sizes[:whole]) + round(sizes[whole] * (epochs - whole)))

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        # Lengths are blurred by a tenth: neighbours differ from epoch to epoch, and little is padded.
        order = np.argsort(self._lengths * rng.uniform(0.9, 1.1, len(self._lengths)), kind="stable")
        batches: list[list[int]] = []
        width = 0
        for example in order.tolist():
            width = max(width, int(self._lengths[example]))
            if batches and width * (len(batches[-1]) + 1) <= self._tokens:
                batches[-1].append(example)
            else:
                batches.append([example])
                width = int(self._lengths[example])
        return [batches[i] for i in rng.permutation(len(batches))]


def frequent_ids(examples: Sequence[Example], count: int, vocab_size: int) -> Tensor | None:
    """[count] int64, ascending: the most frequent tokens of the answers, a draft vocabulary; None: all are kept.

    Raises:
        ConfigError: ``count`` is not in 1..vocab_size.
    """
    if not 1 <= count <= vocab_size:
        raise ConfigError(f"the draft vocabulary must have 1 to {vocab_size} tokens, got {count}")
    if count == vocab_size:
        return None
    answers = np.concatenate([example.token_ids[example.prompt_length :] for example in examples])
    order = np.argsort(-np.bincount(answers, minlength=vocab_size), kind="stable")
    return torch.from_numpy(np.sort(order[:count])).long()
