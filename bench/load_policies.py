"""What a load simulation chooses among, and what it keeps of a request."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.errors import ConfigError

__all__ = ["LoadLimits", "Policy", "PruneModel", "Served"]

_EXTRAS = {"prune", "overlap", "chunks"}


@dataclass(frozen=True, slots=True)
class Policy:
    """How much is drafted: ``none``, ``adaptive``, or ``static-K`` for the K best nodes of every request.

    ``+prune`` lets the target drop draft tokens half-way, ``+overlap`` drafts for half of the batch while the target
    verifies the other half, ``+chunks`` verifies the first half of every draft while the second is drafted, and that
    one only for requests whose first held; all only in steps where the costs say that it pays.

    Raises:
        ConfigError: another name.
    """

    name: str

    def __post_init__(self) -> None:
        is_static = self.base.startswith("static-") and self.base.removeprefix("static-").isdecimal()
        extras = self.name.split("+")[1:]
        if not (self.base in ("none", "adaptive") or is_static) or not _EXTRAS.issuperset(extras):
            raise ConfigError(
                f"a policy is none, adaptive or static-K, then +prune, +overlap or +chunks, got {self.name!r}"
            )

    @property
    def base(self) -> str:
        """The name without what is added."""
        return self.name.partition("+")[0]

    @property
    def length(self) -> int:
        """K of a static policy, else 0."""
        return int(self.base.removeprefix("static-")) if self.base.startswith("static-") else 0

    @property
    def prunes(self) -> bool:
        """Draft tokens may leave the verification half-way."""
        return "prune" in self.name.split("+")

    @property
    def overlaps(self) -> bool:
        """One half of the batch may be drafted for while the other is verified."""
        return "overlap" in self.name.split("+")

    @property
    def chunks(self) -> bool:
        """A draft may be verified in two parts."""
        return "chunks" in self.name.split("+")


@dataclass(frozen=True, slots=True)
class PruneModel:
    """What early pruning does (`specdec.early_exit`).

    Args:
        depth: share of the layers before the probe, in (0, 1).
        found: share of the draft tokens that will be rejected and that the probe drops, in [0, 1]. FASER (2604.20503)
            reports that 9 to 16 % of all verified tokens leave early, with more than half of them rejected.
        probe_ms: time of the probe, of each draft token.
    """

    depth: float = 0.5
    found: float = 0.25
    probe_ms: float = 0.02

    def __post_init__(self) -> None:
        if not (0 < self.depth < 1 and 0 <= self.found <= 1 and self.probe_ms >= 0):
            raise ConfigError(f"pruning needs a depth in (0, 1), a share in [0, 1] and a time >= 0, got {self}")


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """What one replica takes on; see ``EngineConfig``."""

    max_batch_size: int = 16
    max_prefill_tokens: int = 512
    max_budget: int = 64

    def __post_init__(self) -> None:
        if min(self.max_batch_size, self.max_prefill_tokens, self.max_budget) < 1:
            raise ConfigError(f"limits must be at least 1, got {self}")


@dataclass(slots=True)
class Served:
    """One request: when it came and was served, in seconds, and how many tokens it got in how many steps."""

    arrival_s: float
    prompt_tokens: int
    response_tokens: int
    first_s: float = 0.0
    last_s: float = 0.0
    steps: int = 0
    drafted: int = 0

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first token."""
        return 1e3 * (self.first_s - self.arrival_s)

    @property
    def tpot_ms(self) -> float:
        """Milliseconds per further token."""
        return 1e3 * (self.last_s - self.first_s) / max(self.response_tokens - 1, 1)
