"""Does a target compute what ordinary forwards of the same model compute? A few short forwards decide.

Flags of a model class are neither necessary nor sufficient, so a path that looks right is tried before it is trusted:
two requests of different length go through prefill in pieces, a tree with a rejected branch and a rejected tail, a
tree that is rejected whole, and an accepted chain. Which tokens are "accepted" is scripted, so nothing is sampled, and
every node's logits must be those of an ordinary forward over the tokens on the path to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specdec.protocols import TargetModel
from specdec.row_forward import RowForward
from specdec.types import Chunk, DraftTree, IntArray, Request, RequestState

__all__ = ["NUM_REQUESTS", "NUM_TOKENS", "Reference", "run_self_test"]

NUM_REQUESTS = 2
NUM_TOKENS = 640  # room that a target needs for the script
_SHORT = 6
_MAX_WINDOW = 256  # longer windows are left to the probe's predicate: crossing them would make the test expensive

# Largest relative error of a node's logits that counts as rounding, beside what two ordinary forwards of the model
# show themselves. A wrong mask, position or state changes logits by the order of their own spread. Rounding grows
# with depth: units of 2^-8 (bfloat16) and 2^-11 (float16) reach a few percent and about one percent over tens of
# layers; in float32 1e-4 leaves three orders for badly conditioned models.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ROUNDING_FLOAT32 = 1e-4
_NOISE_FACTOR = 8  # the noise is seen on one pair of forwards, the test takes the worst node of many
_NUM_ROUNDS = 3  # low precision only: a router's near-tie hits a random node, a mistake hits the same one each round


@dataclass(frozen=True, slots=True)
class Reference:
    """What ordinary forwards of the model are like.

    Args:
        row: runs them.
        noise: relative error between rows of a forward and of a shorter one: the model's own rounding.
        is_causal: a token's logits do not depend on the tokens after it.
    """

    row: RowForward
    noise: float
    is_causal: bool

    @classmethod
    def of(cls, row: RowForward, vocab_size: int) -> Reference:
        """Learn noise and causality from two forwards."""
        token_ids = scripted_ids(vocab_size, 24, salt=9)
        long, _ = row(token_ids, first_row=0)
        short, _ = row(token_ids[:17], first_row=0)
        noise = float(relative_errors(long[:17], short).max())
        is_causal = noise <= 10 * rounding(long.dtype)
        return cls(row, noise if is_causal else 0.0, is_causal)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest relative error that is rounding."""
        return max(rounding(dtype), _NOISE_FACTOR * self.noise)


def rounding(dtype: torch.dtype) -> float:
    """Relative error that logits of this dtype may have over a deep model."""
    return _ROUNDING.get(dtype, _ROUNDING_FLOAT32)


def scripted_ids(vocab_size: int, count: int, *, salt: int) -> IntArray:
    """[count] int32 token ids spread over the vocabulary by a multiplicative hash, neighbours different."""
    index = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(1009 * (salt + 1))
    hashed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
    first = min(4, vocab_size - 1)  # ids below are padding and other marks in most vocabularies
    return (first + hashed % np.uint64(vocab_size - first)).astype(np.int32)


