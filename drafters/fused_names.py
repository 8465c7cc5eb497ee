"""``fused:A+B+KIND:PATH?options``: what such a name means, given what its parts mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specdec.drafters.checkpoint import DrafterKind, PendingDrafter, short_name
from specdec.drafters.fusion import FusedDrafter
from specdec.errors import ConfigError
from specdec.protocols import Drafter

__all__ = ["fused_kind", "fused_parts"]


def fused_parts(name: str) -> list[str]:
    """The names that a fused name is made of.

    Raises:
        ConfigError: one of them is fused itself.
    """
    parts = name.partition(":")[2].split("+")
    if any(part.partition(":")[0] == "fused" for part in parts):
        raise ConfigError(f"fused drafters cannot be fused again, got {name!r}")
    return parts


def fused_kind(name_part: Callable[[str], Drafter | PendingDrafter], load_part: Callable[..., Drafter]) -> DrafterKind:
    """The kind ``fused``; options stand behind the part that they belong to.

    Args:
        name_part: a drafter from its name, or what waits for the target.
        load_part: (that, target, tokenizer) -> drafter.
    """

    def read(name: str) -> tuple[Any, dict[str, Any]]:
        return [(short_name(part), name_part(part)) for part in fused_parts(name)], {}

    def load(parts: Any, model: Any = None, tokenizer: Any = None, draws: object = None, **options: Any) -> Drafter:
        # A fused draft states no laws, so ``draws`` is of no use: the engine refuses rejection rules.
        return FusedDrafter([(name, load_part(part, model, tokenizer)) for name, part in parts], **options)

    return DrafterKind(load, read, takes="A+B")
