"""Builds EAGLE heads, and tries how well they name a target's next tokens on a text: teacher forcing.

Every plausible reading of a checkpoint (`specdec.drafters.probing`) can be tried: the head, fed with the target's true
states, should name the target's own next token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.drafters.eagle_files import EagleFiles
from specdec.drafters.eagle_head import EagleConfig, EagleHead, attend_causally
from specdec.drafters.probing import Reading
from specdec.drafters.target_vocabulary import embed_and_project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Lesson", "build_head", "hits", "plausible_readings", "probe_readings"]


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What a target makes of a text of T tokens, to be compared with what a head would have guessed.

    Args:
        token_ids: [T] int64.
        truth: [T - 1] int64: the target's choice after tokens 1, 2, ...
        states: by index into ``output_hidden_states``, [T, E] each.
    """

    token_ids: Tensor
    truth: Tensor
    states: Sequence[Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, target: PreTrainedModel, token_ids: Sequence[int]) -> Lesson:
        """One forward of the target over a text of two or more tokens."""
        ids = torch.tensor(list(token_ids), device=target.device)
        out: Any = target(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        return cls(ids, out.logits[0, 1:].argmax(dim=-1), [states[0] for states in out.hidden_states])


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
    files.check_vocabulary(vocab_size, int(target.config.get_text_config().hidden_size))
    embed, project = embed_and_project(target, weights)
    return EagleHead(
        config, weights, embed=embed, project=project, target_ids=None if ids is None else ids.to(target.device)
    )


@torch.inference_mode()
def hits(head: EagleHead, lesson: Lesson, vocab_size: int) -> Tensor:
    """[T - 1] bool: after which tokens the head, fed with the target's true states, names the target's choice."""
    states = torch.cat([lesson.states[layer][:-1] for layer in head.config.hidden_layers], dim=-1)
    positions = torch.arange(len(lesson.token_ids) - 1, device=head.device)
    outputs = head.forward(lesson.token_ids[1:], head.fuse(states), positions, attend_causally)
    return head.target_logits(outputs, vocab_size).argmax(dim=-1) == lesson.truth


def probe_readings(files: EagleFiles, target: PreTrainedModel, lesson: Lesson) -> list[Reading[EagleConfig]]:
    """Every plausible reading of a checkpoint with its agreement; the stated one first."""
    text_config = target.config.get_text_config()
    configs = plausible_readings(files.head_config(text_config), text_config)
    vocab_size = int(text_config.vocab_size)
    return [
        Reading(config, float(hits(build_head(files, target, config), lesson, vocab_size).float().mean()))
        for config in configs
    ]


def plausible_readings(stated: EagleConfig, target: Any) -> list[EagleConfig]:
    """The stated reading first, then the others: layers counted one off, norm before or after the residual, bases."""
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
