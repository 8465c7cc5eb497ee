"""Builds an EAGLE head for a target, and probes whether it was read as it was trained.

Published checkpoints differ in things that no shape shows: how layers are counted, which rotary base was used in
training whatever the configuration says, and where the residual stream starts. A wrong reading costs most of the
acceptance and no error. So every plausible reading is tried on a short text: the head, fed with the target's true
states, should name the target's own next token. The stated reading is kept unless another one is clearly better.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import EagleFiles, read_files
from specdec.drafters.eagle_head import EagleConfig, EagleHead, attend_causally
from specdec.errors import UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROBE_TEXT", "Reading", "build_head", "load_eagle", "probe_readings"]

logger = logging.getLogger(__name__)

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
class Reading:
    """One way of reading a checkpoint, and the share of positions where it names the target's next token."""

    config: EagleConfig
    agreement: float


def build_head(files: EagleFiles, target: PreTrainedModel, config: EagleConfig) -> EagleHead:
    """The head on the target's device and in its dtype.

    Raises:
        LoadError: it does not fit the target.
    """
    vocab_size = int(target.config.get_text_config().vocab_size)
    weights = {
        name: weight.to(target.device, target.dtype)
        for name, weight in files.weights.items()
        if weight.is_floating_point()
    }
    ids = files.target_ids(vocab_size)
    own_embedding, own_head = weights.get("embed_tokens.weight"), weights.get("lm_head.weight")
    files.check_vocabulary(vocab_size, int(target.config.get_text_config().hidden_size))

    # The target's layers are looked up in each call: an engine may put packed ones in their place.
    def embed(token_ids: Tensor) -> Tensor:
        if own_embedding is not None:
            return own_embedding[token_ids]
        embedded: Tensor = target.get_input_embeddings()(token_ids)
        return embedded

    def project(outputs: Tensor) -> Tensor:
        if own_head is not None:
            return linear(outputs, own_head)
        head: Any = target.get_output_embeddings()
        logits: Tensor = head(outputs)
        return logits

    return EagleHead(
        config, weights, embed=embed, project=project, target_ids=None if ids is None else ids.to(target.device)
    )


def probe_readings(files: EagleFiles, target: PreTrainedModel, token_ids: Sequence[int]) -> list[Reading]:
    """Every plausible reading of a checkpoint with its agreement; the stated one first."""
    text_config = target.config.get_text_config()
    configs = _plausible(files.head_config(text_config), files, text_config)
    ids = torch.tensor(list(token_ids), device=target.device)
    with torch.inference_mode():
        out: Any = target(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        truth = out.logits[0, 1:].argmax(dim=-1)  # row t + 1 says what follows token t + 1
        readings = []
        for config in configs:
            head = build_head(files, target, config)
            states = torch.cat([out.hidden_states[layer][0, :-1] for layer in config.hidden_layers], dim=-1)
            positions = torch.arange(len(ids) - 1, device=ids.device)
            outputs = head.forward(ids[1:], head.fuse(states), positions, attend_causally)
            guesses = head.target_logits(outputs, int(text_config.vocab_size)).argmax(dim=-1)
            readings.append(Reading(config, float((guesses == truth).float().mean())))
    return readings


def _plausible(stated: EagleConfig, files: EagleFiles, target: Any) -> list[EagleConfig]:
    parameters = getattr(target, "rope_parameters", None) or {}
    own_theta = parameters.get("rope_theta") or getattr(target, "rope_theta", None)
    thetas = list(dict.fromkeys([float(str(stated.rope["rope_theta"])), 10_000.0, *([own_theta] if own_theta else [])]))
    layers, norms = [stated.hidden_layers], [stated.norm_before_residual]
    if stated.version == 3:
        num_layers = int(target.num_hidden_layers)
        moved = [tuple(layer + by for layer in stated.hidden_layers) for by in (1, -1)]
        layers += [one for one in moved if min(one) >= 0 and max(one) <= num_layers]
        norms.append(not norms[0])
    return [
        replace(stated, hidden_layers=which, norm_before_residual=norm, rope={**stated.rope, "rope_theta": theta})
        for which, norm, theta in itertools.product(layers, norms, thetas)
    ]


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
        config = _best(path, probe_readings(files, target, ids))
    return EagleDrafter(
        build_head(files, target, config), vocab_size=int(target.config.get_text_config().vocab_size), **options
    )


def _best(path: Path, readings: Sequence[Reading]) -> EagleConfig:
    stated, best = readings[0], max(readings, key=lambda reading: reading.agreement)
    if best.agreement < stated.agreement + _CLEARLY:
        return stated.config
    names = ("hidden_layers", "norm_before_residual", "rope")
    differences = "; ".join(
        f"{name} {getattr(best.config, name)} in place of {getattr(stated.config, name)}"
        for name in names
        if getattr(best.config, name) != getattr(stated.config, name)
    )
    logger.warning(
        "the EAGLE checkpoint %s names %.0f %% of the target's next tokens as its configuration says, and %.0f %% with "
        "%s: the latter is used", path, 100 * stated.agreement, 100 * best.agreement, differences,
    )  # fmt: skip
    return best.config
