"""What a trainer remembers of old traffic: a fair sample of all of it, the very first of it, and the newest unseen.

Learning from the newest text alone would forget what comes back later. So half of every step is new, most of the rest
an even sample of all that was seen (Vitter 1985, algorithm R), and a little a fixed set from the beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from specdec.errors import ConfigError
from specdec.online_training.records import TraceRecord

__all__ = ["ReplayMix", "ReplayPool"]


@dataclass(frozen=True, slots=True)
class ReplayMix:
    """Where the tokens of a training step come from, and how much is remembered.

    Args:
        new: share of the newest shard,
        reservoir: of an even sample of everything before it,
        anchors: of the first requests ever seen; the three make 1.
        num_reservoir: requests in the sample.
        num_anchors: requests in the fixed set.
        num_heldout: newest requests that are kept for judging and never learned from.
        heldout_every: one in so many prompts is held out.
    """

    new: float = 0.5
    reservoir: float = 0.4
    anchors: float = 0.1
    num_reservoir: int = 512
    num_anchors: int = 64
    num_heldout: int = 48
    heldout_every: int = 10

    def __post_init__(self) -> None:
        shares = self.new, self.reservoir, self.anchors
        if min(shares) < 0 or not self.new > 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(f"shares of new, reservoir and anchors must be >= 0 and make 1, got {shares}")
        if self.heldout_every < 2 or min(self.num_reservoir, self.num_anchors, self.num_heldout) < 1:
            raise ConfigError("heldout_every must be >= 2, and every number of requests >= 1")


class ReplayPool:
    """Old requests by where they are drawn from. All choices are keyed by ``seed`` and a step.

    Args:
        mix: see ``ReplayMix``.
        seed: of the draws.
    """

    def __init__(self, mix: ReplayMix, *, seed: int = 0) -> None:
        self.mix, self._seed = mix, seed
        self._anchors: list[tuple[str, TraceRecord]] = []
        self._reservoir: list[tuple[str, TraceRecord]] = []
        self._heldout: deque[tuple[str, TraceRecord]] = deque(maxlen=mix.num_heldout)
        self._num_seen = 0

    @property
    def heldout(self) -> list[TraceRecord]:
        """The newest requests that were never learned from."""
        return [record for _, record in self._heldout]

    @property
    def shard_ids(self) -> set[str]:
        """Shards that something here came from."""
        return {shard for shard, _ in (*self._anchors, *self._reservoir, *self._heldout)}

    def split(self, shard_id: str, records: Sequence[TraceRecord]) -> list[TraceRecord]:
        """Hold some requests out; the others. A prompt that comes again goes the same way."""
        taught = []
        for record in records:
            if int(record.prompt_hash[:8], 16) % self.mix.heldout_every:
                taught.append(record)
            else:
                self._heldout.append((shard_id, record))
        return taught

    def add(self, shard_id: str, records: Sequence[TraceRecord]) -> None:
        """Remember requests that were learned from."""
        for record in records:
            if len(self._anchors) < self.mix.num_anchors:
                self._anchors.append((shard_id, record))
            self._num_seen += 1
            if len(self._reservoir) < self.mix.num_reservoir:
                self._reservoir.append((shard_id, record))
                continue
            place = int(np.random.default_rng((self._seed, 1, self._num_seen)).integers(self._num_seen))
            if place < self.mix.num_reservoir:
                self._reservoir[place] = (shard_id, record)

    def draw(self, step: int, num_new_tokens: int) -> list[TraceRecord]:
        """Old requests to go with so many new tokens in a step."""
        rng = np.random.default_rng((self._seed, 2, step))
        drawn: list[TraceRecord] = []
        for share, pool in ((self.mix.reservoir, self._reservoir), (self.mix.anchors, self._anchors)):
            wanted = num_new_tokens * share / self.mix.new
            while pool and wanted > 0:
                record = pool[int(rng.integers(len(pool)))][1]
                wanted -= len(record.token_ids)
                if wanted < -0.5 * len(record.token_ids) and rng.random() < 0.5:
                    break  # on average neither more nor less than wanted
                drawn.append(record)
        return drawn

    def keep_only(self, shard_ids: Collection[str]) -> None:
        """Forget everything that came from other shards."""
        self._anchors = [one for one in self._anchors if one[0] in shard_ids]
        self._reservoir = [one for one in self._reservoir if one[0] in shard_ids]
        self._heldout = deque((one for one in self._heldout if one[0] in shard_ids), maxlen=self.mix.num_heldout)
