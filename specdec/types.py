"""The words of specdec, each defined once.

- **root**: node 0 of every tree: the last committed token, the only committed token whose KV is not cached yet.
- **draft tokens**: nodes 1..N-1. **draft length**: depth of the tree. **budget**: most draft tokens allowed in this
  step; 0 = plain decoding.
- **accepted tokens**: the root-to-node path of draft tokens that the target confirms (root excluded).
- **bonus token**: the one token that the target adds after the accepted path.
- **acceptance length** = accepted + 1, per step; its mean over steps is tau. **acceptance rate** = accepted / drafted,
  both pooled.
- logits row *i* predicts the children of node *i*.

In shapes: N nodes of a tree (root included), T nodes of a whole batch, R requests of a batch, V vocabulary,
A accepted tokens, P prompt tokens. In formulas only: p target law, q draft law, gamma draft length.

This module needs numpy alone: ``import specdec`` must not load torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from specdec.errors import RequestError
from specdec.readings import HiddenStates, Successors
from specdec.tree import DraftTree, IntArray

if TYPE_CHECKING:
    import torch

    from specdec.device_work import LateCopy

__all__ = [
    "Chunk",
    "DraftTree",
    "FinishReason",
    "IntArray",
    "Request",
    "RequestOutput",
    "RequestState",
    "SamplingParams",
    "StepEvent",
    "StepTrace",
    "TargetOutput",
    "VerifyResult",
]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]
# The call shapes of transformers: (input_ids [1, S] int64, scores [1, V]) -> scores, and -> bool or [1] bool tensor.
LogitsProcessor: TypeAlias = Callable[..., Any]
StoppingCriterion: TypeAlias = Callable[..., Any]


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it stops; every field means what it means in ``transformers``.

    Temperature 0 is greedy. The noise of a sampled request is keyed by (seed, absolute position) and nothing else, so
    its text depends on neither the drafter nor its neighbours.

    Raises:
        RequestError: a field is outside its rule; the message names the field, the rule and the value.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    typical_p: float = 1.0  # 1 = off
    epsilon_cutoff: float = 0.0  # 0 = off
    eta_cutoff: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # over prompt and output; 1 = off
    presence_penalty: float = 0.0  # over the output only, as in the OpenAI API; 0 = off
    frequency_penalty: float = 0.0  # likewise
    no_repeat_ngram_size: int = 0  # 0 = off
    min_new_tokens: int = 0
    max_new_tokens: int = 128
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids; the stop token is part of the output
    stop_strings: tuple[str, ...] = ()
    seed: int = 0  # 64 bits
    # Applied after the penalties above and before the temperature, where transformers puts a user's own processors.
    logits_processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()

    def __post_init__(self) -> None:
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "seed"):
            value = getattr(self, name)
            is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            _require(is_int, name, "an integer", value)
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", ">= 0", self.temperature)
        _require(self.top_k >= 0, "top_k", ">= 0 (0 = off)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(0 < self.typical_p <= 1, "typical_p", "in (0, 1]", self.typical_p)
        _require(0 <= self.epsilon_cutoff < 1, "epsilon_cutoff", "in [0, 1)", self.epsilon_cutoff)
        _require(0 <= self.eta_cutoff < 1, "eta_cutoff", "in [0, 1)", self.eta_cutoff)
        _require(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", "> 0 and finite", self.repetition_penalty
        )
        _require(math.isfinite(self.presence_penalty), "presence_penalty", "finite", self.presence_penalty)
        _require(math.isfinite(self.frequency_penalty), "frequency_penalty", "finite", self.frequency_penalty)
        _require(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", ">= 0 (0 = off)", self.no_repeat_ngram_size)
        _require(self.min_new_tokens >= 0, "min_new_tokens", ">= 0", self.min_new_tokens)
        _require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens)
        _require(0 <= self.seed < 2**64, "seed", "in [0, 2**64)", self.seed)
        _require(all(self.stop_strings), "stop_strings", "non-empty strings", self.stop_strings)

    @property
    def is_greedy(self) -> bool:
        """True if the target's token is the argmax of its processed scores."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt and how to continue it.

    Args:
        request_id: unique among the live requests of an engine.
        prompt_ids: [P] int32, P >= 1.
        sampling: law and stopping rules.
        tenant: whose text this is; retrieval stores never share text between tenants.
        priority: how much a token of this request is worth beside one of others, > 0; only speed depends on it.
        tpot_ms: milliseconds per output token that are good enough, > 0; None: as fast as can be. Likewise.
    """

    request_id: str
    prompt_ids: IntArray
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    priority: float = 1.0
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        _require(0 < self.priority < math.inf, "priority", "> 0 and finite", self.priority)
        _require(self.tpot_ms is None or 0 < self.tpot_ms < math.inf, "tpot_ms", "> 0 and finite", self.tpot_ms)
        given = np.asarray(self.prompt_ids)
        if given.ndim != 1 or len(given) == 0:
            raise RequestError(f"prompt_ids must be a non-empty list of token ids, got shape {given.shape}")
        if given.dtype.kind not in "iu":
            raise RequestError(f"prompt_ids must be integers, got {given.dtype}")
        if given.min() < 0 or given.max() >= 2**31:
            bad = given[(given < 0) | (given >= 2**31)][0]
            raise RequestError(f"prompt_ids must be in [0, 2**31), got {bad}")
        object.__setattr__(self, "prompt_ids", given.astype(np.int32))  # a copy: the caller's may change


class RequestState:
    """The one mutable record of a live request; only the engine writes it.

    ``token_ids`` (prompt and output) lives in a buffer that doubles, so that appending costs no copy of the context.
    ``num_cached`` counts the leading tokens whose KV the target holds; the root is always uncached, so
    ``num_cached <= num_tokens - 1``.

    ``hidden`` are the target's states at the last n cached tokens: all that were cached since the last ``propose``.
    None where no drafter asked for states, and before the first token is cached. ``successors`` are what the target
    found likely after the prefix tokens of the steps since the last one that was observed.
    """

    __slots__ = (
        "_buffer",
        "finish_reason",
        "hidden",
        "num_accepted",
        "num_cached",
        "num_drafted",
        "num_preemptions",
        "num_prompt_tokens",
        "num_recalled",
        "num_steps",
        "num_tokens",
        "successors",
        "request",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_tokens = self.num_prompt_tokens
        self._buffer = np.empty(max(2 * self.num_tokens, 64), dtype=np.int32)
        self._buffer[: self.num_tokens] = request.prompt_ids
        self.num_cached = 0
        self.hidden: HiddenStates | None = None
        self.successors: list[Successors] = []
        self.finish_reason: FinishReason | None = None
        self.num_steps = 0  # steps that could emit: prefill chunks are not counted
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_preemptions = 0
        self.num_recalled = 0  # leading tokens whose KV was there before the first forward

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self.request.request_id

    @property
    def token_ids(self) -> IntArray:
        """[num_tokens] int32 view of prompt and output; valid until the next ``append``."""
        return self._buffer[: self.num_tokens]

    @property
    def output_ids(self) -> IntArray:
        """[num_tokens - num_prompt_tokens] int32 view of the output; valid until the next ``append``."""
        return self._buffer[self.num_prompt_tokens : self.num_tokens]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were committed after the prompt."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """True once a finish reason is set."""
        return self.finish_reason is not None

    def append(self, ids: Sequence[int] | IntArray) -> None:
        """Commit ``ids`` after the present tokens."""
        end = self.num_tokens + len(ids)
        if end > len(self._buffer):
            grown = np.empty(2 * end, dtype=np.int32)
            grown[: self.num_tokens] = self._buffer[: self.num_tokens]
            self._buffer = grown
        self._buffer[self.num_tokens : end] = ids
        self.num_tokens = end


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What one request puts into one target forward: committed tokens without KV, then a tree.

    Plain decoding has an empty ``prefix_ids`` and a root-only tree. A prefill chunk that does not reach the end of the
    committed tokens has no tree and gets no logits.

    Args:
        state: the request.
        prefix_ids: [C] int32: the committed tokens at positions ``state.num_cached ...`` before the root.
        tree: rooted at the last committed token, or None.
    """

    state: RequestState
    prefix_ids: IntArray
    tree: DraftTree | None

    @property
    def num_tokens(self) -> int:
        """Query tokens of this chunk: prefix and tree."""
        return len(self.prefix_ids) + (len(self.tree) if self.tree is not None else 0)


