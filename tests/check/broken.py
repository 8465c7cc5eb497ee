"""Ways to break an engine; each takes the engine that ``build_engine`` made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from specdec.build import build_engine
from specdec.check.controls import CarelessVerifier
from specdec.engine import Engine
from specdec.sampling import Sampler
from specdec.types import Chunk, TargetOutput
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


class _ByNode(Sampler):
    """Noise that belongs to the node's place in its tree, not to the position of its token."""

    def _noise(self, nodes: Any, seeds: Any, sampled: Any) -> torch.Tensor:
        first = np.repeat([state.num_tokens for state in nodes.states], nodes.sizes)
        start = np.repeat(nodes.starts[:-1], nodes.sizes)
        nodes.__dict__["prefix_lengths"] = first + np.arange(nodes.num_nodes) - start
        return super()._noise(nodes, seeds, sampled)


def key_noise_by_node(engine: Engine) -> None:
    engine.verifier = MatchVerifier(_ByNode(engine.target.vocab_size))


class _Sharper(Sampler):
    """Draws from another law, and does so with any drafter: token for token all is well."""

    def scores(self, *args: Any) -> torch.Tensor:
        return 2 * super().scores(*args)


def draw_from_another_law(engine: Engine) -> None:
    engine.verifier = MatchVerifier(_Sharper(engine.target.vocab_size))


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
