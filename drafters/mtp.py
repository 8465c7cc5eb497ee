"""``mtp``: a target's own multi-token-prediction layers, which transformers leaves out when it loads the target.

They lie among the target's own safetensors files in one of two layouts, and transformers' ``MtpModel`` turns either
into a decoder layer of the target's kind:

| published by | tensors, N = ``num_hidden_layers`` |
| --- | --- |
| DeepSeek-V3, GLM-4.5 | ``model.layers.N.{enorm, hnorm, eh_proj, shared_head.norm}`` and a layer beside them |
| Mellum (Qwen3-Next's names) | ``mtp.{pre_fc_norm_embedding, pre_fc_norm_hidden, fc, norm}``, ``mtp.layers.0.*`` |

The copies of embedding and ``lm_head`` in the former are not read: they are the target's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from specdec.drafters.checkpoint import parse_name
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.hub import checkpoint_folder
from specdec.drafters.mtp_head import MtpHead
from specdec.drafters.target_vocabulary import embed_and_project
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.protocols import Drafter, Draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_mtp", "read_mtp"]

logger = logging.getLogger(__name__)

_READABLE = ("F64", "F32", "F16", "BF16")
_MAX_LENGTH = 32_768  # for models that state no limit


def read_mtp(name: str) -> tuple[None, dict[str, Any]]:
    """The options of ``mtp?options``.

    Raises:
        ConfigError: there is a path, too.
    """
    _, source, options = parse_name(name)
    if source:
        raise ConfigError(f"mtp takes no path, its layers are in the target's own checkpoint, got {name!r}")
    return None, options


def load_mtp(
    source: None,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    draws: Draws | None,
    *,
    top_k: int = 1,
    depth: int = 3,
    **options: Any,
) -> Drafter:
    """The drafter of ``mtp``.

    Args:
        source: nothing.
        target: loaded from the checkpoint that has the layers.
        tokenizer: not needed: the tokens are the target's own.
        draws: None: trees are chosen after the draw, so only match may judge them.
        top_k: children per node; 1: a chain.
        depth: longest path. The layer was trained for the first token of it.
        **options: of ``EagleDrafter``.

    Raises:
        LoadError: the checkpoint has no such layers, or they cannot be read.
        UnsupportedError: transformers cannot build them, they are quantised, or a rejection rule is asked for.
    """
    if draws is not None:
        raise UnsupportedError("drafts of MTP layers need the match rule: their nodes are chosen after they were drawn")
    config = target.config.get_text_config()
    embed, project = embed_and_project(target, {})
    head = MtpHead(
        _load_layers(target), num_layers=int(config.num_hidden_layers), embed=embed, project=project,
        max_length=getattr(config, "max_position_embeddings", None) or _MAX_LENGTH,
    )  # fmt: skip
    return EagleDrafter(head, vocab_size=int(config.vocab_size), top_k=top_k, depth=depth, **options)


def _load_layers(target: PreTrainedModel) -> Any:
    """The ``MtpModel`` of a target, with weights."""
    name, config = type(target).__name__, target.config.get_text_config()
    count = getattr(config, "num_mtp_layers", None)
    if not count:
        raise LoadError(f"drafter mtp: {name} states no multi-token-prediction layers (num_nextn_predict_layers)")
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError as error:
        raise UnsupportedError(f"drafter mtp: this transformers has no multi-token prediction: {error}") from error
    if getattr(config, "logits_mup_width_multiplier", None) is not None:
        raise UnsupportedError(f"drafter mtp: {name} scales its logits, which is not supported")
    path = _folder(target)
    names = [f"model.layers.{config.num_hidden_layers + index}." for index in range(count)] + ["mtp."]
    _check_tensors(path, names)
    if count > 1:
        logger.warning("%s has %d MTP layers: the first one drafts all tokens, the others none", name, count)
    try:
        with _found_under(target, path, names):
            model: Any = MtpModel.from_pretrained(target, device_map={"": target.device})
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LoadError(f"drafter mtp: cannot load the layers of {path}: {_reason(error)}") from error
    for weight, value in model.layers[0].state_dict().items():
        if value.is_meta or (value.is_floating_point() and not bool(value.isfinite().all())):
            raise LoadError(f"drafter mtp: {path}: {weight} {'has no values' if value.is_meta else 'is not finite'}")
    return model.eval()


def _reason(error: Exception) -> str:
    """The first line of an error; transformers names tensors of a wrong shape in its log only."""
    if "mismatched" in str(error):
        return "a tensor has another shape than the layer's own, see the log of transformers"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _folder(target: PreTrainedModel) -> Path:
    """Where the target was loaded from."""
    source = str(target.config.name_or_path)
    if not source:
        raise LoadError(f"drafter mtp: this {type(target).__name__} was not loaded from a checkpoint")
    revision = None if Path(source).is_dir() else getattr(target.config, "_commit_hash", None)
    return checkpoint_folder(source, revision=revision)


def _check_tensors(path: Path, names: Sequence[str]) -> None:
    """Refuse a checkpoint without tensors of these names, or in a form that holds no plain numbers."""
    found = False
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in [name for name in tensors.keys() if name.startswith(tuple(names))]:  # noqa: SIM118
                    found, form = True, tensors.get_slice(name).get_dtype()
                    if form not in _READABLE:
                        raise UnsupportedError(f"drafter mtp: {name} of {path} is quantised ({form})")
        except (OSError, SafetensorError) as error:
            raise LoadError(f"drafter mtp: cannot read {file}: {error}") from error
    if not found:
        looked = " and ".join(f"{name}*" for name in (names[0], names[-1]))
        raise LoadError(f"drafter mtp: {path} has no multi-token-prediction layers: looked for {looked} in safetensors")


@contextmanager
def _found_under(target: PreTrainedModel, path: Path, names: Sequence[str]) -> Iterator[None]:
    """Let ``MtpModel`` look for these names in this folder.

    It takes the folder from the target's configuration, and the names from those that the target's class leaves out,
    which are written for one published depth.
    """
    model: Any = target
    source, ignored = model.config.name_or_path, model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = [f"^{name}".replace(".", r"\.") for name in names]
    model.config.name_or_path = str(path)
    try:
        yield
    finally:
        model.config.name_or_path, model._keys_to_ignore_on_load_unexpected = source, ignored
