"""Engines that are broken on purpose: what cannot see these is not worth believing.

They run through the same comparisons as the real engine, on little input, and must be called bugs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from specdec.check.lab import HOSTILE, PLAIN
from specdec.check.laws import compare_laws
from specdec.check.report import Control
from specdec.check.settings import GREEDY, Setting
from specdec.types import DraftTree, IntArray, RequestState, TargetOutput, VerifyResult

if TYPE_CHECKING:
    from specdec.check.difference import Judge
    from specdec.engine import Engine
    from specdec.protocols import Verifier

__all__ = ["MAX_SAMPLES", "NUM_REQUESTS", "CarelessVerifier", "run_controls"]

NUM_REQUESTS: Final = 4
_EVERY: Final = 3  # in steps
MAX_SAMPLES: Final = 300


class CarelessVerifier:
    """Accepts a child of the root that the target did not draw, now and then (`specdec.protocols.Verifier`).

    Args:
        verifier: decides in all other steps, and where there is no such child.
        every: in every how many steps of a request; 1 = always.
    """

    def __init__(self, verifier: Verifier, *, every: int) -> None:
        self._verifier = verifier
        self._every = every
        self.draws = verifier.draws
        self.is_lossless = False

    def start(self, state: RequestState) -> None:
        self._verifier.start(state)

    def verify(
        self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
    ) -> list[VerifyResult]:
        results = self._verifier.verify(states, trees, output)
        return [
            self._careless(tree, result) if state.num_steps % self._every == self._every - 1 else result
            for state, tree, result in zip(states, trees, results, strict=True)
        ]

    def _careless(self, tree: DraftTree, result: VerifyResult) -> VerifyResult:
        children = np.flatnonzero(tree.parents == 0).astype(np.int32)
        wrong = children[~np.isin(children, result.accepted_nodes)][:1]
        return VerifyResult(wrong, tree.token_ids[wrong], result.bonus_id) if len(wrong) else result

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        self._verifier.commit(state, emitted_ids)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._verifier.stop(request_ids)


def run_controls(judge: Judge, law: Setting, prompt_ids: IntArray, *, num_samples: int) -> list[Control]:
    """Break the engine in two ways and see whether the comparisons notice.

    Args:
        judge: of the real check; its plain outputs are the reference.
        law: setting of the two-sample control.
        prompt_ids: [P] int32: its prompt.
        num_samples: of each side, at most; 0 leaves the two-sample control out.
    """
    lab = judge.lab
    requests = lab.plan.requests(GREEDY)[:NUM_REQUESTS]

    def sometimes(engine: Engine) -> None:
        engine.verifier = CarelessVerifier(engine.verifier, every=_EVERY)

    def always(engine: Engine) -> None:
        engine.verifier = CarelessVerifier(engine.verifier, every=1)

    got = lab.decode(requests, lab.drafter(GREEDY, HOSTILE), tamper=sometimes)
    # Mistakes on purpose are not worth the memory of a second model.
    comparison = replace(judge, measures=False).compare(GREEDY, HOSTILE, PLAIN, got=got)
    controls = [
        Control(
            f"greedy: a verifier that takes a wrong token in one step of {_EVERY}",
            is_caught=comparison.num_bugs > 0,
        )
    ]
    if num_samples:
        test = compare_laws(
            lab, law, prompt_ids, num_samples=min(num_samples, MAX_SAMPLES), knows_likely=False, tamper=always
        )
        controls.append(
            Control("two samples: a verifier that takes a wrong token wherever one is drafted", is_caught=test.is_bug)
        )
    return controls
