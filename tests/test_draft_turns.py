from __future__ import annotations

import numpy as np

from specdec.bench.adaptive_speed import decode_seconds
from specdec.bench.arms import JobResult
from specdec.draft_turns import DraftTurns


def drafted_share(worth: float, *, price: float = 0.2, steps: int = 2000, length: int = 80) -> float:
    """How often 16 requests at a time were drafted for, each of ``length`` steps."""
    turns, count = DraftTurns(), 0
    for step in range(steps):
        for slot in range(16):
            name = f"{slot}-{(step + 5 * slot) // length}"
            if turns.may_draft(name):
                turns.note(name, worth, price)
                count += 1
    return count / (16 * steps)


def test_who_gains_is_drafted_for_in_every_step_and_who_does_not_hardly_ever() -> None:
    assert drafted_share(0.5) > 0.999
    assert drafted_share(0.1) < 0.03


def test_a_request_that_begins_to_copy_is_found() -> None:
    turns, rng, found = DraftTurns(), np.random.default_rng(0), 0
    for step in range(3000):
        for name in range(8):
            copies = (step + 37 * name) % 200 < 60
            if turns.may_draft(str(name)):
                turns.note(str(name), 3.0 * rng.random() if copies else 0.0, 0.1)
                found += copies
    assert found > 0.7 * 3000 * 8 * 60 / 200


def test_requests_that_left_are_forgotten() -> None:
    turns = DraftTurns()
    for name in ("a", "b"):
        assert turns.may_draft(name)
        turns.note(name, 0.0, 1.0)
    turns.keep({"b"})
    assert len(turns) == 1


def test_decoding_is_timed_where_all_requests_decode() -> None:
    first = JobResult([], 0, stamps=[1.0, 2.0, 3.0, 4.0], emitted=[1, 2, 1, 1], accepted=[], start_s=0.0)
    other = JobResult([], 0, stamps=[1.5, 2.5], emitted=[1, 3], accepted=[], start_s=0.5)
    # 2.0 has the other's first token, 4.0 only one request: what is left is 3.0.
    assert decode_seconds([first, other], 2) == (4, 1.0)
    assert decode_seconds([first], 1) == (4, 3.0)
