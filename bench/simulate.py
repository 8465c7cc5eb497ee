"""How well retrieval drafters guess recorded responses: no model, seconds for thousands of calls.

Every source starts cold; its calls run in order, one at a time, as a server would see them. Arms are compared at the
same number of drafted tokens per step: ours is measured at a row of thresholds and interpolated linearly between them,
which is slightly against it, as the curve is concave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.bench.peers import ArcticOptions, arctic_cache, replay_arctic
from specdec.bench.traces import TokenCall, episode_half
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.suffix_decoding import CountingDrafts, ReferenceSuffixDecoding

__all__ = ["SETTINGS", "Setting", "compare", "frontier", "run_ours", "run_peer", "run_reference"]

Sources = Mapping[str, Sequence[TokenCall]]
# Per source, one row per call: steps, accepted draft tokens, draft tokens.
Counts = dict[str, npt.NDArray[np.int64]]
_PATHS = (0.6, 0.45, 0.35, 0.27, 0.2, 0.15, 0.11, 0.08, 0.055, 0.04, 0.027, 0.018, 0.012)
_TREES = (0.2, 0.14, 0.1, 0.07, 0.05, 0.037, 0.027, 0.02, 0.014)


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


def run_ours(sources: Sources, *, threshold: float, as_tree: bool, max_nodes: int = 64) -> Counts:
    """Replay every source through a fresh cache."""
    counts: Counts = {}
    for name, calls in sources.items():
        cache = SuffixCache(max_bytes=1 << 28)
        rows = []
        for number, call in enumerate(calls):
            cache.start(number, call.prompt_ids)
            rows.append(cache.replay(number, call.response_ids, budget=max_nodes, threshold=threshold, as_tree=as_tree))
            cache.finish(number)
        counts[name] = np.array(rows, np.int64)
    return counts


def run_peer(sources: Sources, setting: Setting) -> Counts:
    """The same through arctic-inference.

    Raises:
        ImportError: it is not installed.
    """
    options: ArcticOptions = {
        "max_spec_factor": setting.factor, "max_spec_offset": setting.offset, "min_token_prob": setting.min_prob,
        "use_tree_spec": setting.as_tree,
    }  # fmt: skip
    counts: Counts = {}
    for name, calls in sources.items():
        cache = arctic_cache()
        counts[name] = np.array([replay_arctic(cache, n, call, options) for n, call in enumerate(calls)], np.int64)
    return counts


def run_reference(sources: Sources, setting: Setting) -> Counts:
    """The same through our own implementation of SuffixDecoding as published."""
    options = CountingDrafts(
        factor=setting.factor, offset=setting.offset, min_prob=setting.min_prob, as_tree=setting.as_tree
    )
    counts: Counts = {}
    for name, calls in sources.items():
        reference = ReferenceSuffixDecoding()
        counts[name] = np.array([reference.replay(c.prompt_ids, c.response_ids, options) for c in calls], np.int64)
    return counts


def frontier(
    sources: Sources, *, as_tree: bool, on_run: Callable[[float], None] = lambda threshold: None
) -> list[tuple[float, Counts]]:
    """Ours at a row of thresholds, from short drafts to long ones."""
    runs = []
    for threshold in _TREES if as_tree else _PATHS:
        on_run(threshold)
        runs.append((threshold, run_ours(sources, threshold=threshold, as_tree=as_tree, max_nodes=256)))
    return runs


def _rates(rows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Drafted and accepted per step."""
    steps, accepted, drafted = rows.sum(axis=0).tolist()
    return drafted / max(steps, 1), accepted / max(steps, 1)


def _compared(base: npt.NDArray[np.int64], ours: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    drafted, accepted = _rates(base)
    points = sorted(_rates(rows) for rows in ours)
    reach = [point[0] for point in points]
    result: dict[str, Any] = {"drafted_per_step": drafted, "accepted_per_step": accepted}
    if not reach[0] <= drafted <= reach[-1]:
        # Never extrapolated: more drafting than ours ever does is compared with ours at its longest.
        result["out_of_range"] = [reach[0], reach[-1]]
    equal = float(np.interp(drafted, reach, [point[1] for point in points]))
    return {**result, "ours_accepted_per_step": equal, "gain_percent": 100 * (equal / max(accepted, 1e-9) - 1)}


def compare(sources: Sources, base: Counts, runs: Sequence[tuple[float, Counts]]) -> dict[str, Any]:
    """Accepted tokens per step of ours against a base arm at the base's drafted tokens per step.

    Args:
        sources: calls by source.
        base: the other arm.
        runs: from ``frontier``.

    Returns:
        Over all calls, over each half of the episodes (half 0 is what tables and constants were chosen on, half 1 was
        held out), and by source.
    """
    halves = {name: np.array([episode_half(call.trace) for call in calls]) for name, calls in sources.items()}

    def pooled(counts: Counts, half: int | None) -> npt.NDArray[np.int64]:
        return np.concatenate([rows if half is None else rows[halves[name] == half] for name, rows in counts.items()])

    found: dict[str, Any] = {
        label: _compared(pooled(base, half), [pooled(counts, half) for _, counts in runs])
        for label, half in (("all", None), ("tuned half", 0), ("held-out half", 1))
    }
    found["sources"] = {name: _compared(base[name], [counts[name] for _, counts in runs]) for name in sources}
    return found
