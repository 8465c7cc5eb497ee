"""Builds a block-diffusion head for a target, and probes whether it was read as it was trained."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.drafters.block_length import (
    ApdLength,
    ChunkLength,
    EmaLength,
    FixedLength,
    LengthRule,
    ThresholdLength,
)
from specdec.drafters.block_throughput import ThroughputLength
from specdec.drafters.block_training import forward_blocks, teacher_forced
from specdec.drafters.calibration import Temperatures
from specdec.drafters.checkpoint_files import read_config
from specdec.drafters.diffusion import DiffusionDrafter
from specdec.drafters.diffusion_files import DiffusionFiles, is_block_diffusion, read_diffusion_files
from specdec.drafters.diffusion_head import DiffusionConfig, DiffusionHead
from specdec.drafters.eagle_probe import Lesson
from specdec.drafters.lm_loading import tokenizer_of
from specdec.drafters.masked_drafter import MaskedLmDrafter
from specdec.drafters.masked_lm import load_masked_lm
from specdec.drafters.probing import Reading, choose_reading, probe_ids
from specdec.drafters.target_vocabulary import embed_and_project
from specdec.drafters.token_map import TokenMap
from specdec.errors import ConfigError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CALIBRATION_FILE",
    "LENGTH_RULES",
    "build_diffusion_head",
    "length_rule",
    "load_diffusion",
    "probe_diffusion",
]

CALIBRATION_FILE = "calibration.json"  # beside a checkpoint
LENGTH_RULES: Mapping[str, Callable[..., LengthRule]] = {
    "fixed": FixedLength,
    "threshold": ThresholdLength,
    "throughput": ThroughputLength,
    "chunk": ChunkLength,
    "ema": EmaLength,
    "apd": ApdLength,
}
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
            rows = head.guessing_rows(forward_blocks(head, states[None], ids[None], anchors[None]))
            logits, _ = teacher_forced(head, rows[:, :, :1], ids[None], anchors[None])
            guesses = head.over_target(logits[0, :, 0], vocab_size).argmax(dim=-1)
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


def length_rule(name: str, options: dict[str, Any]) -> LengthRule:
    """A rule by its name; its options are taken out of ``options``.

    Raises:
        ConfigError: an unknown name, or an option outside its rule.
    """
    if name not in LENGTH_RULES:
        raise ConfigError(f"rule must be one of {', '.join(LENGTH_RULES)}, got {name!r}")
    known = inspect.signature(LENGTH_RULES[name]).parameters
    return LENGTH_RULES[name](**{option: options.pop(option) for option in list(options) if option in known})


def _temperatures(path: Path) -> Temperatures | None:
    """Those beside a checkpoint, or None."""
    file = path / CALIBRATION_FILE
    return Temperatures.load(file) if file.is_file() else None


def load_diffusion(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    probe: int = 1,
    rule: str | None = None,
    **options: Any,
) -> Drafter:
    """The drafter of ``diffusion:PATH``.

    Args:
        path: a directory with a head in one of the dialects of `specdec.drafters.diffusion_files`, or with a masked
            diffusion LM.
        target: the model that it drafts for.
        tokenizer: the target's, for the probe.
        draws: for a rejection rule.
        probe: 1: try the plausible readings on a short text; 0: trust the configuration.
        rule: how much of a block is sent, one of ``LENGTH_RULES``; by default ``fixed`` for a head and ``chunk`` for a
            masked LM.
        **options: of the rule, and of ``DiffusionDrafter``, or of ``load_masked_lm`` and ``MaskedLmDrafter``.

    Raises:
        ConfigError: an option is outside its rule.
        LoadError: it cannot be read or does not fit the target.
        UnsupportedError: a rejection rule that cannot judge these drafts.
    """
    if not is_block_diffusion(read_config(path)):
        return _load_masked(
            path, target, tokenizer, draws, length_rule("chunk" if rule is None else rule, options), options
        )
    files = read_diffusion_files(path)
    config = files.head_config(target.config.get_text_config())
    if probe and tokenizer is not None:
        readings = probe_diffusion(files, target, probe_ids(tokenizer))
        config = choose_reading(path, readings)
    return DiffusionDrafter(
        build_diffusion_head(files, target, config), vocab_size=int(target.config.get_text_config().vocab_size),
        rule=length_rule(rule or "fixed", options), temperatures=_temperatures(path), draws=draws, **options,
    )  # fmt: skip


def _load_masked(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    rule: LengthRule,
    options: dict[str, Any],
) -> Drafter:
    own = tokenizer_of(path)
    known = inspect.signature(load_masked_lm).parameters
    model = load_masked_lm(
        path, device=target.device, dtype=target.dtype, probe_ids=None if own is None else probe_ids(own),
        **{name: options.pop(name) for name in list(options) if name in known},
    )  # fmt: skip
    tokens = TokenMap.of(
        own, tokenizer, own_size=model.vocab_size, target_size=int(target.config.get_text_config().vocab_size)
    )
    return MaskedLmDrafter(model, tokens, rule=rule, draws=draws, **{"max_length": model.max_length, **options})
