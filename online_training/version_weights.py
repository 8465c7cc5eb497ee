"""Weights of a version, checked against what is being served: read whole, finite, of the same names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.drafters.eagle_files import read_files
from specdec.errors import LoadError, UnsupportedError
from specdec.protocols import Drafter

__all__ = ["SWAPPABLE_KINDS", "WeightedDrafter", "copy_weights", "read_weights"]


@runtime_checkable
class WeightedDrafter(Drafter, Protocol):
    """A drafter whose weights can be copied into."""

    @property
    def named_weights(self) -> Mapping[str, Tensor]:
        """The tensors that it computes with, by their names in a checkpoint."""


def _read_plain(path: Path) -> Mapping[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise LoadError(f"cannot read {file.name}: {error}") from error
    return weights


SWAPPABLE_KINDS: Mapping[str, Callable[[Path], Mapping[str, Tensor]]] = {
    "eagle": lambda path: read_files(path).weights,
    "lm": _read_plain,
}


def read_weights(kind: str, path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in host memory.

    Raises:
        LoadError: it cannot be read, or a value is not finite.
        UnsupportedError: drafters of this kind cannot be swapped.
    """
    if kind not in SWAPPABLE_KINDS:
        raise UnsupportedError(f"drafters that can be swapped are {', '.join(SWAPPABLE_KINDS)}, got {kind!r}")
    weights = dict(SWAPPABLE_KINDS[kind](path))
    if not weights:
        raise LoadError(f"{path.name} holds no weights")
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise LoadError(f"{path.name}: {name} holds a value that is not finite")
    return weights


def check_like(weights: Mapping[str, Tensor], pattern: Mapping[str, Tensor]) -> None:
    """Refuse weights that could not stand where others do.

    Raises:
        LoadError: names or shapes differ, or a map of token ids does.
    """
    if weights.keys() != pattern.keys():
        odd = sorted(weights.keys() ^ pattern.keys())[:3]
        raise LoadError(f"names of weights differ from those in service: {', '.join(odd)}")
    for name, weight in weights.items():
        if weight.shape != pattern[name].shape:
            raise LoadError(f"{name} has shape {tuple(weight.shape)}, in service it is {tuple(pattern[name].shape)}")
        if not weight.is_floating_point() and not torch.equal(weight, pattern[name]):
            raise LoadError(f"{name} maps other tokens than in service")


def copy_weights(weights: Mapping[str, Tensor], drafter: WeightedDrafter) -> None:
    """Copy weights into a drafter's own tensors, so that whatever holds these (graphs, other drafters) goes on."""
    own = drafter.named_weights
    with torch.inference_mode():
        for name, weight in weights.items():
            if weight.is_floating_point():
                own[name].copy_(weight)
