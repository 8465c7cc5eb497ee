"""Does a target compute what the model itself computes? A few short forwards decide.

Flags of a model class are neither necessary nor sufficient, so a path that looks right is tried before it is trusted:
two requests of different length go through prefill in pieces, a tree with a rejected branch and a rejected tail, a
tree that is rejected whole, and an accepted chain. Which tokens are "accepted" is scripted, so nothing is sampled, and
every node's logits must be those of an ordinary forward over the tokens on the path to it. Ordinary forwards in turn
must be what ``model.generate`` does, which a transcript of a few of its tokens shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from specdec.protocols import TargetModel
from specdec.reference import Reference, Transcript, relative_errors, scripted_ids
from specdec.types import Chunk, DraftTree, IntArray, Request, RequestState

__all__ = ["NUM_REQUESTS", "NUM_TOKENS", "run_decoding_test", "run_self_test"]

NUM_REQUESTS = 2
NUM_TOKENS = 640  # room that a target needs for the script
_SHORT = 6
_MAX_WINDOW = 256  # longer windows are left to the probe's predicate: crossing them would make the test expensive

# A request, how many prefix tokens it feeds, its tree, the nodes to keep, the token that follows them.
_Part: TypeAlias = tuple[RequestState, int, DraftTree | None, Sequence[int], int]


@dataclass(slots=True)
class _Script:
    """One run of the target; collects (tokens on the path to a node, the node's logits)."""

    target: TargetModel
    seen: list[tuple[IntArray, torch.Tensor]]

    def step(self, chunks: Sequence[_Part]) -> None:
        """Forward and commit one chunk per part."""
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
            rows = reference.row(path, first_row=0)
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
    prompt_length = max(4, min(prompt_length, target.max_length - 10))
    worst = None
    for salt in range(reference.num_rounds):
        try:
            seen = _collect(target, prompt_length, salt)
        except Exception as error:  # noqa: BLE001  -- whatever a model raises here, another path is the answer
            return f"the self-test raised {type(error).__name__}: {error}"
        errors = _errors(reference, seen)
        worst = errors if worst is None else torch.minimum(worst, errors)
        if float(worst.max()) <= reference.tolerance:
            return None
    assert worst is not None
    tolerance = reference.tolerance
    num_wrong = int((worst > tolerance).sum())
    return (
        f"the self-test found {num_wrong} of {len(worst)} nodes with other logits than ordinary forwards: relative "
        f"error {float(worst.max()):.2g}, rounding explains {tolerance:.2g}"
    )


def run_decoding_test(target: TargetModel, reference: Reference) -> str | None:
    """Decode two prompts side by side, without drafts, against the logits of ``model.generate``.

    Returns:
        None if every token agreed, else what went wrong, in words.
    """
    ids = scripted_ids(target.vocab_size, 19, salt=8)
    states: list[RequestState] = []
    errors = []
    try:
        transcripts = [
            Transcript.of(reference.row.model, reference.row.device, prompt, 3) for prompt in (ids[:12], ids[12:])
        ]
        states = [
            RequestState(Request(f"self-test-{i}", transcript.token_ids[: transcript.num_prompt_tokens]))
            for i, transcript in enumerate(transcripts)
        ]
        script = _Script(target, [])
        script.step([(state, 2, None, [], 0) for state in states])
        for step in range(3):
            script.seen = []
            parts: list[_Part] = []
            for state, transcript in zip(states, transcripts, strict=True):
                root = DraftTree.root_only(int(state.token_ids[-1]))
                bonus = int(transcript.token_ids[state.num_tokens])
                parts.append((state, state.num_tokens - 1 - state.num_cached, root, [0], bonus))
            script.step(parts)
            for (_, logits), transcript in zip(script.seen, transcripts, strict=True):
                errors.append(float(relative_errors(logits[None], transcript.logits[step][None])))
    except Exception as error:  # noqa: BLE001  -- whatever a model raises here, another path is the answer
        return f"decoding token by token raised {type(error).__name__}: {error}"
    finally:
        for state in states:
            target.release(state)
    if max(errors) <= reference.tolerance:
        return None
    return f"decoding token by token gives other logits than generate: relative error {max(errors):.2g}"
