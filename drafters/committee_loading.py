"""``committee:PATH,PATH?per_request=1``: some draft models that requests are routed among, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.drafters.checkpoint import DrafterKind, parse_name, read_checkpoint
from specdec.drafters.committee import CommitteeDrafter, CommitteeModel, Router
from specdec.drafters.lm import LmDrafter
from specdec.drafters.lm_loading import load_lm
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["committee_kind", "load_committee", "read_committee"]


def read_committee(name: str) -> tuple[list[Path], dict[str, Any]]:
    """The folders and the options of ``committee:PATH,PATH?options``.

    Raises:
        ConfigError: fewer than two models.
        LoadError: one of them is not there.
    """
    _, source, options = parse_name(name)
    parts = [part for part in source.split(",") if part]
    if len(parts) < 2:
        raise ConfigError(f"a committee needs at least two models, committee:PATH,PATH, got {name!r}")
    return [read_checkpoint(f"lm:{part}")[0] for part in parts], options


def load_committee(
    paths: Sequence[Path],
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    per_request: int = 1,
    seed: int = 0,
    kv_tokens: int = 16_384,
    **options: Any,
) -> Drafter:
    """The drafter of ``committee:PATH,PATH``.

    Args:
        paths: directories with causal LMs that speak the target's tokens.
        target: the model they draft for.
        tokenizer: the target's.
        draws: None: a committee states no laws, so only match may judge it.
        per_request: how many of them draft for one request, see ``Router``.
        seed: of the router's exploration.
        kv_tokens: tokens that each model's cache holds over all requests.
        **options: of ``LmDrafter``.

    Raises:
        ConfigError: an option is outside its rule.
        LoadError: a model cannot be read.
        UnsupportedError: a rejection rule is asked for, or a model has another tokenizer than the target.
    """
    if draws is not None:
        raise UnsupportedError("a committee of draft models needs the match rule: the surest model speaks for all")
    members = [load_lm(path, target, tokenizer, None, kv_tokens=kv_tokens) for path in paths]
    models = [member.model for member in members if isinstance(member, LmDrafter)]
    if len(models) < len(members):
        raise UnsupportedError("the models of a committee must have the target's tokenizer, and one has another")
    router = Router(len(models), per_request=per_request, seed=seed)
    vocab_size = int(target.config.get_text_config().vocab_size)
    return CommitteeDrafter(CommitteeModel(models, router), vocab_size=vocab_size, **options)


def committee_kind() -> DrafterKind:
    """What ``committee:`` means."""
    return DrafterKind(load_committee, read_committee, takes="PATH,PATH")
