"""What observers are told of a step."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.errors import InternalError
from specdec.types import Chunk, IntArray, StepEvent, StepTrace, TargetOutput, VerifyResult

__all__ = ["step_events"]


def step_events(
    decoding: Sequence[Chunk],
    output: TargetOutput,
    results: Sequence[VerifyResult],
    emitted: Sequence[IntArray],
    times: Sequence[float],
    target_ms: float,
) -> list[StepEvent]:
    """Of every request; ``times`` are when drafting began and ended, and when verification and commit ended."""
    draft_ms, verified_ms, commit_ms = (1e3 * (b - a) for a, b in zip(times, times[1:], strict=False))
    verify_ms = max(verified_ms - target_ms, 0.0)
    events: list[StepEvent] = []
    for row, (chunk, result, ids) in enumerate(zip(decoding, results, emitted, strict=True)):
        state, tree = chunk.state, chunk.tree
        if tree is None:
            raise InternalError("a chunk without a tree was verified")
        trace = StepTrace(
            request_id=state.request_id,
            step=state.num_steps,
            position=state.num_tokens - len(ids),
            num_draft_tokens=tree.num_draft_tokens,
            num_accepted=result.num_accepted,
            num_emitted=len(ids),
            batch_size=len(decoding),
            draft_ms=draft_ms,
            target_ms=target_ms,
            verify_ms=verify_ms,
            commit_ms=commit_ms,
        )
        events.append(StepEvent(state, tree, result, output, row, ids, trace))
    return events
