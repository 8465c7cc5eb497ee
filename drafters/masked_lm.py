"""Masked diffusion language models (LLaDA, Dream, SDAR, Fast-dLLM and their like) in the form of transformers.

Such a model sees both ways and guesses all masks of a text at once. Two conventions are in use: the row at a mask
guesses the mask (LLaDA), or the row before it does (Dream, which began as a causal LM). Which one holds is told by the
kind of the model and tried on a short text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.drafters.checkpoint_files import read_config
from specdec.drafters.probing import Reading, choose_reading
from specdec.errors import ConfigError, LoadError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MaskedLm", "Rows", "load_masked_lm"]

_AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
_MAX_LENGTH = 32_768  # for models that state no limit
_STRIDE = 8  # one token of the probe's text in so many is masked


@dataclass(frozen=True, slots=True)
class Rows:
    """Which row of the logits guesses a mask.

    Args:
        is_shifted: the row before it, not its own.
    """

    is_shifted: bool


class MaskedLm:
    """A masked LM that guesses what comes after a text.

    Args:
        model: in evaluation mode; its output has ``logits``.
        mask_token_id: of its own vocabulary.
        is_shifted: see ``Rows``.

    Raises:
        ConfigError: the mask is no token of the model.
        UnsupportedError: the model does not see both ways.
    """

    def __init__(self, model: PreTrainedModel, *, mask_token_id: int, is_shifted: bool) -> None:
        self.model = model
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_length = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH)
        self.mask_token_id, self.is_shifted = mask_token_id, is_shifted
        if not 0 <= mask_token_id < self.vocab_size:
            raise ConfigError(f"the mask's id must be in [0, {self.vocab_size}), got {mask_token_id}")
        self._inputs = set(inspect.signature(model.forward).parameters)
        if not _sees_ahead(self):
            raise UnsupportedError(f"{type(model).__name__} sees no later token: it is no masked diffusion LM")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.model.device
        return device

    @property
    def can_cache(self) -> bool:
        """True if its forward takes a cache."""
        return {"past_key_values", "use_cache"} <= self._inputs

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, *, cache: Any = None, start: int = 0) -> Tensor:
        """[B, T, D] raw logits of rows [B, T]; with a cache of the ``start`` tokens before, which it extends."""
        inputs: dict[str, Any] = {"input_ids": token_ids}
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        elif "use_cache" in self._inputs:
            inputs["use_cache"] = False
        if "position_ids" in self._inputs:
            places = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)
            inputs["position_ids"] = places[None].expand(len(token_ids), -1)
        logits: Tensor = self.model(**inputs).logits
        return logits

    def guesses(self, token_ids: Tensor, first: int, num: int) -> Tensor:
        """[B, num, D] float32: the laws of the tokens at places ``first`` to ``first + num``; the mask is impossible.

        Args:
            token_ids: [B, T] of the model's vocabulary, masks included.
            first: >= 1.
            num: how many.
        """
        logits = self.forward(token_ids)[:, first - self.is_shifted : first - self.is_shifted + num]
        return self.without_mask(logits)

    def without_mask(self, logits: Tensor) -> Tensor:
        """float32 logits in which the mask is impossible."""
        mask = torch.tensor([self.mask_token_id], device=logits.device)
        return logits.float().index_fill(-1, mask, -torch.inf)

    def masked(self, token_ids: Sequence[int], num: int) -> Tensor:
        """[1, T + num]: a text and masks behind it."""
        return torch.tensor([[*token_ids, *[self.mask_token_id] * num]], device=self.device)


def load_masked_lm(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    probe_ids: Sequence[int] | None,
    mask: int | None = None,
    shift: int | None = None,
    trust: int = 0,
) -> MaskedLm:
    """A masked LM from a directory.

    Args:
        path: where it lies.
        device: to load to.
        dtype: to load in.
        probe_ids: a short text in the model's vocabulary, to try both conventions on; None: the stated one.
        mask: id of the mask; None: as the configuration or the tokenizer says.
        shift: 1: the row before a mask guesses it, 0: its own; None: find out.
        trust: 1: run the Python code that comes with the checkpoint.

    Raises:
        ConfigError: no mask is known.
        LoadError: it cannot be read.
        UnsupportedError: it needs code that is not trusted, or is no masked LM.
    """
    config = read_config(path)
    if config.get("auto_map") and not trust:
        raise UnsupportedError(f"the model {str(path)!r} comes with Python code of its own: trust=1 runs it")
    if mask is None:
        mask = config.get("mask_token_id")
    if mask is None:
        raise ConfigError(f"the configuration of {str(path)!r} does not say mask_token_id: give mask=")
    model = _load(path, config, device=device, dtype=dtype, trusted=bool(trust))
    stated = Rows(bool(shift) if shift is not None else "dream" in str(config.get("model_type")).lower())
    lm = MaskedLm(model, mask_token_id=int(mask), is_shifted=stated.is_shifted)
    if shift is None and probe_ids is not None:
        lm.is_shifted = choose_reading(path, _probe(lm, probe_ids, stated)).is_shifted
    return lm


def _load(path: Path, config: dict[str, Any], *, device: torch.device, dtype: torch.dtype, trusted: bool) -> Any:
    import safetensors
    import transformers

    mapped = config.get("auto_map") or {}
    named = [name for name in _AUTO_CLASSES if name in mapped] or [
        name for name in _AUTO_CLASSES if _knows(transformers, name, config.get("model_type"))
    ]
    if not named:
        raise LoadError(f"{str(path)!r}: transformers knows no language model of type {config.get('model_type')!r}")
    try:
        loaded: Any = getattr(transformers, named[0]).from_pretrained(str(path), dtype=dtype, trust_remote_code=trusted)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, safetensors.SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoadError(f"cannot load the diffusion model {str(path)!r}: {reason}") from error
    return loaded.eval().to(device)


def _knows(transformers: Any, auto_class: str, model_type: Any) -> bool:
    """True if an auto class of transformers knows a model type."""
    mapping = getattr(transformers, auto_class)._model_mapping
    return any(getattr(config, "model_type", None) == model_type for config in mapping)


def _probe(lm: MaskedLm, token_ids: Sequence[int], stated: Rows) -> list[Reading[Rows]]:
    """How many masked tokens of a text each convention names."""
    ids = torch.tensor(list(token_ids)[: lm.max_length], device=lm.device)
    places = torch.arange(_STRIDE, len(ids), _STRIDE, device=lm.device)
    masked = ids.clone()
    masked[places] = lm.mask_token_id
    best = lm.without_mask(lm.forward(masked[None]))[0].argmax(dim=-1)
    readings = []
    for rows in (stated, Rows(not stated.is_shifted)):
        named = best[places - int(rows.is_shifted)] == ids[places]
        readings.append(Reading(rows, float(named.float().mean())))
    return readings


def _sees_ahead(lm: MaskedLm) -> bool:
    """True if the last token changes what rows before it say."""
    ids = torch.arange(16, device=lm.device)[None] % lm.vocab_size
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % lm.vocab_size
    before, after = (lm.forward(row)[0, :-1] for row in (ids, changed))
    return not torch.equal(before, after)
