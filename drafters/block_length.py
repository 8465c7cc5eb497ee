"""How much of a guessed block is sent to the target.

A rule that decides whether to send token k by anything that depends on token k, or on a later one, *anticipates*: with
a rejection rule the text would no longer follow the target's law (drop a drawn 2 where p = (.7, .3), q = (.5, .5), and
the output is (.85, .15)). Under match no rule can do harm, because the text is the target's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.drafters.block_guesses import Chains
from specdec.errors import ConfigError
from specdec.types import RequestState, StepEvent

__all__ = ["FixedLength", "LengthRule"]


class LengthRule(Protocol):
    """Decides the draft length of each request in each step.

    Attributes:
        anticipates: it decides on a token with a look at that token or at a later one.
        mix: share of the law without Markov head in the law that tokens are drawn from, see ``BlockGuesses``.
    """

    anticipates: bool
    mix: float

    def lengths(self, states: Sequence[RequestState], chains: Chains) -> list[int]:
        """How many tokens of each chain are sent, 0 to all."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn what became of the drafts."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


class FixedLength:
    """Always the same length.

    Args:
        length: tokens; 0: the whole block.

    Raises:
        ConfigError: it is negative.
    """

    anticipates = False
    mix = 0.0

    def __init__(self, length: int = 0) -> None:
        if length < 0:
            raise ConfigError(f"length must be >= 0, got {length}")
        self._length = length

    def lengths(self, states: Sequence[RequestState], chains: Chains) -> list[int]:
        whole = chains.token_ids.shape[1]
        return [min(self._length or whole, whole)] * len(states)

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing is held."""
