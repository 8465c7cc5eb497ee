"""From one request's parameters to its list of processors, in the order and with the meaning of ``transformers``.

The order is that of ``GenerationMixin._get_logits_processor``: what the fields of ``SamplingParams`` ask for, then the
user's own processors, then what only sampling uses. An object of a class that a field stands for takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from specdec.errors import RequestError
from specdec.processors.base import Op, PerNode
from specdec.processors.counts import OutputPenalty, RepetitionPenalty
from specdec.processors.objects import (
    Context,
    OutputPenaltyLogitsProcessor,
    class_name,
    flatten,
    from_object,
    no_repeat,
)
from specdec.processors.rules import Ban, Force, SequenceBias
from specdec.processors.warpers import EpsilonCutoff, EtaCutoff, MinP, Temperature, TopK, TopP, TypicalP
from specdec.types import RequestState, SamplingParams

__all__ = ["compile_processors"]


def compile_processors(state: RequestState, vocab_size: int, device: torch.device) -> list[Op]:
    """The processors of one request, in order; empty if the law is the softmax of the logits.

    Args:
        state: the request; its committed tokens count as seen.
        vocab_size: V.
        device: of the scores.

    Raises:
        RequestError: a token id is outside [0, V), or a bias is not a number.
        UnsupportedError: a processor of ``transformers`` that cannot be applied to a tree.
    """
    request = Context(state, vocab_size, device)
    own = list(_from_fields(request, state.request.sampling))
    users = [(class_name(item), item) for item in flatten(state.request.sampling.logits_processors)]
    ops: list[Op] = []
    placed: list[int] = []
    for name, op in own:  # as `_merge_criteria_processor_list` does it
        index = next((index for index, (other, _) in enumerate(users) if other == name), None)
        if index is None:
            ops.append(op)
        else:
            ops.append(from_object(request, users[index][1]))
            placed.append(index)
    ops += [from_object(request, item) for index, (_, item) in enumerate(users) if index not in placed]
    if not state.request.sampling.is_greedy:
        ops += _warpers(state.request.sampling)
    for index, op in enumerate(ops):
        if isinstance(op, PerNode):
            op.passes_over_impossible = not any(later.can_revive for later in ops[index + 1 :])
    return ops


def _from_fields(request: Context, params: SamplingParams) -> Iterator[tuple[str, Op]]:
    """(class name in transformers, processor) for every field that is on, except those that only sampling uses."""
    num_prompt, device, vocab_size = request.state.num_prompt_tokens, request.device, request.vocab_size
    end_ids = request.known(params.stop_token_ids)
    if params.logit_bias:
        for token_id, bias in params.logit_bias.items():
            if math.isnan(bias):
                raise RequestError(f"logit_bias must hold numbers, got nan for token {token_id}")
        ids = request.ids("logit_bias", list(params.logit_bias))
        values = map(float, params.logit_bias.values())
        biases: dict[tuple[int, ...], float] = dict(zip(((token_id,) for token_id in ids), values, strict=True))
        yield "SequenceBiasLogitsProcessor", SequenceBias(biases, device)
    if params.repetition_penalty != 1:
        op = RepetitionPenalty(params.repetition_penalty, request.state.token_ids, vocab_size, device)
        yield "RepetitionPenaltyLogitsProcessor", op
    if params.presence_penalty or params.frequency_penalty:
        written = request.state.output_ids
        penalty = OutputPenalty(params.presence_penalty, params.frequency_penalty, written, vocab_size, device)
        yield OutputPenaltyLogitsProcessor.__name__, penalty
    if params.no_repeat_ngram_size:
        yield "NoRepeatNGramLogitsProcessor", no_repeat(request, params.no_repeat_ngram_size)
    if params.bad_words_ids:
        words = [tuple(request.ids("bad_words_ids", word)) for word in params.bad_words_ids]
        if not all(words):
            raise RequestError(f"bad_words_ids must hold non-empty lists, got {params.bad_words_ids}")
        banned = {word: -math.inf for word in words if len(word) > 1 or word[0] not in params.stop_token_ids}
        if banned:
            yield "NoBadWordsLogitsProcessor", SequenceBias(banned, device)
    if params.min_new_tokens and end_ids:
        yield "MinNewTokensLengthLogitsProcessor", Ban(end_ids, 0, num_prompt + params.min_new_tokens, device)
    if params.forced_bos_token_id is not None:
        yield (
            "ForcedBOSTokenLogitsProcessor",
            Force(request.ids("forced_bos_token_id", [params.forced_bos_token_id]), 1, device),
        )
    if params.forced_eos_token_ids:
        ids = request.ids("forced_eos_token_ids", params.forced_eos_token_ids)
        yield "ForcedEOSTokenLogitsProcessor", Force(ids, num_prompt + params.max_new_tokens - 1, device)
    if params.suppress_tokens:
        ids = request.ids("suppress_tokens", params.suppress_tokens)
        yield "SuppressTokensLogitsProcessor", Ban(ids, 0, None, device)
    if params.begin_suppress_tokens:
        begin = num_prompt if num_prompt > 1 or params.forced_bos_token_id is None else num_prompt + 1
        ids = request.ids("begin_suppress_tokens", params.begin_suppress_tokens)
        yield "SuppressTokensAtBeginLogitsProcessor", Ban(ids, begin, begin + 1, device)


def _warpers(params: SamplingParams) -> Iterator[Op]:
    if params.temperature != 1:
        yield Temperature(params.temperature)
    if params.top_k:
        yield TopK(params.top_k)
    if params.top_p < 1:
        yield TopP(1 - params.top_p)
    if params.min_p:
        yield MinP(params.min_p)
    if params.typical_p < 1:
        yield TypicalP(params.typical_p)
    if params.epsilon_cutoff:
        yield EpsilonCutoff(params.epsilon_cutoff)
    if params.eta_cutoff:
        yield EtaCutoff(params.eta_cutoff)
