"""The drafter of ``registry:DIR``: whichever version is current there, ready to be swapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.drafters.checkpoint import parse_name
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.registry import Registry
from specdec.online_training.swap import VersionedDrafter
from specdec.online_training.version_weights import WeightedDrafter, read_weights
from specdec.protocols import Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_registry", "read_registry"]


def read_registry(name: str) -> tuple[Registry, dict[str, Any]]:
    """The registry and the options of ``registry:DIR?options``.

    Raises:
        LoadError: there is no registry with a current version.
    """
    _, source, options = parse_name(name)
    path = Path(source).expanduser()
    if not path.is_dir():
        raise LoadError(f"drafter {name!r}: there is no directory {source!r}")
    registry = Registry(path)
    if not registry.state().current:
        raise LoadError(f"drafter {name!r}: no version is current; `specdec traind` makes a first one")
    return registry, options


def load_registry(
    load_kind: Callable[..., WeightedDrafter],
    registry: Registry,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    at_once: int = 0,
    **options: Any,
) -> VersionedDrafter:
    """The current version, in as many lanes as swapping needs.

    Args:
        load_kind: ``load_kind(kind, path, target, tokenizer, draws, **options)`` makes a drafter of a checkpoint.
        registry: its versions.
        target: the model.
        tokenizer: the target's.
        draws: for a rejection rule.
        at_once: 1: swap under running requests, see ``VersionedDrafter``.
        **options: of the kind.

    Raises:
        ConfigError: an option is outside its rule.
        LoadError: the version is not whole, or belongs to another target.
        UnsupportedError: drafters of its kind cannot be swapped.
    """
    if at_once not in (0, 1):
        raise ConfigError(f"at_once must be 0 or 1, got {at_once!r}")
    version = registry.state().current
    manifest, path = registry.check(version), registry.path(version)
    own = fingerprint(target)
    if manifest.target != own:
        raise LoadError(f"version {version} of {registry.root} was trained for another model than this one")
    weights = read_weights(manifest.kind, path)
    if manifest.kind == "eagle":
        options = {"probe": 0, **options}  # it was written here: there is nothing to find out

    def make() -> WeightedDrafter:
        drafter = load_kind(manifest.kind, path, target, tokenizer, draws, **options)
        if not isinstance(drafter, WeightedDrafter):
            raise UnsupportedError(f"drafters of the kind {manifest.kind!r} cannot be swapped")
        return drafter

    return VersionedDrafter(make, version, weights, at_once=bool(at_once), registry=registry)
