"""Early exit: the target's own first layers, its last norm and its head guess; ``early-exit:3`` leaves after three.

Nothing is loaded and no weight is held twice: a draft runs the target's own modules with its list of layers cut short
for as long as the forward lasts. It has its own KV pool. Targets trained for it (LayerSkip, Elhoushi et al. 2024,
arXiv 2404.16710) exit well at a third of their layers; others accept less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from specdec.drafters.checkpoint import parse_name
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.lm import LmDrafter
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["first_layers", "load_early_exit", "read_early_exit"]

_MAX_LENGTH = 32_768  # for models that state no limit


def read_early_exit(name: str) -> tuple[int, dict[str, Any]]:
    """The number of layers and the options of ``early-exit:N?options``.

    Raises:
        ConfigError: N is no number above 0.
    """
    _, source, options = parse_name(name)
    if not (source.isdecimal() and int(source) >= 1):
        raise ConfigError(f"early-exit:N needs the number of layers, N >= 1, got {name!r}")
    return int(source), options


@contextmanager
def first_layers(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Let ``model`` have its first ``count`` layers only.

    Raises:
        UnsupportedError: it has no list of layers, or not more than ``count``.
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) <= count:
        num_layers = len(layers) if isinstance(layers, nn.ModuleList) else "no list of"
        raise UnsupportedError(f"early-exit:{count} needs more layers than that, the target has {num_layers} layers")
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers


def load_early_exit(
    source: int,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    kv_tokens: int = 16_384,
    max_requests: int = 64,
    **options: Any,
) -> Drafter:
    """The drafter of ``early-exit:N``.

    Args:
        source: layers, fewer than the target has.
        target: whose layers these are.
        tokenizer: not needed: the tokens are the target's own.
        draws: for a rejection rule.
        kv_tokens: tokens that its cache holds over all requests.
        max_requests: most requests that it drafts for at a time.
        **options: of ``LmDrafter``.

    Raises:
        ConfigError: an option is outside its rule.
        UnsupportedError: the target has no such layers, or cannot score trees.
    """
    for name, value in (("kv_tokens", kv_tokens), ("max_requests", max_requests)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    config = target.config.get_text_config()
    short = partial(first_layers, target, source)
    with short():
        scorer = DraftModel(
            target, kv_tokens=kv_tokens, max_length=getattr(config, "max_position_embeddings", None) or _MAX_LENGTH,
            max_requests=max_requests, around_forward=short,
        )  # fmt: skip
    return LmDrafter(scorer, vocab_size=int(config.vocab_size), draws=draws, **options)
