"""Engines over tiny models for tests: the routed target, any drafter, requests that arrive while others run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.chain_target import ChainTarget
from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.plain_target import PlainTarget
from specdec.protocols import Drafter, TargetModel
from specdec.routes import Route
from specdec.sampling import Sampler
from specdec.tree_target import TreeTarget
from specdec.types import Request, RequestState, SamplingParams
from specdec.verifier.match import MatchVerifier

MAX_LENGTH = 200
PIECE = 7  # prompt tokens per step: longer prompts come in pieces, and prefill shares steps with decoding


def target_for(model, route: Route, *, kv_tokens: int = 600) -> TargetModel:
    """The target of the route's kind."""
    if route.kind == "tree":
        return TreeTarget(
            model, route.calls, kv_tokens=kv_tokens, max_length=MAX_LENGTH, max_batch_size=5, max_step_tokens=PIECE
        )
    max_draft_tokens = 64 if route.can_draft else 0
    if route.kind == "chain":
        return ChainTarget(model, kv_tokens=kv_tokens, max_length=MAX_LENGTH, max_draft_tokens=max_draft_tokens)
    return PlainTarget(model, max_length=MAX_LENGTH, max_draft_tokens=max_draft_tokens)


def serve(
    target: TargetModel,
    drafter: Drafter,
    prompts: Sequence[np.ndarray],
    sampling: Sequence[SamplingParams],
    *,
    budget: int,
    num_late: int = 0,
) -> list[RequestState]:
    """The finished requests; the last ``num_late`` ones are submitted when the others are some steps ahead."""
    config = EngineConfig(max_batch_size=5, max_prefill_tokens=PIECE)
    engine = Engine(target, MatchVerifier(Sampler(target.vocab_size)), drafter, FixedController(budget), config=config)
    requests = [Request(str(i), p, s) for i, (p, s) in enumerate(zip(prompts, sampling, strict=True))]
    early = len(requests) - num_late
    states = [engine.submit(request) for request in requests[:early]]
    for _ in range(4 if num_late else 0):
        engine.step()
    states += [engine.submit(request) for request in requests[early:]]
    while engine.has_work:
        engine.step()
    return states


def texts(states: Sequence[RequestState]) -> list[list[int]]:
    """What each request wrote."""
    return [state.output_ids.tolist() for state in states]
