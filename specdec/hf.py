"""``model.generate(**inputs, custom_generate=specdec.speculate("ngram"))``: speculation behind transformers' own call.

transformers prepares inputs, processors and stopping criteria as ever and then calls us in place of its decoding loop.
What it drops on the way to a callable (``streamer``, ``tokenizer``, ``assistant_model``) is taken by ``speculate``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.build import build_engine, may_pack, model_max_length, name_drafter
from specdec.config import EngineConfig
from specdec.drafters.checkpoint import PendingDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError, RequestError, UnsupportedError
from specdec.packed_linear import pack_linears
from specdec.protocols import Controller, Drafter
from specdec.rope import freeze_rope
from specdec.routes import Route, choose_route
from specdec.types import Request, RequestState, SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

__all__ = ["Speculation", "SpeculationStats", "SpeculativeOutput", "speculate"]

_HOLDER = "speculate"  # of packed weights
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the rows of a batch get well-separated seeds
# Model inputs that generate() adds by itself and that the engine derives anew.
_DERIVED_INPUTS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values"})
# (processor class, attribute) that count tokens from the start of the *padded* row.
_PADDED_COUNTS: Mapping[type, str] = {
    ExponentialDecayLengthPenalty: "regulation_start",
    ForcedEOSTokenLogitsProcessor: "max_length",
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    SuppressTokensAtBeginLogitsProcessor: "begin_index",
}
_UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What speculation did for one returned sequence.

    Args:
        num_steps: target forwards that could emit.
        num_draft_tokens: guessed tokens.
        num_accepted: guesses that are part of the output.
        num_new_tokens: emitted tokens.
    """

    num_steps: int
    num_draft_tokens: int
    num_accepted: int
    num_new_tokens: int

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per target forward, bonus tokens included (tau)."""
        return self.num_new_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else 0.0


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What ``return_dict_in_generate`` returns, with our statistics: one ``SpeculationStats`` per sequence."""

    speculation: tuple[SpeculationStats, ...] | None = None


