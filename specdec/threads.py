"""How many threads this process can really run at a time: torch counts cores, a container may be allowed fewer."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

__all__ = ["usable_cores", "warn_of_threads"]

logger = logging.getLogger(__name__)

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # control groups v2: "quota period" in microseconds, or "max period"


def usable_cores(quota_file: Path = _QUOTA) -> int:
    """Cores that the scheduler lets this process use: its affinity, cut to its control group's quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no control groups, or no quota ("max")
        return cores
    return max(1, min(cores, allowed))


def warn_of_threads(threads: int) -> None:
    """Say so if torch runs more threads than this process may use at a time."""
    cores = usable_cores()
    if threads > cores:
        logger.warning(
            "torch runs %d threads on %d usable cores, which makes every step slower: torch.set_num_threads(%d)",
            threads, cores, cores,
        )  # fmt: skip
