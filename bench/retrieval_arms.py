"""The retrieval drafters that are timed against each other: what their names say, and what they learned before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.arms import Job, warm_up
from specdec.bench.workload import WorkItem
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.ppm import PpmDrafter
from specdec.drafters.store import RetrievalStore
from specdec.drafters.suffix import SuffixDrafter
from specdec.protocols import Drafter

__all__ = ["FUSED", "ArmName", "jobs_of", "make_drafter", "single_drafter", "train_stores"]

# Recycling reads the target's own logits, and those of random weights say nothing about a recorded answer.
FUSED = ("suffix", "ppm")
_TRIE_CALLS = 60  # a saved trie is counted anew when it is loaded
_LEARNED: dict[str, type[SuffixDrafter | LookaheadDrafter | PpmDrafter]] = {
    "suffix": SuffixDrafter, "lookahead": LookaheadDrafter, "ppm": PpmDrafter,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArmName:
    """What an arm's name says.

    Attributes:
        base: ``plain``, ``fused`` or a single drafter.
        budget: most draft tokens of a request and step; None: a controller decides.
        is_fixed: the drafter's own rules of stopping are off.
    """

    base: str
    budget: int | None
    is_fixed: bool

    @classmethod
    def of(cls, name: str) -> ArmName:
        """Read ``plain``, ``fused``, ``NAME``, ``NAME@LENGTH`` (exactly) or ``NAME~LENGTH`` (at most)."""
        base, mark, length = name.partition("@" if "@" in name else "~")
        return cls(base, 0 if base == "plain" else int(length) if length else None, mark == "@")


def make_drafter(name: str, stores: Path, *, is_fixed: bool = False) -> Drafter:
    """A fresh drafter over a fresh copy of what was learned before."""
    if name == "fused":
        return FusedDrafter([(part, single_drafter(part, stores)) for part in FUSED])
    return single_drafter(name, stores, is_fixed=is_fixed)


def single_drafter(name: str, stores: Path, *, is_fixed: bool = False) -> Drafter:
    """A single drafter, fresh; a fixed one drafts as much as it may wherever it finds something."""
    least: dict[str, Any] = {} if not is_fixed else {"threshold" if name == "suffix" else "min_value": 0.0}
    if name == "ngram":
        return NgramDrafter(**least)
    return _LEARNED[name](store=RetrievalStore.load(stores.with_suffix(f".{name}")), **least)


def train_stores(items: Sequence[WorkItem], path: Path) -> None:
    """Show the retrieval drafters answered calls and save what each keeps."""
    for name, make in _LEARNED.items():
        drafter = make()
        warm_up(drafter, jobs_of(items[-_TRIE_CALLS:] if name == "lookahead" else items))
        drafter.store.save(path.with_suffix(f".{name}"))


def jobs_of(items: Sequence[WorkItem]) -> list[Job]:
    """The calls, their answers forced."""
    return [Job(item.prompt_ids, len(item.response_ids), item.response_ids) for item in items]
