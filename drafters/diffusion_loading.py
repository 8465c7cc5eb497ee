"""Builds a block-diffusion head for a target, and probes whether it was read as it was trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.drafters.block_length import FixedLength
from specdec.drafters.block_training import forward_blocks, teacher_forced
from specdec.drafters.diffusion import DiffusionDrafter
from specdec.drafters.diffusion_files import DiffusionFiles, read_diffusion_files
from specdec.drafters.diffusion_head import DiffusionConfig, DiffusionHead
from specdec.drafters.eagle_probe import Lesson
from specdec.drafters.probing import Reading, choose_reading, probe_ids
from specdec.drafters.target_vocabulary import embed_and_project
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_diffusion_head", "load_diffusion", "probe_diffusion"]

_STRIDE = 4  # tokens between the anchors of the probe


def build_diffusion_head(files: DiffusionFiles, target: PreTrainedModel, config: DiffusionConfig) -> DiffusionHead:
    """The head on the target's device and in its dtype.

    Raises:
        LoadError: it does not fit the target.
    """
    vocab_size = int(target.config.get_text_config().vocab_size)
    files.check_vocabulary(config, vocab_size)
    weights = {name: weight.to(target.device, target.dtype) for name, weight in files.weights(config).items()}
    ids = files.target_ids(vocab_size)
    embed, project = embed_and_project(target, weights)
    return DiffusionHead(
        config, weights, embed=embed, project=project, target_ids=None if ids is None else ids.to(target.device)
    )


def probe_diffusion(
    files: DiffusionFiles, target: PreTrainedModel, token_ids: Sequence[int]
) -> list[Reading[DiffusionConfig]]:
    """Every plausible reading of a checkpoint with the share of first guesses that are the target's own next token.

    The stated reading comes first.
    """
    text_config = target.config.get_text_config()
    vocab_size = int(text_config.vocab_size)
    lesson = Lesson.of(target, token_ids)
    ids = lesson.token_ids
    anchors = torch.arange(1, len(ids) - 1, _STRIDE, device=target.device)
    readings = []
    with torch.inference_mode():
        for config in _plausible(files.head_config(text_config), text_config):
            head = build_diffusion_head(files, target, config)
            states = torch.cat([lesson.states[layer] for layer in config.hidden_layers], dim=-1)
            rows = head.guessing_rows(forward_blocks(head, states, ids, anchors))
            logits, _ = teacher_forced(head, rows[:, :1], ids, anchors)
            guesses = head.over_target(logits[:, 0], vocab_size).argmax(dim=-1)
            readings.append(Reading(config, float((guesses == lesson.truth[anchors - 1]).float().mean())))
    return readings


def _plausible(stated: DiffusionConfig, target: Any) -> list[DiffusionConfig]:
    parameters = getattr(target, "rope_parameters", None) or {}
    own_theta = parameters.get("rope_theta") or getattr(target, "rope_theta", None)
    thetas = list(dict.fromkeys([float(str(stated.rope["rope_theta"])), *([float(own_theta)] if own_theta else [])]))
    moved = [tuple(layer + by for layer in stated.hidden_layers) for by in (1, -1)]
    layers = [stated.hidden_layers, *(one for one in moved if min(one) >= 0 and max(one) < target.num_hidden_layers)]
    causal = [stated.causal]
    if any(stated.windows):  # publishers disagree on whether a window makes a layer causal
        flipped = [not one if window else one for one, window in zip(stated.causal, stated.windows, strict=True)]
        causal.append(tuple(flipped))
    return [
        replace(
            stated, hidden_layers=which, is_interleaved=pairs, causal=sight, rope={**stated.rope, "rope_theta": theta}
        )
        for which, pairs, sight, theta in itertools.product(layers, (False, True), causal, thetas)
    ]


def load_diffusion(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    probe: int = 1,
    length: int = 0,
    **options: Any,
) -> Drafter:
    """The drafter of ``diffusion:PATH``.

    Args:
        path: a directory with a checkpoint in one of the dialects of `specdec.drafters.diffusion_files`.
        target: the model that it was trained for.
        tokenizer: the target's, for the probe.
        draws: for a rejection rule.
        probe: 1: try the plausible readings on a short text; 0: trust the configuration.
        length: tokens of a block that are sent; 0: all.
        **options: of ``DiffusionDrafter``.

    Raises:
        ConfigError: an option is outside its rule.
        LoadError: it cannot be read or does not fit the target.
        UnsupportedError: a rejection rule that cannot judge these drafts.
    """
    files = read_diffusion_files(path)
    config = files.head_config(target.config.get_text_config())
    if probe and tokenizer is not None:
        readings = probe_diffusion(files, target, probe_ids(tokenizer))
        config = choose_reading(path, readings)
    return DiffusionDrafter(
        build_diffusion_head(files, target, config), vocab_size=int(target.config.get_text_config().vocab_size),
        rule=FixedLength(length), draws=draws, **options,
    )  # fmt: skip
