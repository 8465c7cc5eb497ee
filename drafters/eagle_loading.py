"""Loads an EAGLE head for a target, in the reading that fits best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_head import EagleConfig
from specdec.drafters.eagle_probe import PROBE_TEXT, Lesson, Reading, build_head, probe_readings
from specdec.errors import UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["best_reading", "differences", "load_eagle"]

logger = logging.getLogger(__name__)

_CLEARLY = 0.05  # agreement by which another reading must beat the stated one
_NUM_PROBED = 200  # tokens
_FIELDS = ("hidden_layers", "norm_before_residual", "rope")


def load_eagle(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    probe: int = 1,
    rope_theta: float | None = None,
    **options: Any,
) -> Drafter:
    """The drafter of ``eagle:PATH``.

    Args:
        path: a directory with a checkpoint in one of the layouts of `specdec.drafters.eagle_files`.
        target: the model that it was trained for.
        tokenizer: the target's, for the probe.
        draws: None: an EAGLE tree is reranked after the draw, so only match may judge it.
        probe: 1: try the plausible readings on a short text; 0: trust the configuration.
        rope_theta: the rotary base, in place of the stated one.
        **options: of ``EagleDrafter``.

    Raises:
        LoadError: it cannot be read or does not fit the target.
        UnsupportedError: a rejection rule is asked for.
    """
    if draws is not None:
        raise UnsupportedError("EAGLE trees need the match rule: their nodes are chosen after they were drawn")
    files = read_files(path)
    stated = files.head_config(target.config.get_text_config())
    if rope_theta is not None:
        stated = replace(stated, rope={**stated.rope, "rope_theta": float(rope_theta)})
    config = stated
    if probe and tokenizer is not None and rope_theta is None:
        ids = tokenizer(PROBE_TEXT, add_special_tokens=True)["input_ids"][:_NUM_PROBED]
        readings = probe_readings(files, target, Lesson.of(target, ids))
        best = best_reading(readings)
        if best is not readings[0]:
            _warn(path, readings[0], best)
        config = best.config
    return EagleDrafter(
        build_head(files, target, config), vocab_size=int(target.config.get_text_config().vocab_size), **options
    )


def best_reading(readings: Sequence[Reading]) -> Reading:
    """The first, stated one, unless another one is clearly better."""
    best = max(readings, key=lambda reading: reading.agreement)
    return readings[0] if best.agreement < readings[0].agreement + _CLEARLY else best


def differences(stated: EagleConfig, best: EagleConfig) -> dict[str, str]:
    """What another reading changes: the field -> in words."""
    return {
        name: f"{name} {getattr(best, name)} in place of {getattr(stated, name)}"
        for name in _FIELDS
        if getattr(best, name) != getattr(stated, name)
    }


def _warn(path: Path, stated: Reading, best: Reading) -> None:
    logger.warning(
        "the EAGLE checkpoint %s names %.0f %% of the target's next tokens as its configuration says, and %.0f %% with "
        "%s: the latter is used", path, 100 * stated.agreement, 100 * best.agreement,
        "; ".join(differences(stated.config, best.config).values()),
    )  # fmt: skip