@dataclass(frozen=True, slots=True, eq=False)
class TargetOutput:
    """The target's answer for the trees of one step, in the order of the chunks that had a tree.

    Args:
        logits: [T, V] in the model's dtype: row ``cu_nodes[r] + i`` predicts the children of node i of tree r.
        cu_nodes: [R + 1] int32 with a leading zero.
        hidden: states at all Q query tokens of the step: chunk after chunk, prefix before tree. None: nobody asked.
        node_rows: [T] int64: the row of ``hidden`` that belongs to each row of ``logits``; None without ``hidden``.
        successors: one for each chunk, with a tree or not; empty if nobody asked.
        kept_nodes: of each tree the nodes that the target did not drop on the way, ascending, the root first; logits
            and ``cu_nodes`` are of these. None: all of all trees.
        late: the likeliest next tokens after every node, whether it was kept or not, then after prefix tokens, [n, k];
            they come to the host in the same copy as the target's own tokens. None: nobody asked.
    """

    logits: torch.Tensor
    cu_nodes: IntArray
    hidden: HiddenStates | None = None
    node_rows: npt.NDArray[np.int64] | None = None
    successors: Sequence[Successors] = ()
    kept_nodes: Sequence[npt.NDArray[np.int64]] | None = None
    late: LateCopy | None = None


