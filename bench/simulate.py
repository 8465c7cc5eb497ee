"""How well retrieval drafters guess recorded responses: no model, seconds for thousands of calls.

Every source starts cold; its calls run in order, one at a time, as a server would see them. Arms are compared at the
same number of drafted tokens per step: ours is measured at a row of thresholds and interpolated linearly between them,
which is slightly against it, as the curve is concave.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.bench.peers import ArcticOptions, arctic_cache, replay_arctic
from specdec.bench.simulate_kept import ArmCounts, load_counts, name_of, save_counts
from specdec.bench.traces import TokenCall, episode_half
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.suffix_decoding import CountingDrafts, ReferenceSuffixDecoding

__all__ = [
    "BUDGETS",
    "SETTINGS",
    "Setting",
    "compare",
    "compare_at",
    "run_ours",
    "run_peer",
    "run_reference",
    "run_source",
    "run_sources",
    "thresholds",
]

Sources = Mapping[str, Sequence[TokenCall]]
# Per source, one row per call: steps, accepted draft tokens, draft tokens.
Counts = dict[str, npt.NDArray[np.int64]]
_PATHS = (0.75, 0.6, 0.48, 0.39, 0.31, 0.25, 0.2, 0.16, 0.11, 0.075, 0.05, 0.033, 0.022, 0.014, 0.008, 0.004, 0.002)
_TREES = (0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012, 0.008, 0.005, 0.003)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the peers draft, by Arctic's options; ours drafts as many tokens."""

    name: str
    factor: float
    offset: float
    min_prob: float
    as_tree: bool


# The released default; more generous paths; and the peer's best tree.
SETTINGS = (
    Setting("path, factor 1 (default)", 1.0, 0.0, 0.1, False),
    Setting("path, factor 4", 4.0, 0.0, 0.1, False),
    Setting("tree, factor 4, offset 4", 4.0, 4.0, 0.02, True),
)
# With these the peer's curves reach from the shortest to the longest of BUDGETS.
_BETWEEN = (
    Setting("path, factor 0.5", 0.5, 0.0, 0.1, False),
    Setting("path, factor 2", 2.0, 0.0, 0.1, False),
    Setting("tree, factor 2", 2.0, 0.0, 0.02, True),
    Setting("tree, factor 4", 4.0, 0.0, 0.02, True),
)
# Drafted tokens per step at which both arms are compared on their curves: what the peer's settings draft of all sources
# with a tokenizer of 100 thousand tokens. A small vocabulary makes each setting draft more.
BUDGETS = (("path", 2.4), ("path", 7.0), ("tree", 10.6))


def run_ours(
    calls: Sequence[TokenCall], *, threshold: float, as_tree: bool, max_nodes: int = 256
) -> npt.NDArray[np.int64]:
    """Replay one source through a fresh cache."""
    cache = SuffixCache(max_bytes=1 << 28)
    rows = []
    for number, call in enumerate(calls):
        cache.start(number, call.prompt_ids)
        rows.append(cache.replay(number, call.response_ids, budget=max_nodes, threshold=threshold, as_tree=as_tree))
        cache.finish(number)
    return np.array(rows, np.int64)


def run_peer(calls: Sequence[TokenCall], setting: Setting) -> npt.NDArray[np.int64]:
    """The same through arctic-inference.

    Raises:
        ImportError: it is not installed.
    """
    options: ArcticOptions = {
        "max_spec_factor": setting.factor, "max_spec_offset": setting.offset, "min_token_prob": setting.min_prob,
        "use_tree_spec": setting.as_tree,
    }  # fmt: skip
    cache = arctic_cache()
    return np.array([replay_arctic(cache, n, call, options) for n, call in enumerate(calls)], np.int64)


def run_reference(calls: Sequence[TokenCall], setting: Setting) -> npt.NDArray[np.int64]:
    """The same through our own implementation of SuffixDecoding as published."""
    options = CountingDrafts(
        factor=setting.factor, offset=setting.offset, min_prob=setting.min_prob, as_tree=setting.as_tree
    )
    reference = ReferenceSuffixDecoding()
    return np.array([reference.replay(c.prompt_ids, c.response_ids, options) for c in calls], np.int64)


def thresholds(as_tree: bool) -> tuple[float, ...]:
    """At which ours is measured, from short drafts to long ones."""
    return _TREES if as_tree else _PATHS


def run_source(calls: Sequence[TokenCall], part: str) -> ArmCounts:
    """The arms of "peer", "reference" or "ours" over one source: one row per call of steps, accepted, drafted."""
    if part == "ours":
        return {
            ("ours", f"{as_tree} {threshold}"): run_ours(calls, threshold=threshold, as_tree=as_tree)
            for as_tree in (False, True)
            for threshold in thresholds(as_tree)
        }
    run = run_peer if part == "peer" else run_reference
    arm = "arctic-inference" if part == "peer" else "SuffixDecoding reference"
    return {(arm, setting.name): run(calls, setting) for setting in SETTINGS + _BETWEEN}


