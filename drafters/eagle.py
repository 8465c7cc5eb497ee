"""Drafts with a head on the target's states: dynamic trees, its cache refreshed with true states in every step.

Row t of the head's cache pairs the target's state at token t with token t + 1. A step first reads the rows of all
tokens that the target has cached since the last one; the output of the last of them gives the first level. Deeper
levels run on the head's own outputs, in rows that are dropped when the tree is done (EAGLE-2, Li et al. 2024,
arXiv 2406.16858, section 4; positions as there: one less than the token's own). EAGLE heads and a target's own
multi-token-prediction layers (`specdec.drafters.mtp`) are such heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, from_numpy

from specdec.attention import AttentionStep, StepAttention, TailMasks
from specdec.drafters.draft_costs import DraftCosts
from specdec.drafters.growing import GrowingCache, Growth
from specdec.drafters.head_runner import head_runner
from specdec.drafters.levels import MAX_KERNEL_K, Scores, Words, pack_best, search_trees
from specdec.drafters.state_head import StateHead
from specdec.drafters.state_reader import PIECE, StateReader
from specdec.drafters.tree_search import SearchLimits, TreeSearch
from specdec.errors import ConfigError
from specdec.kernels.launch import Backend, uses_triton
from specdec.kv_cache import GroupKey, KVPool
from specdec.protocols import DrafterNeeds
from specdec.step_buffers import Outputs, Step
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["EagleDrafter"]


class EagleDrafter:
    """Drafts trees with a head such as EAGLE's (`specdec.protocols.Drafter`).

    Args:
        head: its weights and arithmetic.
        vocab_size: of the target.
        top_k: children per node and nodes expanded per level; 10 in the published code.
        depth: longest path; the published code's depth is one less, as it does not count the first level.
        min_gain: stop growing once a level adds no more than this to the expected acceptance length; 0: never. "auto":
            the measured costs decide, and the first few steps grow to the full depth.
        kv_tokens: rows that the head's cache holds over all requests.
        max_requests: most requests at a time.
        kernels: who attends; see ``specdec.kernels.launch.uses_triton``.
        graphs: capture the head's forwards as CUDA graphs where there are any.

    Raises:
        ConfigError: an option is outside its rule.
        RuntimeError: Triton was asked for by name and cannot run on the head's device.
    """

    def __init__(
        self,
        head: StateHead,
        *,
        vocab_size: int,
        top_k: int = 10,
        depth: int = 6,
        min_gain: float | str = 0.0,
        kv_tokens: int = 65_536,
        max_requests: int = 64,
        kernels: Backend = "auto",
        graphs: bool = True,
    ) -> None:
        sizes = (("top_k", top_k), ("depth", depth), ("kv_tokens", kv_tokens), ("max_requests", max_requests))
        for name, value in sizes:
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if min_gain != "auto" and (isinstance(min_gain, str) or not min_gain >= 0):
            raise ConfigError(f"min_gain must be auto or >= 0, got {min_gain}")
        self.head = head
        head.pack()
        self.needs = DrafterNeeds(hidden_layers=head.hidden_layers, needs_match=True)
        self._vocab_size = vocab_size
        self._words = None if head.target_ids is None else Words(head.target_ids, vocab_size)
        self._limits = SearchLimits(top_k, top_k, depth, None if isinstance(min_gain, str) else min_gain or None)
        self._costs = DraftCosts() if min_gain == "auto" else None
        self._num_query_groups = [call.num_query_groups for call in head.calls]
        self._cache = GrowingCache(
            KVPool(
                [(call.group, call.shape) for call in head.calls], kv_tokens, num_live_requests=max_requests,
                num_step_tokens=PIECE, dtype=head.dtype, device=head.device,
                keep_runs=False if uses_triton(kernels, head.device) else None,
            )
        )  # fmt: skip
        self._runner = head_runner(
            self._cache.pool, self._run_head, kernels=kernels, graphs=graphs, max_requests=max_requests,
            max_tree=top_k * depth, state_width=head.width, name="an EAGLE head",
        )  # fmt: skip
        self._masks: dict[tuple[GroupKey, int], TailMasks] = {}
        self._reader = StateReader(self._cache, head.hidden_layers)

    @property
    def named_weights(self) -> Mapping[str, Tensor]:
        """The head's own tensors by their names in a checkpoint; what is copied into them holds from the next round."""
        return self.head.weights

    @property
    def num_used(self) -> int:
        """Cache slots taken; 0 when no request is held."""
        return self._cache.pool.num_used

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing: a prompt is read when the target has."""

    @torch.inference_mode()
    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        # Without a budget the states are kept unread: a draft of theirs may never be wanted.
        ready = [row for row in self._reader.take(states) if budgets[row] > 0]
        outputs = self._reader.read([states[row] for row in ready], self._read)
        rows = [row for row in ready if row in {ready[i] for i in outputs}]
        if not rows:
            return trees
        drafting = [states[row] for row in rows]
        last = _joined([outputs[ready.index(row)] for row in rows])
        limits = self._limits if self._costs is None else replace(self._limits, costs=self._costs.costs)
        searches = [TreeSearch(int(states[row].token_ids[-1]), budgets[row], limits) for row in rows]
        grown = self._search(drafting, searches, last)
        self._cache.drop([state.request_id for state in drafting])
        for row, tree in zip(rows, grown, strict=True):
            trees[row] = tree
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn what a step costs."""
        if self._costs is not None:
            self._costs.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._reader.release(request_ids)

    def _read(self, growths: Sequence[Growth], states: Tensor) -> Mapping[int, Outputs]:
        """By its place in the flat row, what the head makes of each request's last row."""
        ends = np.cumsum([len(growth.token_ids) for growth in growths]) - 1
        made = self._forward(growths, self.head.fuse(states), ends)
        assert made.hidden is not None
        parts = (made.logits, made.hidden[from_numpy(ends).to(made.hidden.device)], made.best)
        # Copies: the next forward may overwrite a graph's outputs.
        rows = [[None] * len(ends) if part is None else part.clone().unbind(0) for part in parts]
        return {end: Outputs(*row) for end, row in zip(ends.tolist(), zip(*rows, strict=True), strict=True)}

    def _search(self, states: Sequence[RequestState], searches: Sequence[TreeSearch], last: Outputs) -> list[DraftTree]:
        outputs = last.hidden  # [rows of the last logits, H]
        num_levels, begin = 0, perf_counter()

        def grow(growths: Sequence[Growth], parent_rows: npt.NDArray[np.int64]) -> Scores | None:
            nonlocal outputs, num_levels
            num_levels += 1
            if not self._cache.reserve(growths):
                return None
            assert outputs is not None
            inputs = self.head.feedback(outputs.index_select(0, from_numpy(parent_rows).to(outputs.device)))
            made = self._forward(growths, inputs, np.arange(len(inputs)))
            outputs = made.hidden
            return Scores(made.logits, made.best)

        first = Scores(last.logits, last.best)
        trees = search_trees(states, searches, first, self._limits.top_k, grow, self._words)
        if self._costs is not None:
            self._costs.searched(perf_counter() - begin, num_levels)
        return trees

    def _logits(self, outputs: Tensor) -> Tensor:
        logits = self.head.logits(outputs)
        return logits if self._words is not None else logits[:, : self._vocab_size]

    def _forward(self, growths: Sequence[Growth], inputs: Tensor, logit_rows: npt.NDArray[np.int64]) -> Outputs:
        """One pass of the head over new rows, whose slots are reserved; ``hidden`` are its outputs [T, H]."""
        layouts, positions = self._cache.lay_out(growths)
        ids = np.concatenate([growth.token_ids for growth in growths], dtype=np.int64)
        if self._runner is not None:
            return self._runner.run(Step(layouts, ids, positions, logit_rows, inputs))
        step = StepAttention(
            self._cache.pool, layouts, self._num_query_groups, dtype=self.head.dtype, device=self.head.device,
            masks=self._masks,
        )  # fmt: skip
        token_ids, where, rows = (from_numpy(numbers).to(self.head.device) for numbers in (ids, positions, logit_rows))
        outputs = self.head.forward(token_ids, inputs, where, step.attend)
        return Outputs(self._logits(outputs.index_select(0, rows)), outputs)

    def _run_head(
        self,
        step: AttentionStep,
        input_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        *,
        states: Tensor | None = None,
    ) -> Outputs:
        """All that a level costs the device: the layer, the vocabulary's product, and the likeliest words."""
        assert states is not None
        outputs = self.head.forward(input_ids, states, positions, step.attend)
        logits = self._logits(outputs.index_select(0, logit_rows))
        count = min(self._limits.top_k, logits.shape[1])
        best = pack_best(logits, count, backend="triton") if count <= MAX_KERNEL_K else None
        return Outputs(logits, outputs, best)


def _joined(rows: Sequence[Outputs]) -> Outputs:
    """Single rows as one."""
    logits, hidden, best = (
        None if parts[0] is None else torch.stack([part for part in parts if part is not None])
        for parts in zip(*rows, strict=True)
    )
    assert logits is not None
    return Outputs(logits, hidden, best)
