"""What ``registry:DIR`` means among drafters' names. What it takes is imported when one is named, not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specdec.drafters.checkpoint import DrafterKind
from specdec.protocols import Drafter

__all__ = ["registry_kind"]


def registry_kind(load_kind: Callable[..., Any]) -> DrafterKind:
    """The kind of drafters whose versions stand in a registry.

    Args:
        load_kind: ``load_kind(kind, path, target, tokenizer, draws, **options)`` makes a drafter of one version.
    """

    def read(name: str) -> tuple[Any, dict[str, Any]]:
        from specdec.online_training.registry_loading import read_registry

        return read_registry(name)

    def load(*args: Any, **options: Any) -> Drafter:
        from specdec.online_training.registry_loading import load_registry

        return load_registry(load_kind, *args, **options)

    return DrafterKind(load, read)
