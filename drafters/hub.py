"""Checkpoints by name: a directory, or ``owner/name`` on the Hugging Face hub.

What is on the hub is fetched into the hub library's own cache, which transformers shares (``HF_HOME``, ``HF_TOKEN``,
``HF_HUB_OFFLINE`` and so on mean what they mean there), and read from there like any directory.
"""

from __future__ import annotations

import re
from pathlib import Path

from specdec.errors import LoadError

__all__ = ["checkpoint_folder", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Configuration, tokenizer and weights; ``.bin`` only where there is nothing safer. Never code.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_SAFE_WEIGHTS, _PICKLED_WEIGHTS = ("*.safetensors",), ("pytorch_model*.bin",)


def is_hub_id(source: str) -> bool:
    """True if a checkpoint may be on the hub under this name."""
    return _HUB_ID.fullmatch(source) is not None


def checkpoint_folder(source: str, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint that a user named, with a ``config.json`` in it.

    Args:
        source: a directory, or ``owner/name`` on the hub. A directory of that name comes first.
        revision: branch, tag or commit on the hub; None: its main branch.

    Raises:
        LoadError: it is neither, or the hub cannot be asked and the cache does not have it.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if not is_hub_id(source):
            raise LoadError(f"there is no directory {source!r}, and it cannot be a name on the hub (owner/name)")
        path = _fetched(source, revision)
    elif revision is not None:
        raise LoadError(f"revision={revision} is for names on the hub, {source!r} is a directory")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise LoadError(f"{source!r} is no checkpoint: looked for config.json, found {found}")
    return path


def _fetched(source: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        path = _snapshot(source, revision, _SMALL_FILES + _SAFE_WEIGHTS)
        if not any(path.glob("*.safetensors")):
            path = _snapshot(source, revision, _SMALL_FILES + _PICKLED_WEIGHTS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        raise LoadError(
            f"there is no directory {source!r}, and the hub does not give it{offline}: {reason[:300]}"
        ) from error
    return path


def _snapshot(source: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
