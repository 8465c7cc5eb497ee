"""What a check found, as plain records: the words that the command prints and the keys of its ``--json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["CheckReport", "Comparison", "Control", "Difference", "TokenAt", "TwoSample", "Verdict", "json_ready"]

Verdict: TypeAlias = Literal["tie", "bug"]


@dataclass(frozen=True, slots=True)
class TokenAt:
    """A token of an output; ``token_id`` is None where the output has already ended."""

    token_id: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where two outputs of one request differ, and what it means.

    Scores are those of plain decoding at this place, in the model's dtype: logits for greedy decoding, processed scores
    plus noise for sampling. Infinite: the filters leave the other token no score. None: an output has ended here.

    Args:
        request_id: prompt (and seed) of the request.
        position: index in the output, 0 is the first new token.
        expected: the reference's token.
        got: the other one.
        top2_margin: best score minus second best.
        contested_margin: score of ``expected`` minus score of ``got``; at least ``top2_margin`` if plain decoding took
            ``expected``.
        wide_margin: as ``contested_margin``, with the logits of one ordinary forward in the wider precision; None if
            there was none.
        resolution: what the dtype can resolve here: two logits that are closer are a tie.
        wide_dtype: the precision of the re-run.
        wide_agrees: in that precision, both ways of decoding gave the same output; None if they were not run.
        verdict: "tie" or "bug".
        reason: why, in one sentence.
    """

    request_id: str
    position: int
    expected: TokenAt
    got: TokenAt
    top2_margin: float | None
    contested_margin: float | None
    wide_margin: float | None
    resolution: float | None
    wide_dtype: str
    wide_agrees: bool | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All outputs of one way of decoding against those of another.

    Args:
        setting: how tokens were chosen, such as "greedy".
        decoder: what was checked: a drafter's name, or "plain".
        against: "plain" (this engine, budget 0, one request at a time) or "generate" (transformers).
        num_requests: outputs compared.
        num_tokens: tokens compared: of each output, those up to its first difference.
        acceptance_length: mean over the steps of the checked decoder; 1.0 means that no draft was ever accepted.
        differences: one per output that differs.
    """

    setting: str
    decoder: str
    against: str
    num_requests: int
    num_tokens: int
    acceptance_length: float | None
    differences: tuple[Difference, ...]

    @property
    def num_ties(self) -> int:
        """Outputs whose first difference is a numeric tie."""
        return sum(d.verdict == "tie" for d in self.differences)

    @property
    def num_bugs(self) -> int:
        """Outputs whose first difference is not explained by rounding."""
        return sum(d.verdict == "bug" for d in self.differences)

    @property
    def ties_per_1000_tokens(self) -> float:
        """Numeric ties per 1000 compared tokens."""
        return 1000 * self.num_ties / max(self.num_tokens, 1)


@dataclass(frozen=True, slots=True)
class TwoSample:
    """Two samples of continuations, one of the speculating engine and one of an ordinary sampler, compared.

    Args:
        setting: the sampling law.
        num_samples: size of each of the two samples.
        length: tokens of a continuation.
        num_cells: kinds of continuation that were told apart; rare ones share a cell.
        total_variation: distance between the two samples; it is not 0 for equal laws.
        p_value: share of random relabellings that are at least as far apart.
        significance: a smaller p-value than this is a bug.
        detectable_tv: smallest total variation between the laws that would have been found with probability ``power``;
            None: not even the largest.
        power: see ``detectable_tv``.
        acceptance_length: of the engine's runs.
    """

    setting: str
    num_samples: int
    length: int
    num_cells: int
    total_variation: float
    p_value: float
    significance: float
    detectable_tv: float | None
    power: float
    acceptance_length: float

    @property
    def is_bug(self) -> bool:
        """True if equal laws would hardly give samples this far apart."""
        return self.p_value < self.significance


@dataclass(frozen=True, slots=True)
class Control:
    """A deliberately broken engine, run through the same comparison: it must be caught."""

    name: str
    is_caught: bool


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything that a check found.

    Args:
        model: name of the model.
        dtype: of its weights.
        device: where it ran.
        path: how the model verifies drafts: "tree", "chain" or "plain".
        tie_rule: what counts as a numeric tie, in words.
        comparisons: token for token.
        two_samples: law against law.
        controls: broken engines; empty if they were not asked for.
        notes: what a reader must know to read the rest right.
        seconds: of the whole check.
    """

    model: str
    dtype: str
    device: str
    path: str
    tie_rule: str
    comparisons: tuple[Comparison, ...]
    two_samples: tuple[TwoSample, ...]
    controls: tuple[Control, ...]
    notes: tuple[str, ...] = field(default=())
    seconds: float = 0.0

    @property
    def num_bugs(self) -> int:
        """Outputs that differ without a tie, samples of different laws, and broken engines that went unnoticed."""
        missed = sum(not control.is_caught for control in self.controls)
        return sum(c.num_bugs for c in self.comparisons) + sum(t.is_bug for t in self.two_samples) + missed

    @property
    def is_lossless(self) -> bool:
        """True if no bug was found."""
        return self.num_bugs == 0

    def as_json(self) -> dict[str, Any]:
        """All records and the verdict, ready for ``json.dumps``; infinite numbers become None."""
        report = asdict(self)
        for comparison, entry in zip(self.comparisons, report["comparisons"], strict=True):
            entry["num_ties"], entry["num_bugs"] = comparison.num_ties, comparison.num_bugs
            entry["ties_per_1000_tokens"] = comparison.ties_per_1000_tokens
        for test, entry in zip(self.two_samples, report["two_samples"], strict=True):
            entry["is_bug"] = test.is_bug
        found: dict[str, Any] = json_ready({"is_lossless": self.is_lossless, "num_bugs": self.num_bugs} | report)
        return found


def json_ready(value: Any) -> Any:
    """``value`` with tuples as lists and without numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