def relative_errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[n] float32: per row, error over spread, both root mean squares over the vocabulary; inf where not finite."""
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt().clamp_min(1e-12)
    errors = (logits - expected).square().mean(-1).sqrt() / spread
    return torch.where(torch.isfinite(errors), errors, torch.inf)


@dataclass(slots=True)
class _Script:
    """One run of the target; collects (tokens on the path to a node, the node's logits)."""

    target: TargetModel
    seen: list[tuple[IntArray, torch.Tensor]]

    def step(self, chunks: Sequence[tuple[RequestState, int, DraftTree | None, Sequence[int], int]]) -> None:
        """Forward and commit chunks of (state, prefix tokens, tree, nodes to keep, token that follows them)."""
        made = []
        for state, num_prefix, tree, _, _ in chunks:
            chunk = Chunk(state, state.token_ids[state.num_cached : state.num_cached + num_prefix].copy(), tree)
            if not self.target.reserve(state, chunk.num_tokens):
                raise RuntimeError(f"no room for {chunk.num_tokens} tokens")
            made.append(chunk)
        output = self.target.forward(made)
        row = 0
        for chunk in made:
            if chunk.tree is None:
                continue
            context = chunk.state.token_ids[: chunk.state.num_cached + len(chunk.prefix_ids)]
            for node in range(len(chunk.tree)):
                path = np.concatenate((context, chunk.tree.token_ids[chunk.tree.path(node)]))
                self.seen.append((path, output.logits[row].clone()))
                row += 1
        self.target.commit(made, [keep for _, _, _, keep, _ in chunks])
        for chunk, (state, _, tree, keep, bonus) in zip(made, chunks, strict=True):
            state.num_cached += len(chunk.prefix_ids) + len(keep)
            if tree is not None:
                state.append([*tree.token_ids[list(keep[1:])], bonus])


def _collect(target: TargetModel, prompt_length: int, salt: int) -> list[tuple[IntArray, torch.Tensor]]:
    """Drive the target through the script."""
    ids = scripted_ids(target.vocab_size, prompt_length + _SHORT + 32, salt=salt)
    words = iter(ids[prompt_length + _SHORT :].tolist())
    long, short = (
        RequestState(Request(f"self-test-{salt}-{name}", prompt))
        for name, prompt in (("long", ids[:prompt_length]), ("short", ids[prompt_length : prompt_length + _SHORT]))
    )

    def tree(state: RequestState) -> DraftTree:
        #      root
        #     /    \        keeping 2 and 3 moves them past the rejected 1 and leaves the tail 4 behind
        #    1      2 - 3 - 4
        root, drafts = int(state.token_ids[-1]), [next(words) for _ in range(4)]
        if target.supports_trees and drafts[0] != drafts[1]:
            return DraftTree(np.array([root, *drafts], dtype=np.int32), np.array([-1, 0, 0, 2, 3], dtype=np.int32))
        return DraftTree.chain(root, drafts[1:])

    def chain(state: RequestState, length: int) -> DraftTree:
        return DraftTree.chain(int(state.token_ids[-1]), [next(words) for _ in range(length)])

    script = _Script(target, [])
    half = prompt_length // 2
    first = tree(short)
    keep = [0, 2, 3] if not first.is_chain else [0, 1, 2]
    try:
        script.step([(long, half, None, [], 0), (short, _SHORT - 1, first, keep, next(words))])
        script.step(
            [
                (long, prompt_length - 1 - half, tree(long), [0], next(words)),
                (short, 0, chain(short, 2), [0, 1, 2], next(words)),
            ]
        )
        script.step([(short, 0, chain(short, 0), [0], next(words)), (long, 0, chain(long, 1), [0, 1], next(words))])
        script.step([(long, 0, chain(long, 0), [0], next(words))])
    finally:
        for state in (long, short):
            target.release(state)
    return script.seen


def _errors(reference: Reference, seen: Sequence[tuple[IntArray, torch.Tensor]]) -> torch.Tensor:
    """[n] relative error of every node. One ordinary forward serves all nodes on one path."""
    errors = torch.full((len(seen),), torch.inf)
    by_length = sorted(range(len(seen)), key=lambda i: -len(seen[i][0]))
    done: list[tuple[IntArray, torch.Tensor]] = []
    for index in by_length:
        path, logits = seen[index]
        rows = next((rows for longer, rows in done if np.array_equal(longer[: len(path)], path)), None)
        if rows is None:
            rows, _ = reference.row(path, first_row=0)
            done.append((path, rows))
        errors[index] = relative_errors(logits[None], rows[len(path) - 1][None])[0].cpu()
    return errors


def run_self_test(target: TargetModel, reference: Reference, *, windows: Sequence[int] = ()) -> str | None:
    """Try a target against ordinary forwards.

    Args:
        target: with room for ``NUM_REQUESTS`` requests and ``NUM_TOKENS`` tokens; nothing is left in it.
        reference: of the same model.
        windows: of its attention; the longer prompt crosses those up to a few hundred tokens.

    Returns:
        None if every node agreed, else what went wrong, in words.
    """
    crossed = [window for window in windows if window <= _MAX_WINDOW]
    prompt_length = max([24, *(window + 9 for window in crossed)])
    prompt_length = min(prompt_length, target.max_length - 16)
    worst = None
    for salt in range(_NUM_ROUNDS):
        try:
            seen = _collect(target, prompt_length, salt)
        except Exception as error:  # noqa: BLE001  -- whatever a model raises here, another path is the answer
            return f"the self-test raised {type(error).__name__}: {error}"
        errors = _errors(reference, seen)
        worst = errors if worst is None else torch.minimum(worst, errors)
        dtype = seen[0][1].dtype
        tolerance = reference.tolerance(dtype)
        if float(worst.max()) <= tolerance:
            return None
        if dtype not in _ROUNDING:
            break
    assert worst is not None
    num_wrong = int((worst > tolerance).sum())
    return (
        f"the self-test found {num_wrong} of {len(worst)} nodes with other logits than ordinary forwards: relative "
        f"error {float(worst.max()):.2g}, rounding explains {tolerance:.2g}"
    )
