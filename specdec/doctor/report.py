"""What an examination found, as plain records: the words that the command prints and the keys of its ``--json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = [
    "Acceptance",
    "Agreement",
    "Attention",
    "BreakEven",
    "DoctorReport",
    "DrafterReport",
    "Memory",
    "Problem",
    "Recommendation",
    "Severity",
    "StepCosts",
]

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention calls that are alike.

    Args:
        num_calls: how many of a forward's calls are like this.
        mask_kind: "full", "sliding", "chunked" or "other".
        window: tokens of the window or chunk; None: the whole context.
        num_query_heads: Hq.
        num_kv_heads: Hkv.
        key_dim: width of a key head.
        value_dim: width of a value head.
        has_sinks: each head has a learned sink logit.
        softcap: bound of the scores; None = off.
        nbytes_per_token: K and V of one token over these calls.
    """

    num_calls: int
    mask_kind: str
    window: int | None
    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_sinks: bool
    softcap: float | None
    nbytes_per_token: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the model needs.

    Args:
        weights_nbytes: parameters and buffers.
        kv_nbytes_per_token: K and V of one token over all layers, while the token is in every window.
        kv_nbytes_per_far_token: the same for a token that has left all windows: what context costs in the long run.
        state_nbytes: recurrent and convolutional state of one request.
        batch: requests of the estimate.
        context: tokens per request of the estimate.
        request_nbytes: of one request with that context.
        total_nbytes: weights and all requests; activations come on top.
        available_nbytes: free memory of the device now, with the weights already loaded; None: not known.
        largest_batch: requests of that context that fit beside the weights; None: not known.
    """

    weights_nbytes: int
    kv_nbytes_per_token: int
    kv_nbytes_per_far_token: int
    state_nbytes: int
    batch: int
    context: int
    request_nbytes: int
    total_nbytes: int
    available_nbytes: int | None
    largest_batch: int | None


@dataclass(frozen=True, slots=True)
class BreakEven:
    """One budget: speculation with it is faster than plain decoding above this acceptance length.

    Args:
        budget: draft tokens per request and step; 0 is plain decoding.
        ms: of a step, median: forward and commit, no drafting.
        acceptance_length: tokens per step at which the step costs per token what plain decoding costs.
    """

    budget: int
    ms: float
    acceptance_length: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The budget that emits most tokens per second if each draft token is accepted with a given probability.

    Args:
        acceptance: probability that a draft token is right, given that all before it are.
        budget: draft tokens per step, as a chain.
        speedup: over plain decoding, drafting itself not counted.
    """

    acceptance: float
    budget: int
    speedup: float


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What was measured about one step.

    Args:
        batch: requests that were decoded together.
        context: tokens of each.
        num_rounds: measurements per budget.
        break_even: per budget, ascending; the first is plain decoding.
        recommended: for several acceptance probabilities, ascending.
    """

    batch: int
    context: int
    num_rounds: int
    break_even: tuple[BreakEven, ...]
    recommended: tuple[Recommendation, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a user should know before serving this model.

    Args:
        area: what it is about: "tokenizer", "generation config", "chat template", "rope", "dtype", "memory", "probe";
            of a drafter: "template", "vocabulary", "layers", "norm", "rope", "context", "quantisation", "target".
        severity: "error": something will not work; "warning": it will work otherwise than expected; "note".
        message: what is wrong, and what to do.
    """

    area: str
    severity: Severity
    message: str


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What the engine accepted of a drafter's guesses while it continued one text greedily.

    Args:
        text: "plain" or "chat".
        length: mean tokens per step, the bonus token included.
        num_steps: steps it rests on.
        num_drafted: draft tokens in them.
    """

    text: str
    length: float
    num_steps: int
    num_drafted: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """The share of positions of a text at which a drafter, told all that came before, names the target's choice."""

    text: str
    share: float


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """A drafter with a checkpoint, examined with its target.

    Args:
        drafter: its name.
        acceptance: per form of text.
        agreement: likewise, in the best reading of the checkpoint; empty for one with another tokenizer.
        problems: causes of a low acceptance length; notes are none.
    """

    drafter: str
    acceptance: tuple[Acceptance, ...]
    agreement: tuple[Agreement, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything that an examination found.

    Args:
        model: its name.
        architecture: class of the model.
        dtype: of its weights.
        device: where they are.
        path: "tree", "chain", "plain" or "refused".
        reasons: why each better path was not taken.
        can_draft: False: only plain decoding works.
        attention: the attention calls of a forward.
        memory: None if the model cannot be served.
        costs: None if nothing was measured; a problem says why.
        problems: errors first.
        seconds: of the examination.
        drafter: None if none was examined.
    """

    model: str
    architecture: str
    dtype: str | None
    device: str | None
    path: str
    reasons: tuple[str, ...]
    can_draft: bool
    attention: tuple[Attention, ...]
    memory: Memory | None
    costs: StepCosts | None
    problems: tuple[Problem, ...]
    seconds: float = 0.0
    drafter: DrafterReport | None = None

    def as_json(self) -> dict[str, Any]:
        """All records, ready for ``json.dumps``."""
        return asdict(self)
