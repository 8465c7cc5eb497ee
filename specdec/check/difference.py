"""Where two outputs first differ, and whether rounding explains it.

Rule. Let r be the resolution of the model's dtype at the place of the difference: ``ULPS[dtype]`` units in the last
place of the largest logit there. The difference is a *numeric tie* if both hold:

1. both tokens are within reach: changing the logits of plain decoding by at most r / 2 each makes the sampler (filters,
   penalties and noise included) take the one, and also the other;
2. in the next wider precision both ways of decoding give the same output for this request, to its end.

Anything else is a bug. The first condition alone would excuse a bug that happens to hit a close call, the second
alone one that shows in one precision only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from specdec.check.lab import GENERATE, PLAIN, Lab
from specdec.check.report import Comparison, Difference, TokenAt
from specdec.check.settings import Setting
from specdec.errors import InternalError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.check.lab import Outputs
    from specdec.types import Request, StepEvent

__all__ = ["ULPS", "Judge", "can_take", "resolution", "tie_rule", "upcast"]

# Half precisions: the last rounding, of the logit itself, is the largest; measured differences between two orders of
# computing stay within 2 of them, and this is twice that. float32 products are accumulated in float32, whose error
# grows with the square root of the number of terms: 16 allows for some thousand.
ULPS: Final = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 16.0, torch.float64: 16.0}
_WIDER: Final = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
_NUM_TRIALS: Final = 32  # random changes tried besides the two directed ones


def resolution(logits: Tensor, dtype: torch.dtype) -> float:
    """Logits [V] of a model in ``dtype`` that are closer than this cannot be told apart."""
    finite = logits[torch.isfinite(logits)]
    return ULPS[dtype] * torch.finfo(dtype).eps * float(finite.abs().max())


def tie_rule(dtype: torch.dtype) -> str:
    """The rule in words, for reports."""
    wide = _name(_WIDER.get(dtype))
    return (
        f"a first difference is a numeric tie if changing the logits there by at most half of {ULPS[dtype]:g} x "
        f"{torch.finfo(dtype).eps:.3g} (the precision of {_name(dtype)}) x the largest logit leads to either token, "
        f"and both ways of decoding give the same output in {wide}; anything else is a bug"
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
    wide = _WIDER.get(model.dtype)
    if wide is None:
        raise UnsupportedError(f"there is no precision wider than {_name(model.dtype)} to decide in")
    if getattr(model, "is_quantized", False):
        raise UnsupportedError("a quantised model cannot be copied to a wider precision")
    needed = sum(p.numel() for p in model.parameters()) * wide.itemsize
    try:
        copied: PreTrainedModel = copy.deepcopy(model).to(wide)
    except (MemoryError, RuntimeError) as error:  # torch reports exhausted memory as a RuntimeError
        raise UnsupportedError(f"a copy in {_name(wide)} needs {needed / 1e9:.1f} GB more: {error}") from error
    return copied


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class _Recorder:
    """Keeps the logits that led to one token of one request."""

    request_id: str
    position: int  # absolute
    logits: Tensor | None = None

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            if event.state.request_id == self.request_id and event.trace.position == self.position:
                self.logits = event.output.logits[int(event.output.cu_nodes[event.row])].float().clone()


@dataclass(slots=True)
class Judge:
    """Compares outputs and decides what the differences mean.

    Args:
        lab: the model as it is.
        tokenizer: for the text of tokens.
        notes: what readers of the report should know; grows when memory is taken for a wider copy.
    """

    lab: Lab
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str] = field(default_factory=list)
    _wide: Lab | UnsupportedError | None = None

    def compare(self, setting: Setting, decoder: str, against: str, *, got: Outputs | None = None) -> Comparison:
        """All outputs of ``decoder`` against those of ``against`` (PLAIN or GENERATE).

        Args:
            setting: how tokens are chosen.
            decoder: whose outputs are checked.
            against: the reference.
            got: outputs to take in place of the decoder's own.
        """
        reference = self.lab.outputs(setting, against)
        checked = got or self.lab.outputs(setting, decoder)
        num_tokens, differences = 0, []
        requests = [r for r in self.lab.plan.requests(setting) if r.request_id in checked.token_ids]
        for request in requests:
            expected, ids = reference.token_ids[request.request_id], checked.token_ids[request.request_id]
            position = _first_difference(expected, ids)
            num_tokens += len(expected) if position is None else position + 1
            if position is not None:
                tokens = (expected[position : position + 1], ids[position : position + 1])
                differences.append(self._judge(setting, decoder, against, request, position, tokens))
        return Comparison(
            setting=setting.name,
            decoder=decoder,
            against=against,
            num_requests=len(requests),
            num_tokens=num_tokens,
            acceptance_length=checked.acceptance_length,
            differences=tuple(differences),
        )

    def _judge(
        self,
        setting: Setting,
        decoder: str,
        against: str,
        request: Request,
        position: int,
        tokens: tuple[list[int], list[int]],
    ) -> Difference:
        """One difference: ``tokens`` are the reference's and the other one, each empty where its output has ended."""
        dtype = self.lab.model.dtype
        found = Difference(
            request_id=request.request_id,
            position=position,
            expected=self._token(tokens[0]),
            got=self._token(tokens[1]),
            top2_margin=None,
            contested_margin=None,
            wide_margin=None,
            resolution=None,
            wide_dtype=_name(_WIDER.get(dtype)),
            wide_agrees=None,
            verdict="bug",
            reason="one output ends where the other goes on",
        )
        if not (tokens[0] and tokens[1]):
            return found
        prefix = self._prefix(setting, request, position, PLAIN if against != GENERATE else GENERATE)
        logits = self._logits(setting, request, prefix)
        if logits is None:
            return replace(found, reason="plain decoding, run once more, did not come to this place")
        closest = resolution(logits, dtype)
        scores = setting.keyed_scores(prefix, logits, seed=request.sampling.seed)
        best, second = scores.topk(2).values.tolist()
        found = replace(
            found,
            top2_margin=best - second,
            contested_margin=float(scores[tokens[0][0]] - scores[tokens[1][0]]),
            resolution=closest,
        )
        for token_id in (tokens[0][0], tokens[1][0]):
            if not can_take(setting, prefix, logits, token_id, seed=request.sampling.seed, resolution=closest):
                return replace(found, reason=f"token {token_id} is out of reach of the rounding of {_name(dtype)} here")
        return self._decide_wide(found, setting, decoder, against, request, prefix, (tokens[0][0], tokens[1][0]))

    def _decide_wide(
        self,
        found: Difference,
        setting: Setting,
        decoder: str,
        against: str,
        request: Request,
        prefix: Tensor,
        tokens: tuple[int, int],
    ) -> Difference:
        """The second condition of the rule."""
        try:
            wide = self.wide()
        except UnsupportedError as error:
            return replace(found, reason=f"the tokens are close, but it could not be decided: {error}")
        row = _forward(wide.model, prefix)
        scores = setting.keyed_scores(prefix, row, seed=request.sampling.seed)
        reference = wide.outputs(setting, against).token_ids[request.request_id]
        agrees = reference == wide.outputs(setting, decoder).token_ids[request.request_id]
        return replace(
            found,
            wide_margin=float(scores[tokens[0]] - scores[tokens[1]]),
            wide_agrees=agrees,
            verdict="tie" if agrees else "bug",
            reason=f"the tokens are closer than rounding, and in {found.wide_dtype} the outputs are equal"
            if agrees
            else f"the tokens are close, but the outputs differ in {found.wide_dtype} too",
        )

    def wide(self) -> Lab:
        """The same plan for a copy of the model in a wider precision, made when first needed.

        Raises:
            UnsupportedError: the model cannot be copied.
        """
        if self._wide is None:
            try:
                model = upcast(self.lab.model)
            except UnsupportedError as error:
                self._wide = error
            else:
                nbytes = sum(p.nbytes for p in model.parameters())
                self.notes.append(f"a copy of the model in {_name(model.dtype)} took {nbytes / 1e9:.2g} GB of memory")
                self._wide = replace(self.lab, model=model, on_request=lambda: None, _outputs={})
        if isinstance(self._wide, UnsupportedError):
            raise self._wide
        return self._wide

    def _prefix(self, setting: Setting, request: Request, position: int, reference: str) -> Tensor:
        """[P + position] int64: the tokens that both outputs have in common."""
        output = self.lab.outputs(setting, reference).token_ids[request.request_id][:position]
        ids = np.concatenate([request.prompt_ids, output]).astype(np.int64)
        return torch.from_numpy(ids).to(self.lab.model.device)

    def _logits(self, setting: Setting, request: Request, prefix: Tensor) -> Tensor | None:
        """[V] float32: what plain decoding chose from after ``prefix``; None if it did not come there."""
        plain = self.lab.outputs(setting, PLAIN).token_ids[request.request_id]
        position = len(prefix) - len(request.prompt_ids)
        if plain[:position] != prefix[len(request.prompt_ids) :].tolist() or len(plain) <= position:
            # transformers parted from plain decoding earlier than here.
            return _forward(self.lab.model, prefix)
        recorder = _Recorder(request.request_id, len(prefix))
        self.lab.decode([request], "none", budget=0, batch_size=1, observers=[recorder])
        return recorder.logits

    def _token(self, ids: list[int]) -> TokenAt:
        if not ids:
            return TokenAt(None, "(end)")
        return TokenAt(ids[0], str(self.tokenizer.decode(ids)) if self.tokenizer is not None else "")


@torch.inference_mode()
def _forward(model: PreTrainedModel, prefix: Tensor) -> Tensor:
    """[V] float32: the logits after a prefix [S], by an ordinary forward of the whole of it."""
    logits: Tensor = model(input_ids=prefix[None].to(model.device), use_cache=False).logits
    return logits[0, -1].float()


def _first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first place where two outputs differ; the end of the shorter one if it is the other's beginning."""
    if len(expected) == 0 and len(got) == 0:
        raise InternalError("two empty outputs were compared: every request emits at least one token")
    for index, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))
