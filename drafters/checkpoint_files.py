"""Reads the files of a head's checkpoint: configuration, weights, draft vocabulary. Nothing in a file is executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.errors import LoadError

__all__ = ["draft_vocabulary", "read_config", "read_weights", "stated_rope"]

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


def read_config(path: Path) -> dict[str, Any]:
    """What ``config.json`` in a directory says.

    Raises:
        LoadError: it is missing, or no JSON object.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path / 'config.json'} must hold an object, got {type(config).__name__}")
    return config


def read_weights(path: Path, canonical: Callable[[str], str]) -> dict[str, Tensor]:
    """All tensors in a directory's safetensors files, or else in its ``pytorch_model*.bin`` (with ``weights_only``).

    Args:
        path: the directory.
        canonical: the name by which the caller wants a tensor, from its name in the file.

    Raises:
        LoadError: a file is missing, cut, no checkpoint, or holds a number that is none.
    """
    safe, pickled = sorted(path.glob("*.safetensors")), sorted(path.glob("pytorch_model*.bin"))
    if not safe and not pickled:
        raise LoadError(f"{path}: looked for *.safetensors and pytorch_model*.bin, found neither")
    weights: dict[str, Any] = {}
    for file in safe or pickled:
        try:
            part = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LoadError(f"cannot read {file}: {reason}") from error
        if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
            raise LoadError(f"{file} must hold tensors by name")
        weights |= part
    weights = {canonical(name): weight for name, weight in weights.items() if "rotary_emb" not in name}
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise LoadError(f"{path}: {name} holds a value that is not finite")
    return weights


def stated_rope(layer: Mapping[str, Any]) -> dict[str, object]:
    """``rope_parameters`` as a layer's configuration states them; without a base it is 10000."""
    parameters = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    theta = layer.get("rope_theta") or parameters.get("rope_theta") or 10_000.0
    return {"rope_type": "default", **parameters, "rope_theta": float(theta)}


def draft_vocabulary(
    weights: Mapping[str, Tensor],
    vocab_size: int,
    said: int | None,
    misfit: Callable[[str], LoadError],
) -> Tensor | None:
    """[D] int64: the target's id of every draft id; None where the vocabularies are the same.

    ``d2t`` is called an offset and mostly is one; some exports hold the ids themselves. Both are recognised: ids must
    ascend within the vocabulary.

    Args:
        weights: of the checkpoint; without an ``lm_head`` of its own there is no draft vocabulary.
        vocab_size: of the target.
        said: ``draft_vocab_size`` of the configuration.
        misfit: makes the error from what is wrong.

    Raises:
        LoadError: there is no such map, or it is none.
    """
    if "lm_head.weight" not in weights:
        return None
    num_ids = len(weights["lm_head.weight"])
    if said is not None and int(said) != num_ids:
        raise misfit(f"draft_vocab_size is {said}, but lm_head has {num_ids} rows")
    if num_ids == vocab_size:
        return None
    if "d2t" not in weights:
        raise misfit(f"it knows {num_ids} of the target's {vocab_size} tokens and has no d2t to say which")
    map_ = weights["d2t"].long()
    if map_.shape != (num_ids,):
        raise misfit(f"d2t has shape {tuple(map_.shape)}, but lm_head has {num_ids} rows")
    known = weights.get("t2d")
    if known is not None and known.shape != (vocab_size,):
        raise misfit(f"t2d tells of {len(known)} tokens, the target has {vocab_size}")
    for ids in (map_ + torch.arange(num_ids), map_):
        ascends = bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
        if ascends and (known is None or bool(known.bool()[ids].all())):
            return ids
    raise misfit(f"d2t does not map {num_ids} draft tokens to ascending tokens below {vocab_size}")
