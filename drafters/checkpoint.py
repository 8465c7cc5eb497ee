"""Drafters that need the target to be built: a name now, an object once the target is there.

A name is ``KIND:SOURCE`` or ``KIND:SOURCE?option=value&option=value``, such as ``lm:models/small?depth=6``. What stands
behind the colon is read by the kind (``DrafterKind.read``), so that everything that can be wrong without the target is
said when the name is read, and loaded by it (``DrafterKind.load``) when the target is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl
from weakref import ref

from specdec.drafters.hub import checkpoint_folder
from specdec.errors import ConfigError, LoadError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DrafterKind",
    "Loader",
    "PendingDrafter",
    "Reader",
    "kind_in",
    "parse_name",
    "read_checkpoint",
    "short_name",
]

# (source, target, its tokenizer or None, how to draw, **options) -> drafter
Loader: TypeAlias = Callable[..., Drafter]
# name -> (source, options)
Reader: TypeAlias = Callable[[str], tuple[Any, dict[str, Any]]]


def parse_name(name: str) -> tuple[str, str, dict[str, Any]]:
    """Kind, source and options of a drafter's name.

    Raises:
        ConfigError: an option without a value, or the same option twice.

    Example:
        >>> parse_name("lm:models/small?depth=6&min_gain=0.2&fan_out=2x1")
        ('lm', 'models/small', {'depth': 6, 'min_gain': 0.2, 'fan_out': (2, 1)})
    """
    front, has_options, query = name.partition("?")
    kind, _, source = front.partition(":")
    try:
        pairs = parse_qsl(query, keep_blank_values=False, strict_parsing=True) if has_options else []
    except ValueError:
        raise ConfigError(f"options of a drafter are written ?name=value&name=value, got {query!r}") from None
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"an option of a drafter can be given once, got {query!r}")
    return kind, source, {key: _value(text) for key, text in pairs}


def kind_in(name: str, kinds: Mapping[str, DrafterKind]) -> str | None:
    """What stands before the colon of a name, or the one of ``kinds`` that is named without a colon; None: neither."""
    kind, colon, _ = name.partition("?")[0].partition(":")
    return kind if colon or (kind in kinds and not kinds[kind].takes) else None


def _value(text: str) -> Any:
    """A number, several numbers joined by x, or the text itself."""
    for convert in (int, float, lambda word: tuple(int(part) for part in word.split("x"))):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def short_name(name: str) -> str:
    """A drafter's name without the folders of its checkpoints: where these lie is nobody's business.

    Example:
        >>> short_name("fused:suffix+eagle:/models/heads/code?top_k=4")
        'fused:suffix+eagle:code?top_k=4'
    """
    return "+".join(_short(part) for part in name.split("+"))


def _short(part: str) -> str:
    front, mark, options = part.partition("?")
    kinds, colon, source = front.rpartition(":")
    return f"{kinds}{colon}{Path(source).name}{mark}{options}"


def read_checkpoint(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the options of ``KIND:PATH?options``; PATH is a directory or a name on the hub.

    The option ``revision`` is read here: branch, tag or commit on the hub.

    Raises:
        ConfigError: the options cannot be read.
        LoadError: there is no checkpoint of that name.
    """
    _, source, options = parse_name(name)
    revision = options.pop("revision", None)
    try:
        return checkpoint_folder(source, revision=None if revision is None else str(revision)), options
    except LoadError as error:
        raise LoadError(f"drafter {name!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What ``KIND:`` means.

    Args:
        load: builds the drafter: ``load(source, target, tokenizer, draws, **options)``.
        read: the source and the options from the whole name; by default ``PATH?options``.
        takes: what stands behind the colon, for messages; nothing: it is named without a colon.
    """

    load: Loader
    read: Reader = read_checkpoint
    takes: str = "PATH"


@dataclass(eq=False)
class PendingDrafter:
    """A drafter that waits for its target.

    Args:
        name: as the user wrote it.
        kind: what its name begins with.
        more: options besides those in the name; they win.

    Raises:
        ConfigError: the options in the name cannot be read.
        LoadError: what it names is not there.
    """

    name: str
    kind: DrafterKind
    more: Mapping[str, Any] = field(default_factory=dict)
    source: Any = field(init=False)
    options: dict[str, Any] = field(init=False)
    _loaded: tuple[ref[Any], Draws | None, Drafter] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.source, written = self.kind.read(self.name)
        self.options = {**written, **self.more}

    def load(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, draws: Draws | None = None
    ) -> Drafter:
        """The drafter for ``model``; asked again for the same target it is the same object.

        Raises:
            ConfigError: an unknown option, or one outside its rule.
            LoadError: the checkpoint cannot be read, or does not fit the target.
            UnsupportedError: the model in it cannot draft.
        """
        if self._loaded is not None and self._loaded[0]() is model and self._loaded[1] == draws:
            return self._loaded[2]
        try:
            drafter = self.kind.load(self.source, model, tokenizer, draws, **self.options)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ConfigError(f"drafter {self.name!r}: {error}") from None
        self._loaded = ref(model), draws, drafter
        return drafter
