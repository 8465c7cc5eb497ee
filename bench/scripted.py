"""Simulation: the engine with a target that recites the recording, so that drafts are judged without a model.

Everything but the forward pass is the engine's own: scheduler, controller, drafter, the match rule, the stop at the
last token. So a simulation and a replay accept the same tokens, whoever drafts, as long as the drafter reads text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from specdec.adaptive import controller_for
from specdec.bench.forcing import ForcedResponse
from specdec.build import build_drafter
from specdec.config import EngineConfig
from specdec.engine import Engine
from specdec.errors import ConfigError, InternalError
from specdec.protocols import Drafter, Observer
from specdec.types import Chunk, DraftTree, IntArray, Request, RequestState, SamplingParams, TargetOutput
from specdec.verifier.match import MatchVerifier

__all__ = ["ScriptedTarget", "scripted_engine", "serve_scripted"]

_MAX_DRAFT_TOKENS = 256  # of one step, as the tree target has it
_MAX_LENGTH = 1 << 22  # longer than any recorded call


class ScriptedTarget:
    """A target that scores nothing (`specdec.protocols.TargetModel`).

    Args:
        vocab_size: token ids must be below it.
    """

    supports_trees = True
    max_draft_tokens = _MAX_DRAFT_TOKENS
    max_length = _MAX_LENGTH

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ConfigError(f"vocab_size must be at least 1, got {vocab_size}")
        self.vocab_size = vocab_size

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        return True

    def has_room(self, num_tokens: int) -> bool:
        return True

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_length

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        sizes = [len(chunk.tree) for chunk in chunks if chunk.tree is not None]
        cu_nodes = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        return TargetOutput(torch.empty(int(cu_nodes[-1]), 0), cu_nodes)  # [T, 0]: there is nothing to read

    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        """Nothing is held, so nothing is dropped."""

    def recall(self, state: RequestState) -> int:
        return 0

    def retire(self, state: RequestState) -> None:
        self.release(state)

    def release(self, state: RequestState) -> None:
        """Nothing is held."""


class _ScriptedSampler:
    """Gives the recorded token after every node, by its depth (`specdec.verifier.match.TargetSampler`)."""

    def __init__(self) -> None:
        self._scripts: dict[str, IntArray] = {}

    def start(self, state: RequestState) -> None:
        for processor in state.request.sampling.logits_processors:
            if isinstance(processor, ForcedResponse):
                self._scripts[state.request_id] = processor.responses[0].astype(np.int32)
                return
        raise InternalError(f"request {state.request_id!r} has no recorded response to recite")

    def target_ids(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> IntArray:
        parts = []
        for state, tree in zip(states, trees, strict=True):
            script = self._scripts[state.request_id]
            # Behind the end of the recording there is no token: -1 equals no draft token.
            places = np.minimum(state.num_output_tokens + tree.depths(), len(script))
            parts.append(np.append(script, np.int32(-1))[places])
        return np.concatenate(parts)

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        """The place in the recording is the number of tokens that are out."""

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._scripts.pop(request_id, None)


def scripted_engine(
    vocab_size: int,
    drafter: Drafter,
    *,
    budget: int | None = None,
    observers: Sequence[Observer] = (),
    target: ScriptedTarget | None = None,
    **options: Any,
) -> Engine:
    """``build_engine`` without a model: requests must carry their response as a ``ForcedResponse``.

    Args:
        vocab_size: token ids must be below it.
        drafter: guesses; it must not read logits.
        budget: most draft tokens per step; None: follows what is accepted.
        observers: see every step.
        target: recites; a plain one if None.
        **options: fields of ``EngineConfig``.
    """
    # A prompt costs nothing here, so it is never cut into pieces.
    config = EngineConfig.of(**{"max_prefill_tokens": _MAX_LENGTH, **options})
    return Engine(
        target or ScriptedTarget(vocab_size),
        MatchVerifier(_ScriptedSampler()),
        build_drafter(drafter),
        controller_for([drafter], budget),
        config=config,
        observers=observers,
    )


def serve_scripted(drafter: Drafter, calls: Sequence[tuple[IntArray, IntArray]], vocab_size: int, budget: int) -> None:
    """Let a drafter serve calls one after the other without a model, so that it learns as in service.

    Args:
        drafter: it must not read logits.
        calls: prompt [P] int32 and recorded answer [G] int32 of each.
        vocab_size: token ids must be below it.
        budget: most draft tokens per step.
    """
    with scripted_engine(vocab_size, drafter, budget=budget, max_batch_size=1) as engine:
        for number, (prompt_ids, response_ids) in enumerate(calls):
            forced = ForcedResponse([response_ids], len(prompt_ids))
            sampling = SamplingParams(max_new_tokens=len(response_ids), logits_processors=(forced,))
            for _ in engine.generate([Request(f"scripted-{number}", prompt_ids, sampling)]):
                pass
