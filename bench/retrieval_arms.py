"""The retrieval drafters that are timed against each other: what their names say, and what they learned before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from specdec.bench.arms import Job, warm_up
from specdec.bench.workload import WorkItem
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.ppm import PpmDrafter
from specdec.drafters.store import RetrievalStore
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.protocols import Drafter

__all__ = ["FUSED", "ArmName", "Form", "jobs_of", "make_drafter", "single_drafter", "train_stores"]

# Recycling reads the target's own logits, and those of random weights say nothing about a recorded answer.
FUSED = ("suffix", "ppm")
_TRIE_CALLS = 60  # a saved trie is counted anew when it is loaded
_LEARNED: dict[str, type[SuffixDrafter | LookaheadDrafter | PpmDrafter]] = {
    "suffix": SuffixDrafter, "lookahead": LookaheadDrafter, "ppm": PpmDrafter,
}  # fmt: skip


# What a drafter does with a budget of n: n tokens one after the other, as far as it finds as many; its n best nodes as
# a tree; or at most n nodes, as its own rules of stopping have it.
Form: TypeAlias = Literal["chain", "tree", "own"]
_FORMS: dict[str, Form] = {"@": "chain", "=": "tree", "~": "own"}
_CHAIN: dict[str, dict[str, Any]] = {
    "suffix": {"as_tree": False}, "ppm": {"as_tree": False}, "ngram": {"max_branches": 1}
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArmName:
    """What an arm's name says.

    Attributes:
        base: ``plain``, ``fused`` or a single drafter.
        budget: most draft tokens of a request and step; None: a controller decides.
        form: of its drafts.
    """

    base: str
    budget: int | None
    form: Form

    @classmethod
    def of(cls, name: str) -> ArmName:
        """Read ``plain``, ``fused``, ``NAME``, ``NAME@N`` (a chain), ``NAME=N`` (a tree) or ``NAME~N`` (own rules)."""
        mark = next((mark for mark in _FORMS if mark in name), "~")
        base, _, size = name.partition(mark)
        return cls(base, 0 if base == "plain" else int(size) if size else None, _FORMS[mark])


def make_drafter(name: str, stores: Path, *, form: Form = "own") -> Drafter:
    """A fresh drafter over a fresh copy of what was learned before."""
    if name == "fused":
        return FusedDrafter([(part, single_drafter(part, stores)) for part in FUSED])
    return single_drafter(name, stores, form=form)


def single_drafter(name: str, stores: Path, *, form: Form = "own") -> Drafter:
    """A single drafter, fresh.

    Raises:
        ConfigError: a chain of a drafter that has no chains.
    """
    options: dict[str, Any] = {} if form == "own" else {"threshold" if name == "suffix" else "min_value": 0.0}
    if form == "chain":
        if name not in _CHAIN:
            raise ConfigError(f"{name} has trees only: write {name}=N for its N best nodes")
        options |= _CHAIN[name]
    if name == "ngram":
        return NgramDrafter(**options)
    return _LEARNED[name](store=RetrievalStore.load(stores.with_suffix(f".{name}")), **options)


def train_stores(items: Sequence[WorkItem], path: Path) -> None:
    """Show the retrieval drafters answered calls and save what each keeps."""
    for name, make in _LEARNED.items():
        drafter = make()
        warm_up(drafter, jobs_of(items[-_TRIE_CALLS:] if name == "lookahead" else items))
        drafter.store.save(path.with_suffix(f".{name}"))


def jobs_of(items: Sequence[WorkItem]) -> list[Job]:
    """The calls, their answers forced."""
    return [Job(item.prompt_ids, len(item.response_ids), item.response_ids) for item in items]
