"""Drafters that know everything or nothing, and a sampler that does as it is told."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from specdec.errors import ConfigError
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, IntArray, RequestState, StepEvent, TargetOutput

__all__ = ["OracleDrafter", "RandomTreeDrafter", "ScriptedSampler"]


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value}")


class _Forgetful:
    """The half of a drafter that learns nothing."""

    def __init__(self) -> None:
        self.needs = DrafterNeeds()

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing to prepare."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing to forget."""


class RandomTreeDrafter(_Forgetful):
    """Drafts random trees of random tokens: a hostile drafter that must not change one token of the text.

    A tree depends on (seed, request, position) only.

    Args:
        vocab_size: tokens are drawn from ``range(vocab_size)``.
        seed: which trees.
    """

    def __init__(self, vocab_size: int, *, seed: int = 0) -> None:
        _require(vocab_size >= 1, "vocab_size", ">= 1", vocab_size)
        super().__init__()
        self._vocab_size = vocab_size
        self._seed = seed

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._tree(state, budget) for state, budget in zip(states, budgets, strict=True)]

    def _tree(self, state: RequestState, budget: int) -> DraftTree:
        rng = np.random.default_rng((self._seed, zlib.crc32(state.request_id.encode()), state.num_tokens))
        token_ids, parents = [int(state.token_ids[-1])], [-1]
        siblings: set[tuple[int, int]] = set()
        shape = int(rng.integers(3))  # 0 = chain, 1 = star, 2 = bush
        for _ in range(int(rng.integers(0, max(budget, 0) + 1))):
            parent = (len(parents) - 1, 0, int(rng.integers(len(parents))))[shape]
            edge = (parent, int(rng.integers(self._vocab_size)))
            if edge not in siblings:
                siblings.add(edge)
                parents.append(edge[0])
                token_ids.append(edge[1])
        return DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32))


class OracleDrafter(_Forgetful):
    """Drafts outputs that it was told, so that tests choose what is accepted.

    Args:
        outputs: request id -> the whole output of the request.
        vocab_size: wrong tokens stay below it.
        wrong_from: depth (1 = the first draft token) from which on the drafted path is wrong; None = never.
        num_wrong_siblings: wrong nodes beside every drafted node, before it, as far as the budget goes.
    """

    def __init__(
        self,
        outputs: Mapping[str, Sequence[int]],
        vocab_size: int,
        *,
        wrong_from: int | None = None,
        num_wrong_siblings: int = 0,
    ) -> None:
        _require(0 <= num_wrong_siblings < vocab_size - 1, "num_wrong_siblings", "below V - 1", num_wrong_siblings)
        super().__init__()
        self._outputs = outputs
        self._vocab_size = vocab_size
        self._wrong_from = wrong_from
        self._num_wrong_siblings = num_wrong_siblings

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._tree(state, budget) for state, budget in zip(states, budgets, strict=True)]

    def _tree(self, state: RequestState, budget: int) -> DraftTree:
        token_ids, parents = [int(state.token_ids[-1])], [-1]
        parent = 0
        for depth, right in enumerate(self._outputs[state.request_id][state.num_output_tokens :], start=1):
            is_wrong = self._wrong_from is not None and depth >= self._wrong_from
            wrong = [(right + i) % self._vocab_size for i in range(1, self._num_wrong_siblings + 2)]
            level = [*wrong[1:], wrong[0] if is_wrong else right][: budget + 1 - len(parents)]
            token_ids += level
            parents += [parent] * len(level)
            if len(level) <= self._num_wrong_siblings:
                break
            parent = len(parents) - 1
        return DraftTree(np.array(token_ids, dtype=np.int32), np.array(parents, dtype=np.int32))


class ScriptedSampler:
    """Draws the tokens that it was told, one list per step (`specdec.verifier.match.TargetSampler`).

    Args:
        script: per step the target's token after every node of the batch.
    """

    def __init__(self, script: Iterable[Sequence[int]]) -> None:
        self._script = iter(script)
        self.calls: list[tuple[str, object]] = []  # what it was told besides, in order

    def start(self, state: RequestState) -> None:
        self.calls.append(("start", state.request_id))

    def target_ids(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> IntArray:
        return np.array(next(self._script), dtype=np.int32)

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        self.calls.append(("commit", (state.request_id, [int(token_id) for token_id in emitted_ids])))

    def stop(self, request_ids: Sequence[str]) -> None:
        self.calls.append(("stop", list(request_ids)))