def speculate(
    drafter: str | Drafter | PendingDrafter = "ngram",
    *,
    budget: int | None = None,
    controller: Controller | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: Sequence[str] = (),
    streamer: BaseStreamer | None = None,
    seed: int | None = None,
    drafter_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Speculation:
    """A ``custom_generate`` callable that emits what plain decoding would, sooner.

    Args:
        drafter: a name (see ``specdec.build.DRAFTERS``) or an object.
        budget: most draft tokens per sequence and step; 0: plain decoding. None: the default.
        controller: decides budgets in place of ``budget``.
        tokenizer: for ``stop_strings``.
        stop_strings: the output ends with the token that completes one; use this in place of ``generate``'s own
            ``stop_strings``, which loses its tokenizer on the way.
        streamer: gets the tokens of a single sequence as they are committed.
        seed: of the keyed noise when sampling; row r of the batch uses a seed derived from (seed, r). None: one is
            drawn from torch's generator, so ``torch.manual_seed`` makes a call repeatable.
        drafter_options: keyword arguments of the named drafter.
        **options: fields of ``EngineConfig``, and ``verifier`` as in ``build_engine``.

    Effects: on a CPU the model's linear weights stay packed after the first call, so that the next one starts at once;
        ``specdec.unpack_linears(model)`` brings them back, ``packed=False`` leaves them alone.

    Raises:
        ConfigError: an option breaks its rule.

    Example:
        >>> model.generate(**inputs, custom_generate=specdec.speculate("ngram"), max_new_tokens=64)  # doctest: +SKIP
    """
    if stop_strings and tokenizer is None:
        raise ConfigError("stop_strings need a tokenizer: speculate(..., stop_strings=..., tokenizer=tokenizer)")
    if seed is not None and not 0 <= seed < 2**64:
        raise ConfigError(f"seed must be in [0, 2**64), got {seed}")
    return Speculation(
        name_drafter(drafter, **(drafter_options or {})),
        budget=budget,
        controller=controller,
        tokenizer=tokenizer,
        stop_strings=tuple(stop_strings),
        streamer=streamer,
        seed=seed,
        options=options,
    )


class Speculation:
    """The callable that ``speculate`` returns; one object may serve many ``generate`` calls and learns across them."""

    def __init__(
        self,
        drafter: Drafter | PendingDrafter,
        *,
        budget: int | None,
        controller: Controller | None,
        tokenizer: PreTrainedTokenizerBase | None,
        stop_strings: tuple[str, ...],
        streamer: BaseStreamer | None,
        seed: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self.drafter = drafter
        self.budget, self.controller = budget, controller
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.streamer, self.seed = streamer, seed
        self.options = dict(options)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor | SpeculativeOutput:
        """Decode; called by ``generate`` with everything prepared.

        Args:
            model: the target.
            input_ids: [B, S] int64, padded on the left; ``num_return_sequences`` is already expanded.
            logits_processor: the target's complete list.
            stopping_criteria: the complete list.
            generation_config: as prepared.
            synced_gpus: must be False.
            **model_kwargs: of these, ``attention_mask`` is read.

        Returns:
            [B, S + longest output] int64 padded on the right, or a ``SpeculativeOutput``.

        Raises:
            UnsupportedError: beam search, encoder-decoder models, per-step outputs, extra model inputs.
        """
        _refuse(model, input_ids, generation_config, synced_gpus, model_kwargs)
        streamer = self.streamer
        if streamer is not None and len(input_ids) > 1:
            raise UnsupportedError(f"a streamer takes one sequence, got a batch of {len(input_ids)}")
        requests = self._requests(input_ids, model_kwargs, logits_processor, stopping_criteria, generation_config)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        states: dict[str, RequestState] = {}
        with self._engine(model, requests) as engine:
            for output in engine.generate(requests):
                states[output.request_id] = output.state
                if streamer is not None:
                    for token_id in output.new_ids:
                        streamer.put(torch.tensor([token_id]))
        if streamer is not None:
            streamer.end()
        return _package(input_ids, [states[r.request_id] for r in requests], generation_config)

    def _engine(self, model: PreTrainedModel, requests: Sequence[Request]) -> Engine:
        limits = self._limits(requests)
        config = EngineConfig.of(**limits)
        if may_pack(model, config):
            pack_linears(
                model, _HOLDER, strict=config.numerics == "strict"
            )  # beyond this call: packing a large model takes as long as many tokens
        return build_engine(
            model,
            self.drafter,
            budget=self.budget,
            controller=self.controller,
            tokenizer=self.tokenizer,
            route=_route(model, limits.get("max_length") or model_max_length(model)),
            **limits,
        )

    def _limits(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Engine limits that just hold this call, unless the user set them."""
        lengths = [len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests]
        room = 8 * max(self.budget or 32, 32)  # drafts of all rows; a full pool only shortens drafts
        sizes = {"max_batch_size": min(len(requests), 64), "kv_tokens": sum(lengths) + room}
        return {**sizes, **self.options}

    def _requests(
        self,
        input_ids: torch.Tensor,
        model_kwargs: Mapping[str, Any],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> list[Request]:
        base = self.seed
        if base is None:
            # The one draw from torch's generator: users of generate() expect torch.manual_seed to rule the text.
            base = int(torch.randint(0, 2**63 - 1, (1,)).item()) if generation_config.do_sample else 0
        width = input_ids.shape[1]
        max_new_tokens, stop_ids, user_criteria = _stopping(criteria, width)
        requests = []
        for row, prompt in enumerate(_unpadded(input_ids, model_kwargs.get("attention_mask"))):
            sampling = SamplingParams(
                temperature=1.0 if generation_config.do_sample else 0.0,
                logits_processors=tuple(_shifted(p, row, width - len(prompt)) for p in processors),
                max_new_tokens=max_new_tokens,
                stop_token_ids=stop_ids,
                stop_strings=self.stop_strings,
                stopping_criteria=user_criteria,
                seed=(base + row * _SEED_STRIDE) % 2**64,
            )
            requests.append(Request(f"row-{row}", prompt, sampling))
        return requests


def _refuse(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: Mapping[str, Any],
) -> None:
    """Raise one clear error for what cannot be speculated on."""
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{type(model).__name__} is an encoder-decoder; specdec serves causal LMs")
    if (config.num_beams or 1) > 1:
        raise UnsupportedError(f"beam search cannot be speculated on: num_beams must be 1, got {config.num_beams}")
    if getattr(config, "penalty_alpha", None):
        raise UnsupportedError(f"contrastive search cannot be speculated on: got penalty_alpha={config.penalty_alpha}")
    if getattr(config, "prompt_lookup_num_tokens", None):
        raise UnsupportedError('prompt_lookup_num_tokens is transformers\' own speculation: use speculate("ngram")')
    if synced_gpus:
        raise UnsupportedError("synced_gpus must be False: rows of a speculating batch do not step together")
    wanted = [name for name in _UNSUPPORTED_OUTPUTS if getattr(config, name, None)]
    if wanted and config.return_dict_in_generate:
        raise UnsupportedError(f"per-step outputs are not kept when speculating: {', '.join(wanted)}")
    extra = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _DERIVED_INPUTS)
    if extra:
        raise UnsupportedError(f"model inputs beyond token ids cannot be speculated on: {', '.join(extra)}")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise UnsupportedError("past_key_values must be empty: the engine keeps its own cache")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise RequestError(f"input_ids must be [batch, length >= 1], got shape {tuple(input_ids.shape)}")


def _unpadded(input_ids: torch.Tensor, mask: torch.Tensor | None) -> Iterator[np.ndarray[Any, Any]]:
    """Each row's own tokens, int32; padding is wherever the mask is 0."""
    for row, ids in enumerate(input_ids.cpu()):
        kept = ids if mask is None else ids[mask[row].cpu().bool()]
        if len(kept) == 0:
            raise RequestError(f"row {row} of the batch is empty: its attention mask is all zeros")
        yield kept.numpy().astype(np.int32)


def _shifted(processor: Any, row: int, num_padding: int) -> Any:
    """The processor for one row without its padding: counts from the row's start move by ``num_padding``."""
    attribute = _PADDED_COUNTS.get(type(processor))
    count = getattr(processor, attribute) if attribute is not None else None
    if count is None or attribute is None:
        return processor
    if isinstance(count, torch.Tensor):  # one count per row of the batch
        count = int(count[row])
    own = copy.copy(processor)
    setattr(own, attribute, max(count - num_padding, 0))
    return own


def _stopping(criteria: StoppingCriteriaList, width: int) -> tuple[int, tuple[int, ...], tuple[Any, ...]]:
    """(max_new_tokens, end-of-sequence ids, all other criteria) of a prepared list."""
    limits, stop_ids, others = [], [], []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(criterion.max_length - width)
        elif type(criterion) is EosTokenCriteria:
            stop_ids.extend(criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    if not limits:
        raise RequestError("generation needs max_new_tokens or max_length")
    return min(limits), tuple(stop_ids), tuple(others)


def _package(
    input_ids: torch.Tensor, states: Sequence[RequestState], config: GenerationConfig
) -> torch.Tensor | SpeculativeOutput:
    longest = max(state.num_output_tokens for state in states)
    pad = config._pad_token_tensor
    filler = int(pad.flatten()[0]) if pad is not None else 0
    tail = torch.full((len(states), longest), filler, dtype=input_ids.dtype)
    for row, state in enumerate(states):
        tail[row, : state.num_output_tokens] = torch.from_numpy(state.output_ids.astype(np.int64))
    sequences = torch.cat((input_ids, tail.to(input_ids.device)), dim=1)
    if not config.return_dict_in_generate:
        return sequences
    stats = tuple(SpeculationStats(s.num_steps, s.num_drafted, s.num_accepted, s.num_output_tokens) for s in states)
    return SpeculativeOutput(sequences=sequences, speculation=stats)


# What the probe found, so that a second generate() call on a model does not probe it again. A memo: dropping it changes
# nothing but time, and entries go with their models.
_ROUTES: WeakKeyDictionary[PreTrainedModel, tuple[tuple[torch.device, torch.dtype, int], Route]] = WeakKeyDictionary()


def _route(model: PreTrainedModel, max_length: int) -> Route:
    place = (model.device, model.dtype, max_length)
    known = _ROUTES.get(model)
    if known is None or known[0] != place:
        with freeze_rope(model, max_length):
            known = _ROUTES[model] = (place, choose_route(model, max_length=max_length))
    return known[1]
