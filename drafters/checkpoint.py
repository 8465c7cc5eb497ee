"""Drafters that come from a checkpoint and need the target to be built: a name now, an object once the target is there.

A name is ``KIND:PATH`` or ``KIND:PATH?option=value&option=value``, such as ``lm:models/small?depth=6``. Everything that
can be wrong without the target is said when the name is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from weakref import ref

from specdec.errors import ConfigError, LoadError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CheckpointDrafter", "Loader", "parse_name"]

# (path, target, its tokenizer or None, how to draw, **options) -> drafter
Loader = Callable[..., Drafter]


def parse_name(name: str) -> tuple[str, str, dict[str, Any]]:
    """Kind, path and options of a drafter's name.

    Raises:
        ConfigError: an option without a value, or the same option twice.

    Example:
        >>> parse_name("lm:models/small?depth=6&min_gain=0.2&fan_out=2x1")
        ('lm', 'models/small', {'depth': 6, 'min_gain': 0.2, 'fan_out': (2, 1)})
    """
    kind, _, rest = name.partition(":")
    path, has_options, query = rest.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=False, strict_parsing=True) if has_options else []
    except ValueError:
        raise ConfigError(f"options of a drafter are written ?name=value&name=value, got {query!r}") from None
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"an option of a drafter can be given once, got {query!r}")
    return kind, path, {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    """A number, several numbers joined by x, or the text itself."""
    for convert in (int, float, lambda word: tuple(int(part) for part in word.split("x"))):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


@dataclass(eq=False)
class CheckpointDrafter:
    """A drafter to be loaded for a target.

    Args:
        name: as the user wrote it.
        path: a directory.
        options: of the loader.
        loader: builds the drafter.

    Raises:
        LoadError: there is no such directory.
    """

    name: str
    path: Path
    options: Mapping[str, Any]
    loader: Loader
    _loaded: tuple[ref[Any], Draws | None, Drafter] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise LoadError(f"drafter {self.name!r}: there is no directory {str(self.path)!r}")
        if not (self.path / "config.json").is_file():
            found = ", ".join(sorted(entry.name for entry in self.path.iterdir())[:8]) or "nothing"
            raise LoadError(f"drafter {self.name!r}: looked for config.json, found {found}")

    def load(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, draws: Draws | None) -> Drafter:
        """The drafter for ``model``; asked again for the same target it is the same object.

        Raises:
            ConfigError: an unknown option, or one outside its rule.
            LoadError: the checkpoint cannot be read, or does not fit the target.
            UnsupportedError: the model in it cannot draft.
        """
        if self._loaded is not None and self._loaded[0]() is model and self._loaded[1] == draws:
            return self._loaded[2]
        try:
            drafter = self.loader(self.path, model, tokenizer, draws, **self.options)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ConfigError(f"drafter {self.name!r}: {error}") from None
        self._loaded = ref(model), draws, drafter
        return drafter
