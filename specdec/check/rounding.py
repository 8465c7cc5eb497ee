"""What a precision can tell apart, and which tokens rounding can turn into each other."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from specdec.check.settings import Setting
from specdec.errors import UnsupportedError
from specdec.placement import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "NUM_MEASURED",
    "ULPS",
    "WIDER",
    "can_take",
    "last_logits",
    "measured_rounding",
    "name_of",
    "resolution",
    "tie_rule",
    "upcast",
]

# Half precisions: the last rounding, of the logit itself, is the largest; measured differences between two orders of
# computing stay within 2 of them, and this is twice that. float32 products are accumulated in float32, whose error
# grows with the square root of the number of terms: 16 allows for some thousand.
ULPS: Final = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 16.0, torch.float64: 16.0}
WIDER: Final = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
NUM_MEASURED: Final = 64  # positions whose rounding is measured
_NUM_TRIALS: Final = 32  # random changes tried besides the two directed ones


def resolution(logits: Tensor, dtype: torch.dtype) -> float:
    """Logits [V] of a model in ``dtype`` that are closer than this cannot be told apart."""
    finite = logits[torch.isfinite(logits)]
    return ULPS[dtype] * torch.finfo(dtype).eps * float(finite.abs().max())


def tie_rule(dtype: torch.dtype) -> str:
    """The rule in words, for reports."""
    wide = name_of(WIDER.get(dtype))
    return (
        f"a first difference is a numeric tie if changing the logits there by at most r / 2 leads to either token, and "
        f"both ways of decoding give the same output in {wide}; anything else is a bug. r is the larger of "
        f"{ULPS[dtype]:g} x {torch.finfo(dtype).eps:.3g} (the precision of {name_of(dtype)}) x the largest logit, and "
        f"twice the largest rounding error of an ordinary forward over the last {NUM_MEASURED} tokens, against {wide}"
    )


def can_take(
    setting: Setting, prefix_ids: Tensor, logits: Tensor, token_id: int, *, seed: int, resolution: float
) -> bool:
    """True if some change of the logits [V] by at most ``resolution / 2`` each makes the sampler take ``token_id``.

    The changes that are tried: none, the one that favours the token most, the one that disfavours its strongest rival
    most, and random ones, which find combinations at the borders of filters.
    """
    half = resolution / 2

    def takes(changed: Tensor) -> bool:
        return int(setting.keyed_scores(prefix_ids, changed, seed=seed).argmax()) == token_id

    favoured = logits - half
    favoured[token_id] += 2 * half
    best = int(setting.keyed_scores(prefix_ids, logits, seed=seed).argmax())
    without_best = logits + half
    without_best[best] -= 2 * half
    if best == token_id or takes(favoured) or takes(without_best):
        return True
    if setting.top_k == 0 and setting.top_p == 1:
        return False  # without borders the directed change is the best there is
    rng = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_NUM_TRIALS, len(logits)), generator=rng).to(logits) * 2 - 1  # [trials, V]
    signs[:, token_id] = 1
    return any(takes(logits + half * row) for row in signs)


def upcast(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in the next wider precision, on the same device.

    Raises:
        UnsupportedError: there is no wider precision, the model is quantised, or the copy does not fit.
    """
    wide = WIDER.get(model.dtype)
    if wide is None:
        raise UnsupportedError(f"there is no precision wider than {name_of(model.dtype)} to decide in")
    if getattr(model, "is_quantized", False):
        raise UnsupportedError("a quantised model cannot be copied to a wider precision")
    needed = sum(p.numel() for p in model.parameters()) * wide.itemsize
    try:
        copied: PreTrainedModel = copy.deepcopy(model).to(wide)
    except (MemoryError, RuntimeError) as error:  # torch reports exhausted memory as a RuntimeError
        raise UnsupportedError(f"a copy in {name_of(wide)} needs {needed / 1e9:.1f} GB more: {error}") from error
    return copied


def name_of(dtype: torch.dtype | None) -> str:
    """The name without the module."""
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def last_logits(model: PreTrainedModel, prefix: Tensor, num_rows: int = 1) -> Tensor:
    """[min(num_rows, S), V]: the logits after the last tokens of a prefix [S], by one ordinary forward of all of it."""
    logits: Tensor = model(input_ids=prefix[None].to(device_of(model)), use_cache=False).logits
    return logits[0, -num_rows:].float() if logits.dtype.itemsize < 4 else logits[0, -num_rows:]


def measured_rounding(model: PreTrainedModel, wide: PreTrainedModel, prefix: Tensor) -> float:
    """How far apart two right ways of computing these logits may be: twice the largest error of ``model`` in this text.

    A rule in units of the last place is too strict where rounding decides more than a sum: a router that sends a token
    to another expert changes logits by a lot. No engine takes part here, so no mistake of an engine can pass for
    rounding.

    Args:
        model: in its precision.
        wide: the same model in a wider one.
        prefix: [S] int64.
    """
    wide_logits = last_logits(wide, prefix, NUM_MEASURED)
    error = last_logits(model, prefix, NUM_MEASURED).to(wide_logits) - wide_logits
    return 2 * float(error[torch.isfinite(error)].abs().max())
