"""Processor objects of ``transformers`` and of users, turned into vectorised processors where their class is known.

The classes of ``transformers`` are known by name, so that this module never imports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from specdec.errors import RequestError, UnsupportedError
from specdec.processors.base import Op, PerNode
from specdec.processors.counts import NoRepeatToken, OutputPenalty, RepetitionPenalty
from specdec.processors.ngrams import NoRepeatNGram
from specdec.processors.rules import Ban, Force, SequenceBias
from specdec.processors.warpers import (
    EpsilonCutoff,
    EtaCutoff,
    MinP,
    Normalize,
    RemoveInvalid,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)
from specdec.types import LogitsProcessor, RequestState

__all__ = ["Context", "OutputPenaltyLogitsProcessor", "class_name", "flatten", "from_object", "no_repeat"]

_HF_MODULE: Final = "transformers.generation.logits_process"
# Classes of transformers that are pure functions of one row's (prefix, scores), run as they are. The watermark belongs
# here: it seeds its generator from the prefix at every call.
_PURE: Final = frozenset(
    {
        "ExponentialDecayLengthPenalty",
        "LogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "TopHLogitsWarper",
        "WatermarkLogitsProcessor",
    }
)


@dataclass(frozen=True, slots=True)
class Context:
    """What compiling needs to know of the request."""

    state: RequestState
    vocab_size: int
    device: torch.device

    def ids(self, name: str, token_ids: Sequence[int]) -> list[int]:
        """The ids, checked."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(f"{name} must hold token ids in [0, {self.vocab_size}), got {token_id}")
        return [int(token_id) for token_id in token_ids]

    def known(self, token_ids: Sequence[int]) -> list[int]:
        """The ids below V; transformers passes over the others where it only bans."""
        return [int(token_id) for token_id in token_ids if 0 <= token_id < self.vocab_size]


def flatten(items: Sequence[Any]) -> Iterator[Any]:
    """The processors one by one; a ``LogitsProcessorList`` is a list."""
    for item in items:
        if isinstance(item, list):
            yield from flatten(item)
        else:
            yield item


def class_name(processor: Any) -> str:
    """The name of a known class; empty for the user's own ones, subclasses included."""
    kind = type(processor)
    is_known = kind.__module__ == _HF_MODULE or kind is OutputPenaltyLogitsProcessor
    return str(kind.__name__) if is_known else ""


def from_object(request: Context, processor: LogitsProcessor) -> Op:
    """The vectorised processor that does what ``processor`` does, or ``processor`` itself per node.

    A processor of the user's own may bring its vectorised form along, as a method ``tree_op(context) -> Op``.
    """
    if not callable(processor):
        raise RequestError(f"logits_processors must be callables (input_ids, scores) -> scores, got {processor!r}")
    if callable(tree_op := getattr(processor, "tree_op", None)):
        own: Op = tree_op(request)
        return own
    for base in type(processor).__mro__:
        if base.__module__ == _HF_MODULE and base.__name__ not in _PURE and base.__name__ not in _COMPILERS:
            raise UnsupportedError(
                f"{base.__name__} cannot be applied to draft trees: it is not a function of one sequence's tokens and "
                f"scores alone (it keeps state between calls, or needs other inputs)"
            )
    compiler = _COMPILERS.get(class_name(processor))
    op = compiler(request, processor) if compiler is not None else None
    return op if op is not None else PerNode(processor)


def no_repeat(request: Context, size: int) -> Op:
    """The processor for n-grams of any size."""
    if size == 1:
        return NoRepeatToken(request.state.token_ids, request.vocab_size, request.device)
    return NoRepeatNGram(size, request.state.token_ids)


def _repetition(request: Context, processor: Any) -> Op | None:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):
        if bool((ignored != 0).any()):
            raise UnsupportedError(
                "RepetitionPenaltyLogitsProcessor.prompt_ignore_length must be a number for one sequence, got the "
                f"tensor {ignored.tolist()}: left padding is no part of a request's prompt"
            )
        ignored = 0
    ignored = ignored or 0
    if ignored > request.state.num_prompt_tokens:
        return None  # a part of the output is ignored: leave that to the class
    seen = request.state.token_ids[ignored:]
    return RepetitionPenalty(processor.penalty, seen, request.vocab_size, request.device)


