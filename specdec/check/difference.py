"""Where two outputs first differ, and whether rounding explains it.

Rule. Let r be the resolution of the model's dtype at the place of the difference: the larger of ``ULPS[dtype]`` units
in the last place of the largest logit there, and twice the rounding error that an ordinary forward of the model is seen
to make in this text. The difference is a *numeric tie* if both hold:

1. both tokens are within reach: changing the logits of plain decoding by at most r / 2 each makes the sampler (filters,
   penalties and noise included) take the one, and also the other;
2. in the next wider precision both ways of decoding give the same output for this request, to its end.

Anything else is a bug. The first condition alone would excuse a bug that happens to hit a close call, the second
alone one that shows in one precision only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specdec.check.lab import GENERATE, PLAIN, Lab
from specdec.check.report import Comparison, Difference, TokenAt
from specdec.check.rounding import WIDER, can_take, last_logits, measured_rounding, name_of, resolution, upcast
from specdec.check.settings import Setting
from specdec.errors import InternalError, UnsupportedError
from specdec.placement import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdec.check.lab import Outputs
    from specdec.types import Request, StepEvent

__all__ = ["Judge"]


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
        is_strict: the engine promises equal bits: a difference from plain decoding is a bug, however close it was.
        measures: make the wider copy also to measure rounding where the precision alone explains nothing.
    """

    lab: Lab
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str] = field(default_factory=list)
    measures: bool = True
    is_strict: bool = False
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
            wide_dtype=name_of(WIDER.get(dtype)),
            wide_agrees=None,
            verdict="bug",
            reason="one output ends where the other goes on",
        )
        if not (tokens[0] and tokens[1]):
            return found
        if self.is_strict and against == PLAIN:
            return replace(found, reason="strict numerics promise the same bits, so no rounding excuses this")
        prefix = self._prefix(setting, request, position, PLAIN if against != GENERATE else GENERATE)
        logits = self._logits(setting, request, prefix)
        if logits is None:
            return replace(found, reason="plain decoding, run once more, did not come to this place")
        scores = setting.keyed_scores(prefix, logits, seed=request.sampling.seed)
        best, second = scores.topk(2).values.tolist()
        pair = (tokens[0][0], tokens[1][0])
        found = replace(
            found,
            top2_margin=best - second,
            contested_margin=float(scores[pair[0]] - scores[pair[1]]),
            resolution=resolution(logits, dtype),
        )
        lost = _out_of_reach(found, setting, prefix, logits, pair, request)
        if lost is not None:
            found = self._with_measured(found, prefix)
            lost = _out_of_reach(found, setting, prefix, logits, pair, request)
        if lost is not None:
            return replace(found, reason=f"token {lost} is out of reach of the rounding of {name_of(dtype)} here")
        return self._decide_wide(found, setting, decoder, against, request, prefix, pair)

    def _with_measured(self, found: Difference, prefix: Tensor) -> Difference:
        """With the rounding error that the model is seen to make, if that is more than the precision's."""
        if not self.measures:
            return found
        try:
            measured = measured_rounding(self.lab.model, self.wide().model, prefix)
        except UnsupportedError:
            return found
        return replace(found, resolution=max(measured, found.resolution or 0.0))

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
        row = last_logits(wide.model, prefix)[0]
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
                self.notes.append(f"a copy of the model in {name_of(model.dtype)} took {nbytes / 1e9:.2g} GB of memory")
                self._wide = replace(self.lab, model=model, on_request=lambda: None, _outputs={})
        if isinstance(self._wide, UnsupportedError):
            raise self._wide
        return self._wide

    def _prefix(self, setting: Setting, request: Request, position: int, reference: str) -> Tensor:
        """[P + position] int64: the tokens that both outputs have in common."""
        output = self.lab.outputs(setting, reference).token_ids[request.request_id][:position]
        ids = np.concatenate([request.prompt_ids, output]).astype(np.int64)
        return torch.from_numpy(ids).to(device_of(self.lab.model))

    def _logits(self, setting: Setting, request: Request, prefix: Tensor) -> Tensor | None:
        """[V] float32: what plain decoding chose from after ``prefix``; None if it did not come there."""
        plain = self.lab.outputs(setting, PLAIN).token_ids[request.request_id]
        position = len(prefix) - len(request.prompt_ids)
        if plain[:position] != prefix[len(request.prompt_ids) :].tolist() or len(plain) <= position:
            # transformers parted from plain decoding earlier than here.
            return last_logits(self.lab.model, prefix)[0].float()
        recorder = _Recorder(request.request_id, len(prefix))
        self.lab.decode([request], "none", budget=0, batch_size=1, observers=[recorder])
        return recorder.logits

    def _token(self, ids: list[int]) -> TokenAt:
        if not ids:
            return TokenAt(None, "(end)")
        return TokenAt(ids[0], str(self.tokenizer.decode(ids)) if self.tokenizer is not None else "")


def _out_of_reach(
    found: Difference, setting: Setting, prefix: Tensor, logits: Tensor, pair: tuple[int, int], request: Request
) -> int | None:
    """The first of two tokens that no change of the logits within the resolution leads to."""
    for token_id in pair:
        reach = found.resolution or 0.0
        if not can_take(setting, prefix, logits, token_id, seed=request.sampling.seed, resolution=reach):
            return token_id
    return None


def _first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first place where two outputs differ; the end of the shorter one if it is the other's beginning."""
    if len(expected) == 0 and len(got) == 0:
        raise InternalError("two empty outputs were compared: every request emits at least one token")
    for index, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))
