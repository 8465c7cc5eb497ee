"""Random requests, trees and logits for the tests of sampling, and the slow way to process them: node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.sampling import Sampler
from specdec.types import DraftTree, Request, RequestState, SamplingParams, TargetOutput
from tests.oracles import random_tree

VOCAB_SIZE = 31


def make_state(
    rng: np.random.Generator, params: SamplingParams, *, name: str = "r", num_prompt: int = 9, num_output: int = 4
) -> RequestState:
    """A request with random committed tokens out of a few, so that tokens and n-grams repeat."""
    tokens = rng.integers(0, 7, size=num_prompt + num_output).astype(np.int32)
    state = RequestState(Request(name, tokens[:num_prompt], params))
    state.append(tokens[num_prompt:])
    return state


def make_tree(rng: np.random.Generator, state: RequestState, max_draft_tokens: int = 9) -> DraftTree:
    """A random tree on the state's last token."""
    return random_tree(rng, 7, max_draft_tokens, root=int(state.token_ids[-1]))


def make_logits(rng: np.random.Generator, num_rows: int, vocab_size: int = VOCAB_SIZE, *, ties: bool = True) -> Tensor:
    """Random logits, with exact ties unless they are unwanted."""
    values = rng.normal(0, 3, size=(num_rows, vocab_size)).astype(np.float32)
    if ties:
        values[:, ::5] = np.round(values[:, ::5])
    return torch.from_numpy(values)


def as_output(logits: Tensor, trees: Sequence[DraftTree]) -> TargetOutput:
    """The target's answer with these logits."""
    return TargetOutput(logits, np.cumsum([0, *map(len, trees)], dtype=np.int32))


def prefix_of(state: RequestState, tree: DraftTree, node: int) -> list[int]:
    """The committed tokens and the draft tokens on the way to a node."""
    return [*state.token_ids.tolist(), *(int(tree.token_ids[i]) for i in tree.path(node)[1:])]


def plain_scores(
    states: Sequence[RequestState],
    trees: Sequence[DraftTree],
    logits: Tensor,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] | dict[str, Any],
) -> Tensor:
    """What transformers' processors make of each node alone, called with the node's prefix as a batch of one."""
    rows = []
    for state, tree in zip(states, trees, strict=True):
        mine = processors[state.request_id] if isinstance(processors, dict) else processors
        for node in range(len(tree)):
            row = logits[len(rows) : len(rows) + 1].float().clone()
            rows.append(LogitsProcessorList(mine)(torch.tensor([prefix_of(state, tree, node)]), row))
    return torch.cat(rows)


def start(states: Sequence[RequestState], vocab_size: int = VOCAB_SIZE) -> Sampler:
    """A sampler that knows the requests."""
    sampler = Sampler(vocab_size)
    for state in states:
        sampler.start(state)
    return sampler


def reachable(trees: Sequence[DraftTree], scores: Tensor) -> Tensor:
    """[T] bool: the nodes that no ancestor's scores make impossible."""
    possible: list[bool] = []
    for tree in trees:
        first = len(possible)
        for node, parent in enumerate(tree.parents):
            above = first + int(parent)
            possible.append(node == 0 or (possible[above] and bool(scores[above, tree.token_ids[node]] > -torch.inf)))
    return torch.tensor(possible)
