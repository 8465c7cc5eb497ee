"""Loads an EAGLE head for a target, in the reading that fits best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_probe import Lesson, build_head, probe_readings
from specdec.drafters.probing import choose_reading, probe_ids
from specdec.errors import UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_eagle"]


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
        **options: of ``EagleDrafter``; ``min_gain`` is "auto" here, unless several ranks must draft alike.

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
        config = choose_reading(path, probe_readings(files, target, Lesson.of(target, probe_ids(tokenizer))))
    if not (dist.is_available() and dist.is_initialized()):  # measured times differ between ranks
        options.setdefault("min_gain", "auto")
    return EagleDrafter(
        build_head(files, target, config), vocab_size=int(target.config.get_text_config().vocab_size), **options
    )
