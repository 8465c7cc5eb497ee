"""Counts of a simulation kept on disk: a long one goes on where it was stopped, and arms that did not change stay.

Every file holds the counts of some arms over one source. Its name is a digest of all that they depend on: every token
of the source, the arms, and the code that drafts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specdec.bench.traces import TokenCall
from specdec.suffix_tree.memory import SOURCES_DIGEST

__all__ = ["load_counts", "name_of", "save_counts"]

ArmCounts = dict[tuple[str, str], npt.NDArray[np.int64]]
_SEPARATOR = " @ "


def name_of(part: str, settings: str, calls: Sequence[TokenCall]) -> str:
    """The name under which counts are kept.

    Args:
        part: "peer", "reference" or "ours".
        settings: everything that the arms were told, in words.
        calls: the source.
    """
    digest = hashlib.sha256(f"{part} {settings} ".encode())
    digest.update(_peer_version().encode() if part == "peer" else SOURCES_DIGEST.encode())
    for call in calls:
        digest.update(np.array([len(call.prompt_ids), len(call.response_ids)], np.int64).tobytes())
        digest.update(call.prompt_ids.tobytes())
        digest.update(call.response_ids.tobytes())
    return f"{part}-{digest.hexdigest()[:24]}"


def _peer_version() -> str:
    try:
        return metadata.version("arctic-inference")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def save_counts(folder: Path, name: str, counts: ArmCounts) -> None:
    """Keep the counts of some arms; readers never see half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{name}.tmp.npz"
    np.savez_compressed(draft, **{_SEPARATOR.join(arm): rows for arm, rows in counts.items()})  # type: ignore[arg-type]
    draft.replace(folder / f"{name}.npz")


def load_counts(folder: Path, name: str) -> ArmCounts | None:
    """The counts kept under a name, or None."""
    try:
        with np.load(folder / f"{name}.npz") as saved:
            return {(arm.split(_SEPARATOR)[0], arm.split(_SEPARATOR)[1]): saved[arm] for arm in saved.files}
    except FileNotFoundError:
        return None
