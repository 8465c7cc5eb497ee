"""Unlikelihood on the model's own loops: what greedy continuation repeats is pushed down.

Copying heads make a small model repeat itself when it has nothing to copy, or has lost its place in what it copies.
The model continues greedily, and tokens that complete a 4-gram too often lose probability: in plain code, one that
stands in the continuation already; in the answer to an edit, one that stands in the answer more often than in the
reference, since there repeating the prompt is the task.

Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section 5.2 (sequence level).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.bench.tiny_data import PAD, Mixture, RowStream

__all__ = ["DURING_DECAY", "FINISH", "Lesson", "LessonShape", "answer_rows", "loop_loss", "loop_rows", "repeats"]

_PLAIN = Mixture(edit=0.0, plain=1.0, prose=0.0, drill=0.0)
_SNIPPET = (400, 1600)  # characters of the source in an edit lesson: long enough to lose one's place in


@dataclass(frozen=True, slots=True)
class LessonShape:
    """Rows of a lesson on plain code, their prompt tokens and new tokens."""

    rows: int
    prompt: int
    new: int


DURING_DECAY = LessonShape(12, 96, 96)  # about half the cost of a training step
FINISH = LessonShape(8, 256, 128)  # as the evaluation asks: short prompts alone leave the loops after long ones
_ANSWERS = LessonShape(6, 0, 96)


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Greedy continuations and where they repeat.

    Args:
        ids: [rows, length] int64.
        attention: [rows, length] int64, 0 on padding.
        repeated: [rows, length] float32, 1 on new tokens that complete a repeated 4-gram.
        num_new: new tokens per row.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    repeated: torch.Tensor
    num_new: int


def repeats(ids: Sequence[int], n: int = 4) -> list[bool]:
    """Return for each token whether it completes an n-gram that occurs earlier in ``ids``."""
    seen: set[tuple[int, ...]] = set()
    out = [False] * len(ids)
    for end in range(n, len(ids) + 1):
        gram = tuple(ids[end - n : end])
        out[end - 1] = gram in seen
        seen.add(gram)
    return out


@torch.no_grad()
def loop_rows(model: Any, stream: RowStream, step: int, shape: LessonShape) -> Lesson:
    """Return greedy continuations of plain code and where they repeat themselves.

    Args:
        model: its attention implementation must support a cache.
        stream: gives the prompts of this step.
        step: the training step.
        shape: of the lesson.
    """
    prompts = torch.from_numpy(stream.rows(step, shape.rows, shape.prompt, _PLAIN)[0]).long()
    ids, attention = _continued(model, prompts, torch.ones_like(prompts), shape.new)
    repeated = torch.zeros(ids.shape)
    for row, sequence in enumerate(ids[:, shape.prompt :].tolist()):
        repeated[row, shape.prompt :] = torch.tensor(repeats(sequence), dtype=torch.float32)
    return Lesson(ids, attention, repeated, shape.new)


@torch.no_grad()
def answer_rows(model: Any, stream: RowStream, step: int) -> Lesson:
    """Return greedy continuations of half-written edit answers and where they repeat more than the reference does.

    Args:
        model: its attention implementation must support a cache.
        stream: gives the edits of this step.
        step: the training step.
    """
    rng, new = random.Random(f"answers-{step}"), _ANSWERS.new
    pairs = stream.edits(step, _ANSWERS.rows, _SNIPPET)
    cuts = [rng.randrange(max(1, len(answer) - new)) for _, answer in pairs]
    prompts = [prompt + answer[:cut] for (prompt, answer), cut in zip(pairs, cuts, strict=True)]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    ids, attention = _continued(model, ids, attention, new)
    repeated = torch.zeros(ids.shape)
    for row, ((_, answer), cut) in enumerate(zip(pairs, cuts, strict=True)):
        written = answer[:cut] + ids[row, width:].tolist()
        repeated[row, width:] = torch.tensor(_surplus(written, answer)[cut:], dtype=torch.float32)
    return Lesson(ids, attention, repeated, new)


def _surplus(written: Sequence[int], reference: Sequence[int], n: int = 4) -> list[bool]:
    """For each token whether it completes an n-gram that stands more often before it than in all of the reference."""
    allowed = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
    seen: Counter[tuple[int, ...]] = Counter()
    out = [False] * len(written)
    for end in range(n, len(written) + 1):
        gram = tuple(written[end - n : end])
        seen[gram] += 1
        out[end - 1] = seen[gram] > max(1, allowed[gram])
    return out


def _continued(model: Any, ids: torch.Tensor, attention: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations of exactly ``new`` tokens, and the attention mask of prompts and continuations."""
    made = model.generate(
        input_ids=ids, attention_mask=attention, min_new_tokens=new, max_new_tokens=new, do_sample=False
    )
    return made, torch.cat([attention, torch.ones((len(ids), new), dtype=torch.long)], dim=1)


def loop_loss(logits: torch.Tensor, lesson: Lesson) -> torch.Tensor:
    """Return the mean over all new tokens of -log(1 - p) where the token repeats a 4-gram.

    Args:
        logits: [rows, length, vocab]; row i predicts token i + 1.
        lesson: what they were computed on.
    """
    ids = lesson.ids
    log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    unlikely = -torch.log1p(-log_p.exp().clamp(max=0.999))  # the clamp bounds the gradient of a certain token
    return (unlikely * lesson.repeated[:, 1:]).sum() / (ids.shape[0] * lesson.num_new)
