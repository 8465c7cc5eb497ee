"""What the parts of a step cost, in milliseconds: monotone tables, measured at the start and refreshed by every step.

A table has three axes: query tokens of the step, context length, and batch size. Between grid points it is interpolated
linearly, above the largest number of tokens it goes on with its last slope. More tokens, more context or more requests
never cost less: after each change the table is made monotone again around the newest measurement.

Sources: FASER (2604.20503) profiles draft and verification apart; the table that decides how many tokens are verified
follows vLLM's adaptive verification (medians, running maximum); the refresh by every step is ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, LoadError

__all__ = ["PARTS", "CostModel", "CostTable", "cost_file"]

Floats = npt.NDArray[np.float64]

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = ("draft", "target", "verify", "commit", "host")
_NEWEST = 0.06  # share of a new observation once a cell has seen many
_PRIOR_SLOPE = 0.02  # nothing is known yet: a further token costs 2 % of a step of one, as on a memory-bound target
_REACH = 0.7  # neighbours learn from an observation up to about so many doublings away
_OUTLIER = 4.0  # a step that took so many times its prediction was disturbed, and counts as this much
_FIRST = 4  # observations of a cell that may have been disturbed by the start
_FORMAT = 1


class CostTable:
    """Milliseconds by (batch, context, tokens).

    Args:
        ms: [batches, contexts, tokens] to start from; None: a guess with the right shape and no scale.
        counts: how many observations each cell is worth; None: none where ``ms`` is a guess, else ten.

    Raises:
        ConfigError: a wrong shape, or a time that is not positive and finite.
    """

    def __init__(self, ms: Floats | None = None, counts: Floats | None = None) -> None:
        shape = (len(BATCHES), len(CONTEXTS), len(TOKENS))
        if ms is None:
            ms = np.broadcast_to(1 + _PRIOR_SLOPE * (np.array(TOKENS) - 1.0), shape)
            counts = np.zeros(shape)
        if ms.shape != shape or not (np.isfinite(ms) & (ms > 0)).all():
            raise ConfigError(f"a cost table must hold {shape} positive times, got {ms.shape}")
        self.ms = _monotone(np.array(ms, dtype=np.float64))
        self.counts = np.full(shape, 10.0) if counts is None else np.array(counts, dtype=np.float64)
        self._axes = [np.log2(np.array(axis, dtype=np.float64)) for axis in (BATCHES, CONTEXTS, TOKENS)]

    @property
    def is_measured(self) -> bool:
        """True once anything was observed: before that a time has no scale."""
        return bool(self.counts.any())

    def curve(self, tokens: npt.ArrayLike, context: float, batch: float) -> Floats:
        """Milliseconds [n] of steps of ``tokens`` [n] query tokens in all, for one context length and batch size."""
        row = self._between(0, batch, self.ms)
        row = self._between(1, context, row)
        wanted = np.asarray(tokens, dtype=np.float64)
        cost = np.interp(wanted, TOKENS, row)
        slope = (row[-1] - row[-2]) / (TOKENS[-1] - TOKENS[-2])
        return np.asarray(cost + slope * np.maximum(wanted - TOKENS[-1], 0.0))

    def at(self, tokens: float, context: float, batch: float) -> float:
        """Milliseconds of one step."""
        return float(self.curve([tokens], context, batch)[0])

    def _between(self, axis: int, value: float, table: Floats) -> Floats:
        """``table`` without its first axis, interpolated at ``value`` on the grid of that axis."""
        grid = self._axes[axis]
        place = float(np.interp(np.log2(max(value, 1.0)), grid, np.arange(len(grid))))
        low = min(int(place), len(grid) - 2)
        return np.asarray(table[low] + (place - low) * (table[low + 1] - table[low]))

    def observe(self, tokens: float, context: float, batch: float, ms: float) -> None:
        """Learn what a step took; near cells learn with it, by their distance in doublings."""
        if not 0 < ms < np.inf:
            return
        expected = self.at(tokens, context, batch)
        if not self.is_measured:
            self.ms *= ms / expected
            expected = ms
        ratio = min(max(ms / expected, 1 / _OUTLIER), _OUTLIER)
        points = (batch, context, tokens)
        distances = [(axis - np.log2(max(x, 1.0))) / _REACH for axis, x in zip(self._axes, points, strict=True)]
        near = [np.exp((d**2).min() - d**2) for d in distances]  # 1 at the nearest grid point
        weight = near[0][:, None, None] * near[1][None, :, None] * near[2][None, None, :]
        if ratio < 0.5 and self.counts.max() < _FIRST:
            self.counts *= 0.0  # what was seen before was a first call, which compiles and allocates
        share = weight * np.maximum(_NEWEST, 1.0 / (self.counts + 1.0))
        self.ms *= 1.0 + share * (ratio - 1.0)
        self.counts += weight
        self._make_monotone_around(tuple(int(np.abs(d).argmin()) for d in distances))

    def _make_monotone_around(self, cell: tuple[int, ...]) -> None:
        # The newest measurement is right: what lies above it rises to it, what lies below sinks to it.
        b, c, t = cell
        value = self.ms[b, c, t]
        above, below = self.ms[b:, c:, t:], self.ms[: b + 1, : c + 1, : t + 1]
        np.maximum(above, value, out=above)
        np.minimum(below, value, out=below)
        self.ms = _monotone(self.ms)


def _monotone(table: Floats) -> Floats:
    for axis in range(table.ndim):
        table = np.maximum.accumulate(table, axis=axis)
    return table


class CostModel:
    """The tables of all parts, and what a millisecond is worth.

    Attributes:
        tables: by part: ``draft`` (tokens = draft tokens), ``target``, ``verify``, ``commit`` and ``host``.
        tokens_per_ms: what the engine emits at present, all requests together: who spends a millisecond has to bring
            so many tokens. 0: nobody knows yet. A controller keeps it.

    Args:
        tables: measured ones; parts that are missing are learned from steps.
    """

    def __init__(self, tables: Mapping[str, CostTable] | None = None) -> None:
        unknown = set(tables or {}) - set(PARTS)
        if unknown:
            raise ConfigError(f"parts of a cost model are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        self.tables = {part: (tables or {}).get(part) or CostTable() for part in PARTS}
        self.tokens_per_ms = 0.0

    def step_curve(self, tokens: npt.ArrayLike, context: float, batch: float) -> Floats:
        """Milliseconds [n] of a step with ``tokens`` [n] query tokens, drafting left out."""
        known = [self.tables[part] for part in PARTS if part != "draft" and self.tables[part].is_measured]
        return np.asarray(sum(table.curve(tokens, context, batch) for table in known or [self.tables["target"]]))

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
