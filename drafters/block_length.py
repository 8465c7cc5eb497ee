"""How much of a guessed block is sent to the target.

A rule that decides whether to send token k by anything that depends on token k, or on a later one, *anticipates*: with
a rejection rule the text would no longer follow the target's law (drop a drawn 2 where p = (.7, .3), q = (.5, .5), and
the output is (.85, .15)). Under match no rule can do harm, because the text is the target's own.

A *chance* is the calibrated probability that a guess is accepted, given that all before it are. A head's confidence
looks at the row and the token before the guess; without a confidence head the law's largest probability stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from specdec.drafters.block_guesses import Chains
from specdec.errors import ConfigError
from specdec.types import RequestState, StepEvent

__all__ = [
    "ApdLength",
    "ChunkLength",
    "EmaLength",
    "FixedLength",
    "LengthRule",
    "ThresholdLength",
    "require",
]

Chances = npt.NDArray[np.float64]


class LengthRule(Protocol):
    """Decides the draft length of each request in each step.

    Attributes:
        anticipates: it decides on a token with a look at that token or at a later one.
        mix: share of the law without Markov head in the law that tokens are drawn from, see ``BlockGuesses``.
    """

    anticipates: bool
    mix: float

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        """For which requests a block is guessed at all; asked once for each step, before any guess."""

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        """How many tokens of each of R chains are sent, 0 to all; ``chances`` is [R, K]."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn what became of the drafts."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Raise ``ConfigError`` that names an option, its rule and its value, unless ``ok``."""
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value}")


class _Always:
    """What rules share that let every request draft in every step."""

    anticipates = False
    mix = 0.0

    def may_draft(self, states: Sequence[RequestState]) -> list[bool]:
        return [True] * len(states)


class _Stateless(_Always):
    """What rules share that learn nothing."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing is held."""


class FixedLength(_Stateless):
    """Always the same length.

    Args:
        length: tokens; 0: the whole block.

    Raises:
        ConfigError: it is negative.
    """

    def __init__(self, length: int = 0) -> None:
        require(length >= 0, "length", ">= 0", length)
        self._length = length

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        whole = chances.shape[1]
        return [min(self._length or whole, whole)] * len(states)


class ThresholdLength(_Stateless):
    """Up to the first token whose chance is below a threshold (DSpark, arXiv 2607.05147, section 3).

    Args:
        at: the threshold, in [0, 1].
        own: 1: look at the probability of the chosen token itself, which anticipates; 0: at its chance.

    Raises:
        ConfigError: the threshold is outside its range.
    """

    def __init__(self, at: float = 0.5, own: int = 0) -> None:
        require(0 <= at <= 1, "at", "in [0, 1]", at)
        self._at = at
        self.anticipates = bool(own)

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        looked_at = chains.values if self.anticipates else chances
        return _leading(looked_at >= self._at)


class ChunkLength(_Stateless):
    """Chunk after chunk while every token of a chunk is likely (FailFast, arXiv 2512.20573).

    The chunk with the first unlikely token is sent whole and ends the draft, so nothing is anticipated. A drafter that
    can guess on makes as many chunks as ``most`` allows; a head has the chunks of its block.

    Args:
        size: tokens of a chunk, >= 1.
        at: smallest chance of a likely token, in [0, 1].
        most: longest draft, >= size.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, size: int = 10, at: float = 0.45, most: int = 60) -> None:
        require(size >= 1, "size", ">= 1", size)
        require(0 <= at <= 1, "at", "in [0, 1]", at)
        require(most >= size, "most", f">= size = {size}", most)
        self.size, self.most = size, most
        self._at = at

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        most = min(self.most, chances.shape[1])
        return [min((count // self.size + 1) * self.size, most) for count in self.likely(chances)]

    def likely(self, chances: Chances) -> list[int]:
        """[R]: the likely tokens before the first unlikely one."""
        return _leading(chances >= self._at)


class EmaLength(_Always):
    """Follows moving averages of what a request drafted and what was accepted (DiffuSpec, arXiv 2510.02358).

    ``n = clip(floor(drafted) + step * [accepted >= drafted], low, high)`` with both averages over past steps.

    Args:
        low: shortest draft, >= 1.
        high: longest draft, >= low.
        step: how much further it goes once everything is accepted, >= 1.
        decay: weight of the past in the averages, in [0, 1).

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, low: int = 2, high: int = 30, step: int = 2, decay: float = 0.5) -> None:
        require(low >= 1, "low", ">= 1", low)
        require(high >= low, "high", f">= low = {low}", high)
        require(step >= 1, "step", ">= 1", step)
        require(0 <= decay < 1, "decay", "in [0, 1)", decay)
        self._low, self._high, self._step, self._decay = low, high, step, decay
        self._averages: dict[str, tuple[float, float]] = {}  # drafted, accepted

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        found = []
        for state in states:
            drafted, accepted = self._averages.get(state.request_id, (float(self._low), float(self._low)))
            wanted = int(drafted) + self._step * (accepted >= drafted)
            found.append(min(max(wanted, self._low), self._high, chances.shape[1]))
        return found

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            if event.tree.num_draft_tokens:
                name, new = event.state.request_id, 1 - self._decay
                depth, accepted = int(event.tree.depths().max()), event.result.num_accepted
                # The first draft counts as it is: there is no past yet.
                drafted, kept = self._averages.get(name, (float(depth), float(accepted)))
                self._averages[name] = drafted + new * (depth - drafted), kept + new * (accepted - kept)

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._averages.pop(request_id, None)


class ApdLength(_Stateless):
    """Up to and with the first token that the law without its Markov head would not have chosen.

    The gate of Adaptive Parallel Decoding (arXiv 2506.00413) with the Markov head as the small causal expert: tokens
    come from the product of experts ``mix * without + (1 - mix) * with``, and the draft ends behind the first one that
    the independent law, with the same noise, would have chosen otherwise. That token is sent, so nothing is
    anticipated.

    Args:
        mix: weight of the independent law, in (0, 1); near 1 everything agrees.

    Raises:
        ConfigError: it is outside its range.
    """

    def __init__(self, mix: float = 0.5) -> None:
        require(0 < mix < 1, "mix", "in (0, 1)", mix)
        self.mix = mix

    def lengths(self, states: Sequence[RequestState], chains: Chains, chances: Chances) -> list[int]:
        return [min(count + 1, chances.shape[1]) for count in _leading(chains.agrees)]


def _leading(good: npt.NDArray[np.bool_]) -> list[int]:
    """[R]: how many entries of each row are True before the first False."""
    counts: list[int] = good.cumprod(axis=1).sum(axis=1).tolist()
    return counts
