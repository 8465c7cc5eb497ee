"""Runs a drafter in an engine and keeps what it proposed."""

from __future__ import annotations

from typing import Any

from specdec.build import build_engine
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent

__all__ = ["Watch", "run"]


class Watch:
    """Keeps the trees of every step with the text that they were drafted for."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], DraftTree]] = []

    def observe(self, events: list[StepEvent]) -> None:
        for event in events:
            before = event.state.num_tokens - len(event.emitted_ids)
            self.seen.append((event.state.token_ids[:before].tolist(), event.tree))


def run(
    target: Any, drafter: Any, prompts: list[Any], num_new: int = 12, *, budget: int = 9, verifier: str = "match",
    tokenizer: Any = None,     **law: Any,
) -> tuple[list[RequestState], Watch]:  # fmt: skip
    """Decode prompts in pieces of 16 tokens; the drafter must hold nothing afterwards."""
    watch = Watch()
    sampling = SamplingParams(max_new_tokens=num_new, seed=5, **law)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
    options: dict[str, Any] = {"max_prefill_tokens": 16, "verifier": verifier}
    with build_engine(target, drafter, budget=budget, observers=[watch], tokenizer=tokenizer, **options) as engine:
        last = {output.request_id: output.state for output in engine.generate(requests)}
        assert getattr(engine.drafter, "num_used", 0) == 0
    return [last[request.request_id] for request in requests], watch
