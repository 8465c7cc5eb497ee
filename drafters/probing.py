"""Finds out how a checkpoint has to be read where its configuration may be wrong and no shape shows it.

Published checkpoints differ in how layers are counted, which rotary base was used in training whatever the
configuration says, and more. A wrong reading costs most of the acceptance and no error.
Every plausible reading is tried on a short text: the head, fed with the target's true states, should name the target's
own next token. The stated reading is kept unless another one is clearly better.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBE_TEXT", "Reading", "best_reading", "choose_reading", "differences", "probe_ids"]

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound="DataclassInstance")
_CLEARLY = 0.05  # agreement by which another reading must beat the stated one
_NUM_PROBED = 200  # tokens
PROBE_TEXT = '''\
The quick way to sort a list of numbers is to use the built-in function. Here is an example:

def largest(numbers, count):
    """Return the largest numbers, in descending order."""
    if count < 0:
        raise ValueError("count must not be negative")
    ordered = sorted(numbers, reverse=True)
    return ordered[:count]


def smallest(numbers, count):
    """Return the smallest numbers, in ascending order."""
    if count < 0:
        raise ValueError("count must not be negative")
    ordered = sorted(numbers)
    return ordered[:count]

The first function sorts the list in descending order and returns the first elements. The second function does the
same in ascending order. Both raise an error if the count is negative.
'''


@dataclass(frozen=True, slots=True)
class Reading(Generic[Config]):
    """One way of reading a checkpoint, and the share of positions where it names the target's next token."""

    config: Config
    agreement: float


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text that readings are tried on, as tokens."""
    ids: list[int] = tokenizer(PROBE_TEXT, add_special_tokens=True)["input_ids"][:_NUM_PROBED]
    return ids


def best_reading(readings: Sequence[Reading[Config]]) -> Reading[Config]:
    """The first, stated one, unless another one is clearly better."""
    best = max(readings, key=lambda reading: reading.agreement)
    return readings[0] if best.agreement < readings[0].agreement + _CLEARLY else best


def differences(stated: DataclassInstance, best: DataclassInstance) -> dict[str, str]:
    """What another reading changes: the field -> in words."""
    return {
        field.name: f"{field.name} {getattr(best, field.name)} in place of {getattr(stated, field.name)}"
        for field in fields(stated)
        if getattr(best, field.name) != getattr(stated, field.name)
    }


def choose_reading(path: Path, readings: Sequence[Reading[Config]]) -> Config:
    """The stated reading, or another one with a warning that names the checkpoint's ``path``."""
    stated, best = readings[0], best_reading(readings)
    if best is not stated:
        logger.warning(
            "the checkpoint %s names %.0f %% of the target's next tokens as its configuration says, and %.0f %% with "
            "%s: the latter is used", path, 100 * stated.agreement, 100 * best.agreement,
            "; ".join(differences(stated.config, best.config).values()),
        )  # fmt: skip
    return best.config
