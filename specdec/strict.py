"""Strict numerics: logits of a token have the same bits however it is decoded. May this model have them, and does it?

Strict attention and products see to what depends on the number of tokens in a step: packed layers on a CPU, Triton
kernels of fixed tiles on a GPU. Whether the rest of a model does (its norms and activations do not, as a rule) is not
believed but tried: a path decoded one token at a time, and the same path as a branch of a tree behind a prompt that is
cut elsewhere, beside another request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec.errors import InternalError, UnsupportedError
from specdec.protocols import TargetModel
from specdec.reference import scripted_ids
from specdec.routes import Route
from specdec.types import Chunk, DraftTree, IntArray, Request, RequestState

__all__ = ["require_same_bits", "require_strict_path"]

_NUM_PROMPT, _CUT, _NUM_PATH, _NUM_OTHER = 33, 20, 6, 70
_NUM_SLOTS = 128  # that all of this takes at a time


def require_strict_path(route: Route, *, by_kernels: bool) -> None:
    """Refuse a model whose attention cannot be computed strictly.

    Args:
        route: of the model.
        by_kernels: the Triton kernels attend, which know every kind of attention.

    Raises:
        UnsupportedError: with the reason.
    """
    if route.kind != "tree":
        raise UnsupportedError(f'numerics="strict" needs the tree path, but this model takes the {route.kind} path')
    for call in () if by_kernels else route.calls:
        if call.softcap is not None or call.has_sinks or call.key_dim != call.value_dim:
            raise UnsupportedError(
                f'numerics="strict" knows no soft-cap, no sinks, and no values of another width than keys, but '
                f"{call.layer_name} has one of them"
            )


def require_same_bits(target: TargetModel) -> None:
    """Decode one path in two ways and compare the logits, bit for bit; nothing is left in the target.

    Raises:
        UnsupportedError: they differ.
    """
    length = min(_NUM_PROMPT, target.max_length - _NUM_PATH - 1)
    ids = scripted_ids(target.vocab_size, length + _NUM_PATH + _NUM_OTHER, salt=4)
    if length < 3 or not target.fits(_NUM_SLOTS):
        raise UnsupportedError(
            f'numerics="strict" is tried before it is used, which takes max_length >= 10 and kv_tokens >= {_NUM_SLOTS}'
        )
    prompt, path, other = np.split(ids, [length, length + _NUM_PATH])
    alone, drafted = _one_by_one(target, prompt, path), _in_a_tree(target, prompt, path, other[: target.max_length - 1])
    num_wrong = int((alone != drafted).any(-1).sum())
    if num_wrong:
        raise UnsupportedError(
            f'numerics="strict" is impossible here: {num_wrong} of {len(alone)} tokens have other bits in a tree than '
            f"decoded one by one (torch {torch.__version__}, {torch.get_num_threads()} threads)"
        )


def _run(target: TargetModel, chunks: Sequence[tuple[RequestState, int, DraftTree | None]]) -> torch.Tensor:
    """One step: (request, prefix tokens, tree) each; of a tree its root is kept. Logits of all nodes, in order."""
    made = []
    for state, num_prefix, tree in chunks:
        chunk = Chunk(state, state.token_ids[state.num_cached : state.num_cached + num_prefix].copy(), tree)
        if not target.reserve(state, chunk.num_tokens):
            raise InternalError(f"no room for {chunk.num_tokens} tokens in an empty pool")
        made.append(chunk)
    logits = target.forward(made).logits.clone()
    target.commit(made, [[] if chunk.tree is None else [0] for chunk in made])
    for chunk in made:
        chunk.state.num_cached += len(chunk.prefix_ids) + (chunk.tree is not None)
    return logits


def _one_by_one(target: TargetModel, prompt: IntArray, path: IntArray) -> torch.Tensor:
    """[1 + L, V]: after the prompt, and after each token of the path."""
    state = RequestState(Request("strict-alone", prompt))
    try:
        _run(target, [(state, len(prompt) - 1, None)])
        rows = []
        for token in (*path.tolist(), 0):
            rows.append(_run(target, [(state, 0, DraftTree.root_only(int(state.token_ids[-1])))]))
            state.append([token])
        return torch.cat(rows)
    finally:
        target.release(state)


def _in_a_tree(target: TargetModel, prompt: IntArray, path: IntArray, other: IntArray) -> torch.Tensor:
    """The same rows, from one step: every node of the path has a wrong sibling before it."""
    state, neighbour = RequestState(Request("strict-tree", prompt)), RequestState(Request("strict-other", other))
    tokens, parents, nodes = [int(prompt[-1])], [-1], [0]
    for token, wrong in zip(path.tolist(), other.tolist(), strict=False):
        parents += [nodes[-1], nodes[-1]]
        tokens += [wrong, token]
        nodes.append(len(tokens) - 1)
    tree = DraftTree(np.array(tokens, dtype=np.int32), np.array(parents, dtype=np.int32))
    try:
        _run(target, [(state, min(_CUT, len(prompt) - 1), None)])
        prefix = len(prompt) - 1 - state.num_cached
        logits = _run(target, [(state, prefix, tree), (neighbour, len(other) - 1, None)])
        return logits[nodes]
    finally:
        target.release(state)
        target.release(neighbour)