def _output_penalty(request: Context, processor: Any) -> Op:
    seen = request.state.token_ids[processor.prompt_length :]
    return OutputPenalty(processor.presence, processor.frequency, seen, request.vocab_size, request.device)


def _sequence_bias(request: Context, processor: Any) -> Op:
    name = type(processor).__name__
    biases = {tuple(request.ids(name, sequence)): bias for sequence, bias in processor.sequence_bias.items()}
    return SequenceBias(biases, request.device)


def _truncation(kind: Callable[[float], Op], attribute: str) -> Callable[[Context, Any], Op | None]:
    """A compiler for classes with one number, as long as the rarely used others have their usual values."""

    def compile_one(request: Context, processor: Any) -> Op | None:
        if processor.filter_value != -math.inf or getattr(processor, "min_tokens_to_keep", 1) != 1:
            return None
        return kind(float(getattr(processor, attribute)))

    return compile_one


def _ids(tensor: Tensor) -> list[int]:
    return [int(token_id) for token_id in tensor.flatten().tolist()]


_COMPILERS: Final[dict[str, Callable[[Context, Any], Op | None]]] = {
    "EpsilonLogitsWarper": _truncation(EpsilonCutoff, "epsilon"),
    "EtaLogitsWarper": _truncation(EtaCutoff, "epsilon"),
    "ForcedBOSTokenLogitsProcessor": lambda r, p: Force(r.ids(type(p).__name__, [p.bos_token_id]), 1, r.device),
    "ForcedEOSTokenLogitsProcessor": lambda r, p: Force(
        r.ids(type(p).__name__, _ids(p.eos_token_id)), p.max_length - 1, r.device
    ),
    "InfNanRemoveLogitsProcessor": lambda r, p: RemoveInvalid(),
    "LogitNormalization": lambda r, p: Normalize(),
    "MinLengthLogitsProcessor": lambda r, p: Ban(r.known(_ids(p.eos_token_id)), 0, p.min_length, r.device),
    "MinNewTokensLengthLogitsProcessor": lambda r, p: Ban(
        r.known(_ids(p.eos_token_id)), 0, p.prompt_length_to_skip + p.min_new_tokens, r.device
    ),
    "MinPLogitsWarper": _truncation(MinP, "min_p"),
    "NoBadWordsLogitsProcessor": _sequence_bias,
    "NoRepeatNGramLogitsProcessor": lambda r, p: no_repeat(r, p.ngram_size),
    "OutputPenaltyLogitsProcessor": _output_penalty,
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "SequenceBiasLogitsProcessor": _sequence_bias,
    "SuppressTokensAtBeginLogitsProcessor": lambda r, p: Ban(
        r.known(_ids(p.begin_suppress_tokens)), p.begin_index, p.begin_index + 1, r.device
    ),
    "SuppressTokensLogitsProcessor": lambda r, p: Ban(r.known(_ids(p.suppress_tokens)), 0, None, r.device),
    "TemperatureLogitsWarper": lambda r, p: Temperature(p.temperature),
    "TopKLogitsWarper": lambda r, p: TopK(p.top_k) if p.filter_value == -math.inf else None,
    "TopPLogitsWarper": lambda r, p: (
        TopP(1 - p.top_p) if p.filter_value == -math.inf and p.min_tokens_to_keep == 1 else None
    ),
    "TypicalLogitsWarper": _truncation(TypicalP, "mass"),
}


class OutputPenaltyLogitsProcessor:
    """Presence and frequency penalties as a processor of ``transformers``' shape, which has none.

    ``score -= frequency * count``, then ``score -= presence`` if the count is not 0, where the count is how often the
    token was written after the prompt. Pass it to a plain ``generate`` to get the law of
    ``SamplingParams(presence_penalty=..., frequency_penalty=...)``; it stands behind the repetition penalty.

    Args:
        presence: penalty of a token that was written at all.
        frequency: penalty per time that it was written.
        prompt_length: P; tokens before it are not counted.

    Source: the OpenAI API reference, "frequency and presence penalties".
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self.presence = presence
        self.frequency = frequency
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores, penalised by the tokens of ``input_ids`` [B, S] after the prompt."""
        counts = torch.zeros_like(scores)
        written = input_ids[:, self.prompt_length :]
        counts.scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