def run_sources(
    sources: Sources, *, parts: Iterable[str], jobs: int, kept: Path | None, on_done: Callable[[str], None]
) -> dict[tuple[str, str], Counts]:
    """``run_source`` over all sources, the largest first, in ``jobs`` processes.

    Args:
        sources: calls by source.
        parts: of "peer", "reference" and "ours".
        jobs: processes.
        kept: a folder whose counts are taken instead of made again, and to which new ones go; None: neither.
        on_done: told each source and part that is done.
    """
    found: dict[tuple[str, str], Counts] = {}
    settings = f"{SETTINGS + _BETWEEN} {_PATHS} {_TREES}"

    def note(source: str, part: str, counts: ArmCounts) -> None:
        for arm, rows in counts.items():
            found.setdefault(arm, {})[source] = rows
        on_done(f"{part} of {source}")

    order = sorted(sources, key=lambda name: -sum(len(c.prompt_ids) + 9 * len(c.response_ids) for c in sources[name]))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = {}
        for source in order:
            for part in parts:
                name = name_of(part, settings, sources[source]) if kept is not None else ""
                counts = load_counts(kept, name) if kept is not None else None
                if counts is not None:
                    note(source, part, counts)
                else:
                    tasks[pool.submit(run_source, sources[source], part)] = (source, part, name)
        for task in as_completed(tasks):
            source, part, name = tasks[task]
            if kept is not None:
                save_counts(kept, name, task.result())
            note(source, part, task.result())
    return found


def _rates(rows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Drafted and accepted per step."""
    steps, accepted, drafted = rows.sum(axis=0).tolist()
    return drafted / max(steps, 1), accepted / max(steps, 1)


def _at(runs: Sequence[npt.NDArray[np.int64]], drafted: float) -> tuple[float, tuple[float, float]]:
    """Accepted per step at ``drafted`` per step on an arm's curve, and from where to where the curve reaches."""
    points = sorted(_rates(rows) for rows in runs)
    accepted = float(np.interp(drafted, [point[0] for point in points], [point[1] for point in points]))
    return accepted, (points[0][0], points[-1][0])


def _pooled(
    sources: Sources, bases: Sequence[Counts], runs: Sequence[Counts]
) -> Iterator[tuple[str, list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]]:
    """The rows of both arms over all sources: of all calls, and of each half of the episodes."""
    halves = {name: np.array([episode_half(call.trace) for call in calls]) for name, calls in sources.items()}

    def pooled(counts: Counts, half: int | None) -> npt.NDArray[np.int64]:
        return np.concatenate([rows if half is None else rows[halves[name] == half] for name, rows in counts.items()])

    for label, half in (("all", None), ("tuned half", 0), ("held-out half", 1)):
        yield label, [pooled(base, half) for base in bases], [pooled(counts, half) for counts in runs]


def _compared(base: npt.NDArray[np.int64], ours: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    drafted, accepted = _rates(base)
    equal, reach = _at(ours, drafted)
    result: dict[str, Any] = {"drafted_per_step": drafted, "accepted_per_step": accepted}
    if not reach[0] <= drafted <= reach[1]:
        # Never extrapolated: more drafting than ours ever does is compared with ours at its longest.
        result["out_of_range"] = list(reach)
    return {**result, "ours_accepted_per_step": equal, "gain_percent": 100 * (equal / max(accepted, 1e-9) - 1)}


def compare(sources: Sources, base: Counts, runs: Sequence[Counts]) -> dict[str, Any]:
    """Accepted tokens per step of ours against a base arm at the base's drafted tokens per step.

    Args:
        sources: calls by source.
        base: the other arm.
        runs: ours at a row of thresholds.

    Returns:
        Over all calls, over each half of the episodes (half 0 is what tables and constants were chosen on, half 1 was
        held out), and by source.
    """
    found: dict[str, Any] = {
        label: _compared(base_rows, ours_rows) for label, (base_rows,), ours_rows in _pooled(sources, [base], runs)
    }
    found["sources"] = {name: _compared(base[name], [counts[name] for counts in runs]) for name in sources}
    return found


def compare_at(sources: Sources, bases: Sequence[Counts], runs: Sequence[Counts], drafted: float) -> dict[str, Any]:
    """As ``compare``, at a fixed number of drafted tokens per step: both arms are read off their curves.

    Args:
        sources: calls by source.
        bases: the other arm at several settings.
        runs: ours at a row of thresholds.
        drafted: draft tokens per step; a curve that does not reach it is named in the result, not extended.
    """
    found: dict[str, Any] = {"drafted_per_step": drafted}
    for label, base_rows, ours_rows in _pooled(sources, bases, runs):
        base, base_reach = _at(base_rows, drafted)
        ours, reach = _at(ours_rows, drafted)
        found[label] = {"accepted_per_step": base, "ours_accepted_per_step": ours}
        found[label]["gain_percent"] = 100 * (ours / max(base, 1e-9) - 1)
        if not max(base_reach[0], reach[0]) <= drafted <= min(base_reach[1], reach[1]):
            found[label]["out_of_range"] = [*base_reach, *reach]
    return found
