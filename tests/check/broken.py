"""Ways to break an engine; each takes the engine that ``build_engine`` made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from specdec.build import build_engine
from specdec.check.controls import CarelessVerifier
from specdec.device_work import HostCopy, start_copy
from specdec.engine import Engine
from specdec.rng import gumbel
from specdec.sampling import Sampler
from specdec.types import Chunk, DraftTree, RequestState, TargetOutput
from specdec.verifier.match import MatchVerifier


def factory(breaking: Callable[[Engine], None]) -> Callable[..., Engine]:
    """An engine factory whose engines are broken."""

    def build(*args: Any, **options: Any) -> Engine:
        engine = build_engine(*args, **options)
        breaking(engine)
        return engine

    return build


def accept_a_wrong_child(engine: Engine) -> None:
    engine.verifier = CarelessVerifier(engine.verifier, every=1)


def keep_a_wrong_node(engine: Engine) -> None:
    """The cache keeps the KV of a sibling in place of the last accepted node."""
    commit = engine.target.commit

    def wrong(chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        mistaken = []
        for chunk, nodes in zip(chunks, keep, strict=True):
            size = len(chunk.tree) if chunk.tree is not None else 0
            others = [node for node in range(nodes[-2] + 1, size) if node != nodes[-1]] if len(nodes) > 1 else []
            mistaken.append([*nodes[:-1], others[0]] if others else list(nodes))
        commit(chunks, mistaken)

    engine.target.commit = wrong  # type: ignore[method-assign]


class _OddSampler(Sampler):
    """Draws with noise at other positions, or from other scores, than it should; greedy requests are left alone."""

    def __init__(self, vocab_size: int, *, factor: float = 1.0, keys_by_node: bool = False) -> None:
        super().__init__(vocab_size)
        self._factor = factor
        self._keys_by_node = keys_by_node

    def launch(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> HostCopy:
        if all(state.request.sampling.is_greedy for state in states):
            return super().launch(states, trees, output)
        sizes = [len(tree) for tree in trees]
        seeds = np.repeat([state.request.sampling.seed for state in states], sizes)
        offsets = [np.arange(len(tree)) if self._keys_by_node else tree.depths() for tree in trees]
        positions = np.repeat([state.num_tokens for state in states], sizes) + np.concatenate(offsets)
        noise = gumbel(seeds, positions, self.vocab_size, device="cpu")
        scores = self._factor * self.scores(states, trees, output)
        return start_copy((scores + noise).argmax(dim=-1))


def key_noise_by_node(engine: Engine) -> None:
    """Noise belongs to the node's place in its tree, not to the position of its token."""
    engine.verifier = MatchVerifier(_OddSampler(engine.target.vocab_size, keys_by_node=True))


def draw_from_another_law(engine: Engine) -> None:
    """Draws from a sharper law, and does so with any drafter: token for token all is well."""
    engine.verifier = MatchVerifier(_OddSampler(engine.target.vocab_size, factor=2.0))


def round_otherwise(engine: Engine) -> None:
    """What another order of computing does to bfloat16 logits: some come out one unit in the last place away."""
    _disturb(engine, (torch.bfloat16,))


def round_coarsely(engine: Engine) -> None:
    """Errors of the size of bfloat16's in every precision: in float32 they are no rounding."""
    _disturb(engine, (torch.bfloat16, torch.float32))


def _disturb(engine: Engine, dtypes: tuple[torch.dtype, ...]) -> None:
    forward = engine.target.forward

    def noisy(chunks: Sequence[Chunk]) -> TargetOutput:
        output = forward(chunks)
        if output.logits.dtype not in dtypes or all(c.tree is None or len(c.tree) == 1 for c in chunks):
            return output
        signs = (torch.arange(output.logits.numel()) * 7919 % 3 - 1).reshape(output.logits.shape)
        return TargetOutput(output.logits * (1 + signs * 2**-7).to(output.logits.dtype), output.cu_nodes)

    engine.target.forward = noisy  # type: ignore[method-assign]