@dataclass(frozen=True, slots=True, eq=False)
class VerifyResult:
    """What the target keeps of one tree.

    Args:
        accepted_nodes: [A] int32: node indices on the accepted path, root excluded, in order.
        accepted_ids: [A] int32: their tokens.
        bonus_id: the token that the target adds.
    """

    accepted_nodes: IntArray
    accepted_ids: IntArray
    bonus_id: int

    @property
    def num_accepted(self) -> int:
        """A: accepted draft tokens."""
        return len(self.accepted_ids)

    @property
    def acceptance_length(self) -> int:
        """A + 1: tokens that this step could emit before any stop."""
        return len(self.accepted_ids) + 1


@dataclass(frozen=True, slots=True)
class StepTrace:
    """The numbers of one request's step, never tensors. Times are of the whole batch's step."""

    request_id: str
    step: int
    position: int  # index of the first token that the step could emit
    num_draft_tokens: int
    num_accepted: int
    num_emitted: int  # accepted + bonus after the cut at the first stop
    batch_size: int
    draft_ms: float
    target_ms: float
    verify_ms: float
    commit_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class StepEvent:
    """Everything about one request's step. Tensors are valid during ``observe`` only: who keeps one clones it."""

    state: RequestState
    tree: DraftTree
    result: VerifyResult
    output: TargetOutput
    row: int  # index of the tree in ``output.cu_nodes``
    emitted_ids: IntArray  # what was committed: accepted + bonus, cut at the first stop
    trace: StepTrace


@dataclass(frozen=True, slots=True, eq=False)
class RequestOutput:
    """New tokens of one request, as the engine streams them.

    Args:
        request_id: whose tokens these are.
        new_ids: tokens committed since the last output of this request; the last output of a request may be empty.
        finish_reason: set on the last output of the request.
        state: the engine's record, for statistics; do not write to it.
    """

    request_id: str
    new_ids: list[int]
    finish_reason: FinishReason | None
    state: RequestState
