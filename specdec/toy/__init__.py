"""Public test doubles: a target without a model, and drafters that know everything or nothing.

With them a new drafter, controller or verifier is tested in milliseconds and exactly.

Example:
    >>> import numpy as np
    >>> from specdec.controller import FixedController
    >>> from specdec.drafters.ngram import NgramDrafter
    >>> from specdec.engine import Engine
    >>> from specdec.sampling import Sampler
    >>> from specdec.toy import ToyTarget
    >>> from specdec.types import Request, SamplingParams
    >>> from specdec.verifier.match import MatchVerifier
    >>> target = ToyTarget(vocab_size=50, seed=3, order=1)  # order 1: the text repeats itself
    >>> request = Request("a", np.array([7]), SamplingParams(max_new_tokens=100))
    >>> def decode(budget):
    ...     engine = Engine(target, MatchVerifier(Sampler(50)), NgramDrafter(), FixedController(budget))
    ...     return list(engine.generate([request]))[-1].state
    >>> plain, speculative = decode(budget=0), decode(budget=8)
    >>> bool((plain.output_ids == speculative.output_ids).all()), plain.num_steps, speculative.num_steps
    (True, 100, 20)
"""

from __future__ import annotations

from specdec.toy.doubles import OracleDrafter, RandomTreeDrafter, ScriptedSampler
from specdec.toy.target import ToyTarget

__all__ = ["OracleDrafter", "RandomTreeDrafter", "ScriptedSampler", "ToyTarget"]
