"""Rotary embeddings that change with the sequence length, frozen once for the longest sequence to be served.

Two RoPE kinds of transformers, ``dynamic`` (NTK scaling) and ``longrope``, choose their frequencies in every forward
from the largest position of the whole batch. In a batch of many requests that makes one request's logits depend on
its neighbours, and leaves keys in the cache that were rotated by other frequencies than the query. Both kinds become
ordinary RoPE once their frequencies are those of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from specdec.errors import ConfigError, UnsupportedError

__all__ = ["RopeFreeze", "freeze_rope"]

_MARK = "_specdec_frozen_rope"  # on the rotary module: two engines on one model must agree


@dataclass(slots=True)
class _Frozen:
    """One frozen rotary module and what it was before."""

    module: nn.Module
    max_length: int
    before: dict[str, Any]  # attribute -> value, or _ABSENT
    notice: str | None
    num_holders: int = 1


_ABSENT = object()


@dataclass(slots=True)
class RopeFreeze:
    """The frozen rotary embeddings of one model; also a context manager that restores them at its end.

    Args:
        notices: one sentence per rotary embedding whose frequencies for short sequences are now others than in
            ``model.generate``. Show them to the user.
    """

    notices: tuple[str, ...]
    _held: list[_Frozen] = field(default_factory=list)

    def restore(self) -> None:
        """Let the frequencies follow the sequence length again, unless another holder still needs them frozen."""
        for frozen in self._held:
            frozen.num_holders -= 1
            if frozen.num_holders == 0:
                _restore(frozen)
        self._held = []

    def __enter__(self) -> RopeFreeze:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def freeze_rope(model: nn.Module, max_length: int) -> RopeFreeze:
    """Fix the frequencies of every ``dynamic`` and ``longrope`` rotary embedding to those of ``max_length`` tokens.

    The frequencies come from the embedding's own forward, run once at position ``max_length - 1``, so nothing here
    knows their formulas.

    Args:
        model: any model; without such embeddings nothing happens.
        max_length: the longest sequence to be served, in tokens (>= 1).

    Effects: the rotary modules of ``model`` are changed until ``restore``. ``model.generate`` on the same object uses
        the frozen frequencies too.

    Raises:
        ConfigError: the model is already frozen for another length.
        UnsupportedError: a rotary embedding cannot be run on its own.
    """
    if max_length < 1:
        raise ConfigError(f"max_length must be >= 1, got {max_length}")
    freeze = RopeFreeze(notices=())
    notices = []
    try:
        for name, module in model.named_modules():
            frozen: _Frozen | None = getattr(module, _MARK, None)
            if frozen is not None and frozen.max_length != max_length:
                raise ConfigError(
                    f"the rotary embedding {name} is in use for max_length {frozen.max_length} and cannot serve "
                    f"max_length {max_length} at the same time: close the other engine or load the model twice"
                )
            if frozen is not None:
                frozen.num_holders += 1
            elif _moving_kinds(module):
                frozen = _freeze(name, module, max_length)
            else:
                continue
            freeze._held.append(frozen)
            if frozen.notice is not None:
                notices.append(frozen.notice)
    except BaseException:
        freeze.restore()
        raise
    freeze.notices = tuple(notices)
    return freeze


def _moving_kinds(module: nn.Module) -> dict[str | None, str]:
    """Layer type (None if there is only one) -> RoPE kind, for the kinds that follow the sequence length."""
    kinds: Any = getattr(module, "rope_type", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
    return {
        layer_type: kind
        for layer_type, kind in by_layer_type.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


def _freeze(name: str, module: Any, max_length: int) -> _Frozen:
    kinds = _moving_kinds(module)
    before = _snapshot(module, kinds)
    frozen = _Frozen(module, max_length, before, notice=None)
    try:
        changed = []
        for layer_type, kind in kinds.items():
            short = _frequencies_at(module, layer_type, 0)  # also undoes what a longer sequence left behind
            if not torch.equal(short, _frequencies_at(module, layer_type, max_length - 1)):
                changed.append(kind)
    except Exception as error:
        _restore(frozen)
        raise UnsupportedError(
            f"the rotary embedding {name} ({', '.join(kinds.values())}) changes with the sequence length and could "
            f"not be frozen: {type(error).__name__}: {error}"
        ) from error
    was = before["rope_type"]
    module.rope_type = {**was, **dict.fromkeys(kinds, "default")} if isinstance(was, dict) else "default"
    if changed:
        frozen.notice = (
            f"{name}: RoPE of kind {changed[0]} chooses its frequencies by sequence length; they are fixed to those of "
            f"max_length = {max_length}. For short sequences model.generate uses others, so its text may differ; "
            "a max_length within the model's original context gives the same"
        )
    setattr(module, _MARK, frozen)
    return frozen


def _frequencies_at(module: nn.Module, layer_type: str | None, position: int) -> torch.Tensor:
    """[D / 2] float32: the inverse frequencies after a forward whose largest position is ``position``."""
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    device = getattr(module, name).device
    extra = () if layer_type is None else (layer_type,)
    with torch.no_grad():
        module(torch.zeros(1, device=device), torch.tensor([[position]], device=device), *extra)
    frequencies: torch.Tensor = getattr(module, name)
    return frequencies.clone()


def _snapshot(module: nn.Module, kinds: dict[str | None, str]) -> dict[str, Any]:
    """Every attribute that the length-following forward may write, or that freezing writes."""
    names = {"rope_type", "attention_scaling", "max_seq_len_cached", _MARK}
    for layer_type in kinds:
        prefix = "" if layer_type is None else f"{layer_type}_"
        names |= {f"{prefix}inv_freq", f"{prefix}max_seq_len_cached", f"{prefix}attention_scaling"}
    values = {name: getattr(module, name, _ABSENT) for name in names}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _restore(frozen: _Frozen) -> None:
    for name, value in frozen.before.items():
        if value is not _ABSENT:
            setattr(frozen.module, name, value)
        elif hasattr(frozen.module, name):
            delattr(frozen.module, name)
