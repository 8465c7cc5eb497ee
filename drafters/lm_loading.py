"""Loads a draft model for ``lm:PATH`` and finds out whether it speaks the target's tokens."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.fuzzy_layers import FuzzyLayers
from specdec.drafters.layer_tuning import same_logits, time_forms
from specdec.drafters.lm import LmDrafter
from specdec.drafters.lm_text import TextLmDrafter
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.packed_linear import packing_obstacle
from specdec.protocols import Drafter, Draws
from specdec.rope import freeze_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_layer_parallel", "load_lm", "load_model", "same_tokens", "tokenizer_of"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_USUAL_DEPTH = 8  # of a draft, where none is given
_MAX_LENGTH = 32_768  # for models that state no limit


def load_model(path: Path, target: PreTrainedModel) -> PreTrainedModel:
    """A causal LM from a directory, on the target's device and in its dtype.

    Raises:
        LoadError: it cannot be read.
    """
    import safetensors
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=target.dtype)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, safetensors.SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoadError(f"cannot load the draft model {str(path)!r}: {reason}") from error
    loaded: PreTrainedModel = model.eval().to(target.device)
    return loaded


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """True if every id that both know means the same token in both."""
    left, right = a.get_vocab(), b.get_vocab()
    size = min(max(left.values(), default=0), max(right.values(), default=0)) + 1
    return {t: i for t, i in left.items() if i < size} == {t: i for t, i in right.items() if i < size}


def load_lm(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    kv_tokens: int = 16_384,
    max_requests: int = 64,
    groups_of: int = 1,
    force: int = 0,
    packed: int = 1,
    **options: Any,
) -> Drafter:
    """The drafter of ``lm:PATH``.

    Args:
        path: a directory with a causal LM.
        target: the model it drafts for.
        tokenizer: the target's; needed where the draft model's is another one.
        draws: for a rejection rule.
        kv_tokens: tokens that the draft model's cache holds over all requests.
        max_requests: most requests that it drafts for at a time.
        groups_of: layers whose attentions run at the same time, see ``load_layer_parallel``.
        force: 1: use groups whether they pay or not, to see what they cost in acceptance.
        packed: 1: pack the weights on a CPU, where they can be (`specdec.packed_linear`).
        **options: of ``LmDrafter``, or of ``TextLmDrafter`` where the tokenizers differ.

    Raises:
        ConfigError: an option is outside its rule.
        LoadError: the model cannot be read.
        UnsupportedError: it cannot score trees, or speaks other tokens that nothing translates.
    """
    for name, value in (("kv_tokens", kv_tokens), ("max_requests", max_requests)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    small = load_model(path, target)
    length = getattr(small.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH
    freeze_rope(small, length)
    if _ranks() is not None and options.setdefault("min_gain", 0.1) == "auto":
        raise ConfigError(
            "several ranks must draft alike, and measured times differ: min_gain must be a number, not auto"
        )
    groups = _Groups(small, groups_of) if groups_of != 1 else None
    scorer = DraftModel(
        small, kv_tokens=kv_tokens, max_length=length, max_requests=max_requests,
        around_growth=nullcontext if groups is None else groups.around,
    )  # fmt: skip
    if packed and packing_obstacle(small) is None:
        scorer.pack()
    if groups is not None:
        groups.tune(scorer, depth=int(options.get("depth", _USUAL_DEPTH)), is_forced=bool(force))
    vocab_size = int(target.config.get_text_config().vocab_size)
    own = tokenizer_of(path)
    if own is not None and tokenizer is not None and not same_tokens(own, tokenizer):
        if draws is not None:
            raise UnsupportedError(
                f"the draft model {str(path)!r} has another tokenizer than the target, so it states no laws over the "
                "target's tokens and needs the match rule"
            )
        return TextLmDrafter(scorer, own=own, target=tokenizer, vocab_size=vocab_size, **options)
    if (own is None or tokenizer is None) and scorer.vocab_size != vocab_size:
        raise UnsupportedError(
            f"the draft model {str(path)!r} has {scorer.vocab_size} tokens and the target {vocab_size}; whether they "
            "mean the same can be told only with both tokenizers"
        )
    return LmDrafter(scorer, vocab_size=vocab_size, draws=draws, **options)


def load_layer_parallel(
    path: Path,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    n: int = 4,
    **options: Any,
) -> Drafter:
    """The drafter of ``layer-parallel:PATH?n=4``: ``lm:PATH`` whose draft nodes run in groups of n layers.

    If ``torch.distributed`` is initialised, the attentions of a group are shared out among all ranks, which must run
    the same requests; else they are batched. Groups are used only where a level of a draft, timed both ways, gains more
    than groups cost in acceptance. Other arguments and errors as in ``load_lm``; n must be >= 1.
    """
    return load_lm(path, target, tokenizer, draws, groups_of=n, **options)


def _ranks() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


class _Groups:
    """Groups of layers that are in use or not, as the tuner says."""

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        self._size, self._is_on, ranks = size, False, _ranks()
        try:
            self._layers = FuzzyLayers(model, size, ranks=ranks, is_batched=ranks is None)
        except UnsupportedError as error:
            if ranks is not None or "batched" not in str(error):
                raise
            logger.warning("%s: groups run layer by layer, which gains nothing", error)
            self._layers = FuzzyLayers(model, size)

    def around(self) -> AbstractContextManager[None]:
        return self._layers.active() if self._is_on else nullcontext()

    def tune(self, scorer: DraftModel, *, depth: int, is_forced: bool) -> None:
        """Decide whether groups are used.

        Raises:
            UnsupportedError: the batched form computes something else than the layers themselves.
        """
        if self._layers.is_batched:
            self._is_on = True
            if not same_logits(scorer, self._use_batched):
                raise UnsupportedError("the layers of this model cannot be batched: other logits come out")
        if is_forced:
            self._is_on = True
            return
        times = time_forms(scorer, self._use)
        self._use(times.pays(depth))
        logger.warning(
            "groups of %d layers %s: a level of a draft takes %.2f ms with them and %.2f ms without, so a draft of %d "
            "levels is there %.2f x as soon; force=1 uses them anyway",
            self._size, "are used" if self._is_on else "do not pay", times.groups_ms, times.exact_ms, depth,
            times.gain(depth),
        )  # fmt: skip

    def _use(self, is_on: bool) -> None:
        self._is_on = is_on

    def _use_batched(self, is_batched: bool) -> None:
        self._layers.is_batched = is_batched


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None."""
    import transformers

    # Without files transformers makes an empty tokenizer of the model's kind, which would look like another one.
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(path),
            trust_remote_code=False,  # never asked for on a terminal
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError):
        return None  # transformers has no one way of saying that the files of a tokenizer are missing
    return tokenizer
