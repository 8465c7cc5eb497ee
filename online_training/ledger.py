"""What a trainer has learned from, in SQLite: one row per shard, written by the trainer alone.

The row is written after the checkpoint that contains the shard and before the shard is acknowledged. Whenever the
trainer dies, its last checkpoint, this table and the spool therefore agree on restart: a shard in the table is in the
weights once, a shard that is not in the table is not in the weights.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

from specdec.errors import LoadError

__all__ = ["Ledger"]

_TABLE = """
CREATE TABLE IF NOT EXISTS shard (
    shard_id TEXT PRIMARY KEY,
    num_records INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    step INTEGER NOT NULL,      -- of the checkpoint that contains it
    done_ms INTEGER NOT NULL
) STRICT
"""


class Ledger:
    """Shards that are in a trainer's weights.

    Args:
        path: the database; made with mode 0600 if it is not there.

    Raises:
        LoadError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise LoadError(f"cannot open the ledger {path}: {error}") from error

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def record(self, step: int, shards: Iterable[tuple[str, int, int]]) -> None:
        """Enter shards, all or none; one that is there already stays as it is.

        Args:
            step: of the checkpoint that contains them.
            shards: (id, records, tokens) of each.
        """
        now = int(time.time() * 1e3)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT OR IGNORE INTO shard VALUES (?, ?, ?, ?, ?)",
                [(name, num_records, num_tokens, step, now) for name, num_records, num_tokens in shards],
            )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def has(self, shard_id: str) -> bool:
        """True if the shard is in the weights."""
        return self._db.execute("SELECT 1 FROM shard WHERE shard_id = ?", (shard_id,)).fetchone() is not None

    def totals(self) -> tuple[int, int, int]:
        """(shards, records, tokens) learned from."""
        row = self._db.execute("SELECT COUNT(*), SUM(num_records), SUM(num_tokens) FROM shard").fetchone()
        return int(row[0]), int(row[1] or 0), int(row[2] or 0)
