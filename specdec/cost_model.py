"""What the parts of a step cost, in milliseconds: monotone tables, measured at the start and refreshed by every step.

A table has three axes: query tokens of the step, context length, and batch size. Between grid points it is interpolated
linearly, above the largest number of tokens it goes on with its last slope. More tokens, more context or more requests
never cost less: after each change the table is made monotone again around the newest measurement.

Sources: FASER (2604.20503) profiles draft and verification apart; the table that decides how many tokens are verified
follows vLLM's adaptive verification (medians, running maximum); the refresh by every step is ours.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from specdec.errors import ConfigError, LoadError

__all__ = ["PARTS", "CostModel", "CostTable", "cost_file", "line_of"]

Floats: TypeAlias = npt.NDArray[np.float64]

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_LOG_TOKENS, _LOG_CONTEXTS, _LOG_BATCHES = (np.log2(np.array(x, np.float64)) for x in (TOKENS, CONTEXTS, BATCHES))
_TOKENS = np.array(TOKENS, dtype=np.float64)
PARTS = ("draft", "target", "verify", "commit", "host")
_NEWEST = 0.06  # share of a new observation once a cell has seen many
# Nothing is known yet: a further token costs 2 % of a step of one, as on a memory-bound target; drawing tokens costs
# about the same for each. Steps refresh whole neighbourhoods, so what they teach of a slope is taught slowly.
_PRIOR_SLOPE = 0.02
_PRIOR_SLOPES = {"verify": 0.5}
_REACH = 0.7  # neighbours learn from an observation up to about so many doublings away
_OUTLIER = 4.0  # a step that took so many times its prediction was disturbed, and counts as this much
_FIRST = 4  # observations of a cell that may have been disturbed by the start
_FORMAT = 1


class CostTable:
    """Milliseconds by (batch, context, tokens).

    Args:
        ms: [batches, contexts, tokens] to start from; None: a guess with the right shape and no scale.
        counts: how many observations each cell is worth; None: none where ``ms`` is a guess, else ten.
        slope: of the guess: what a further token costs, in steps of one token.

    Attributes:
        is_measured: anything was observed; before that a time has no scale.

    Raises:
        ConfigError: a wrong shape, or a time that is not positive and finite.
    """

    def __init__(self, ms: Floats | None = None, counts: Floats | None = None, *, slope: float = _PRIOR_SLOPE) -> None:
        shape = (len(BATCHES), len(CONTEXTS), len(TOKENS))
        if ms is None:
            ms = np.broadcast_to(1 + slope * (np.array(TOKENS) - 1.0), shape)
            counts = np.zeros(shape)
        if ms.shape != shape or not (np.isfinite(ms) & (ms > 0)).all():
            raise ConfigError(f"a cost table must hold {shape} positive times, got {ms.shape}")
        self.ms = _monotone(np.array(ms, dtype=np.float64, order="C"))
        self.counts = np.full(shape, 10.0) if counts is None else np.array(counts, dtype=np.float64)
        self.is_measured = bool(self.counts.any())
        self._is_settled = self.is_measured

    def curve(self, tokens: npt.ArrayLike, context: float, batch: float) -> Floats:
        """Milliseconds [n] of steps of ``tokens`` [n] query tokens in all, for one context length and batch size."""
        return _curve_of((self,), tokens, context, batch)

    def at(self, tokens: float, context: float, batch: float) -> float:
        """Milliseconds of one step."""
        return float(self.curve([tokens], context, batch)[0])

    def observe(self, tokens: float, context: float, batch: float, ms: float, *, share: float = 0.0) -> None:
        """Learn what a step took; near cells learn with it, by their distance in doublings.

        Args:
            tokens: query tokens of the step.
            context: mean length of its requests in tokens.
            batch: its requests.
            ms: what it took; times that are not positive and finite teach nothing.
            share: least share of this time in what the nearest cell becomes, in [0, 1]; 0: by what the cell has seen.
        """
        if not 0 < ms < np.inf:
            return
        expected = self.at(tokens, context, batch)
        if not self.is_measured:
            self.ms *= ms / expected
            expected = ms
        ratio = min(max(ms / expected, 1 / _OUTLIER), _OUTLIER)
        if ratio < 0.5 and not self._is_settled and self.counts.max() < _FIRST:
            self.counts *= 0.0  # what was seen before was a first call, which compiles and allocates
        self._is_settled = self._is_settled or bool(self.counts.max() >= _FIRST)
        places = (math.log2(max(batch, 1.0)), math.log2(max(context, 1.0)), math.log2(max(tokens, 1.0)))
        _refresh(self.ms, self.counts, places, ratio, max(share, _NEWEST))
        self.is_measured = True


def line_of(fixed_ms: float, each_ms: float, *, free: int = 0) -> CostTable:
    """The table of a part that takes ``fixed_ms`` and ``each_ms`` for every token above ``free``, whatever the rest."""
    row = fixed_ms + each_ms * np.maximum(_TOKENS - free, 0)
    return CostTable(np.broadcast_to(row, (len(BATCHES), len(CONTEXTS), len(TOKENS))).copy())


def _monotone(table: Floats) -> Floats:
    for axis in range(table.ndim):
        table = np.maximum.accumulate(table, axis=axis)
    return table


def _curve_of(tables: Sequence[CostTable], tokens: npt.ArrayLike, context: float, batch: float) -> Floats:
    """The sum [n] of some tables at ``tokens`` [n]."""
    wanted = np.asarray(tokens, dtype=np.float64)
    places = math.log2(max(batch, 1.0)), math.log2(max(context, 1.0))
    cost: Floats = _read_curves(tuple(table.ms for table in tables), wanted, places)
    return cost


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _place(grid: Floats, at: float) -> tuple[int, float]:
    """Between which grid points a coordinate lies: the lower one, and the share of the way to the next."""
    below = 0
    while below < len(grid) - 2 and grid[below + 1] <= at:
        below += 1
    share = (at - grid[below]) / (grid[below + 1] - grid[below])
    return below, min(max(share, 0.0), 1.0)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _read_curves(tables: tuple[Floats, ...], tokens: Floats, places: tuple[float, float]) -> Floats:
    """Trilinear interpolation: batch and context on a logarithmic grid, tokens on a linear one; summed over tables."""
    b, u = _place(_LOG_BATCHES, places[0])
    c, v = _place(_LOG_CONTEXTS, places[1])
    row = np.zeros(len(_TOKENS))
    for table in tables:
        for t in range(len(row)):
            row[t] += (1 - u) * ((1 - v) * table[b, c, t] + v * table[b, c + 1, t])
            row[t] += u * ((1 - v) * table[b + 1, c, t] + v * table[b + 1, c + 1, t])
    last = _TOKENS[-1]
    slope = (row[-1] - row[-2]) / (last - _TOKENS[-2])
    cost: Floats = np.interp(tokens, _TOKENS, row)
    for i in range(len(tokens)):
        if tokens[i] > last:
            cost[i] += slope * (tokens[i] - last)
    return cost


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _nearness(grid: Floats, place: float) -> tuple[Floats, int]:
    """How much each grid point learns, 1 at the nearest one, and which that is."""
    squares = ((grid - place) / _REACH) ** 2
    nearest = int(squares.argmin())
    return np.exp(squares[nearest] - squares), nearest


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _refresh(ms: Floats, counts: Floats, places: tuple[float, float, float], ratio: float, newest: float) -> None:
    """Move the cells around an observation towards it, and make the table monotone again around the nearest cell."""
    near_b, b = _nearness(_LOG_BATCHES, places[0])
    near_c, c = _nearness(_LOG_CONTEXTS, places[1])
    near_t, t = _nearness(_LOG_TOKENS, places[2])
    for i in range(ms.shape[0]):
        for j in range(ms.shape[1]):
            for k in range(ms.shape[2]):
                weight = near_b[i] * near_c[j] * near_t[k]
                if weight > 1e-4:
                    ms[i, j, k] *= 1.0 + weight * max(newest, 1.0 / (counts[i, j, k] + 1.0)) * (ratio - 1.0)
                    counts[i, j, k] += weight
    # The newest measurement is right: what lies above it rises to it, what lies below sinks to it.
    value = ms[b, c, t]
    for i in range(ms.shape[0]):
        for j in range(ms.shape[1]):
            for k in range(ms.shape[2]):
                if i >= b and j >= c and k >= t:
                    ms[i, j, k] = max(ms[i, j, k], value)
                elif i <= b and j <= c and k <= t:
                    ms[i, j, k] = min(ms[i, j, k], value)
                if i > 0:
                    ms[i, j, k] = max(ms[i, j, k], ms[i - 1, j, k])
                if j > 0:
                    ms[i, j, k] = max(ms[i, j, k], ms[i, j - 1, k])
                if k > 0:
                    ms[i, j, k] = max(ms[i, j, k], ms[i, j, k - 1])


class CostModel:
    """The tables of all parts, and what a millisecond is worth.

    Attributes:
        tables: by part: ``draft`` (tokens = draft tokens), ``target``, ``verify``, ``commit`` and ``host``.
        tokens_per_ms: what the engine emits at present, all requests together: who spends a millisecond has to bring
            so many tokens. 0: nobody knows yet. A controller keeps it.
        tokens_per_node: likewise, what the verification of a draft token has to bring.

    Args:
        tables: measured ones; parts that are missing are learned from steps.
    """

    def __init__(self, tables: Mapping[str, CostTable] | None = None) -> None:
        unknown = set(tables or {}) - set(PARTS)
        if unknown:
            raise ConfigError(f"parts of a cost model are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        self.tables = {
            part: (tables or {}).get(part) or CostTable(slope=_PRIOR_SLOPES.get(part, _PRIOR_SLOPE)) for part in PARTS
        }
        self.tokens_per_ms = self.tokens_per_node = 0.0

    def take(self, other: CostModel) -> None:
        """Go on with the tables of another model; who holds this one need not be told."""
        self.tables = other.tables

    def step_curve(self, tokens: npt.ArrayLike, context: float, batch: float) -> Floats:
        """Milliseconds [n] of a step with ``tokens`` [n] query tokens, drafting left out."""
        known = [self.tables[part] for part in PARTS if part != "draft" and self.tables[part].is_measured]
        return _curve_of(known or [self.tables["target"]], tokens, context, batch)

    def step_ms(self, tokens: float, context: float, batch: float) -> float:
        """Milliseconds of one step, drafting left out."""
        return float(self.step_curve([tokens], context, batch)[0])

    @property
    def is_measured(self) -> bool:
        """True once the target's times have a scale."""
        return self.tables["target"].is_measured

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: the grid and, per measured part, milliseconds and counts."""
        tables = {
            part: {"ms": table.ms.round(6).tolist(), "counts": table.counts.round(3).tolist()}
            for part, table in self.tables.items()
            if table.is_measured
        }
        grid = {"tokens": list(TOKENS), "contexts": list(CONTEXTS), "batches": list(BATCHES)}
        return {"format": _FORMAT, "unit": "ms", "grid": grid, "tables": tables}

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The model that ``as_dict`` described.

        Raises:
            LoadError: it is of another format or another grid, or damaged.
        """
        grid = {"tokens": list(TOKENS), "contexts": list(CONTEXTS), "batches": list(BATCHES)}
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT or data.get("grid") != grid:
            raise LoadError("this is not a cost table of this version of specdec: measure it again")
        try:
            return cls(
                {
                    part: CostTable(np.array(entry["ms"], dtype=np.float64), np.array(entry["counts"]))
                    for part, entry in data["tables"].items()
                }
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise LoadError(f"the cost table is damaged: {error}") from error

    def save(self, path: Path) -> None:
        """Write the tables to a file, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(self.as_dict()), encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """The tables of a file.

        Raises:
            LoadError: it cannot be read, or holds something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"cannot read the cost table {path}: {error}") from error
        return cls.of_dict(data)


def cost_file(parts: Sequence[object], *, folder: Path | None = None) -> Path:
    """Where the table of one (model, device, dtype, ...) is kept between runs.

    Args:
        parts: what the times depend on.
        folder: of all tables; None: ``specdec/costs`` in the user's cache (``XDG_CACHE_HOME``).
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec" / "costs"
    name = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", str(part)) for part in parts)
    return folder / f"{name}.json"
