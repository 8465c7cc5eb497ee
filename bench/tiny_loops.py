"""Unlikelihood on the model's own loops: what greedy continuation repeats is pushed down.

Copying heads make a small model repeat itself when it has nothing to copy. Late in training, every few steps, the
model continues plain code greedily, and tokens that complete a 4-gram already present in that continuation lose
probability. Edit rows are never treated this way: there, repeating the prompt is the task.

Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section 5.2 (sequence level).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specdec.bench.tiny_data import Mixture, RowStream

__all__ = ["loop_loss", "loop_rows", "repeats"]

_ROWS, _PROMPT, _NEW = 12, 96, 96  # rows, prompt tokens, new tokens: about half the cost of a training step
_PLAIN = Mixture(edit=0.0, plain=1.0, prose=0.0, drill=0.0)


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
def loop_rows(model: Any, stream: RowStream, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return greedy continuations of plain code and where they repeat themselves.

    Args:
        model: its attention implementation must support a cache.
        stream: gives the prompts of this step.
        step: the training step.

    Returns:
        ids [rows, prompt + new] int64, and a mask of the same shape, 1.0 on new tokens that complete a repeated 4-gram.
    """
    prompts = torch.from_numpy(stream.rows(step, _ROWS, _PROMPT, _PLAIN)[0]).long()
    ids = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=_NEW,
        max_new_tokens=_NEW,
        do_sample=False,
    )
    mask = torch.zeros(ids.shape)
    for row, sequence in enumerate(ids[:, _PROMPT:].tolist()):
        mask[row, _PROMPT:] = torch.tensor(repeats(sequence), dtype=torch.float32)
    return ids, mask


def loop_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over all new tokens of -log(1 - p) where the token repeats a 4-gram.

    Args:
        logits: [rows, length, vocab]; row i predicts token i + 1.
        ids: [rows, length] int64.
        mask: [rows, length] float32, see ``loop_rows``.
    """
    log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    unlikely = -torch.log1p(-log_p.exp().clamp(max=0.999))  # the clamp bounds the gradient of a certain token
    return (unlikely * mask[:, 1:]).sum() / (ids.shape[0] * _NEW)
