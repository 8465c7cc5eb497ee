"""Prompt lookup: what followed the last tokens where they stood before is guessed to follow again.

Source: prompt lookup decoding (Saxena 2023) and LLMA (Yang et al. 2023, 2304.04487), made incremental and tree-capable.
Every request has its own index over its committed tokens: for each n an open-addressing hash table from n-gram to its
latest end, and for each position a link to the previous end of the same n-gram. The n-gram at the end of the text was
indexed when it was appended, so a lookup follows links and never hashes; a step costs time for the new tokens and the
guess, not for the context.

A guess is a copy that goes on as in Lempel-Ziv 77: where the copied stretch reaches the end of the text it repeats
itself, so a period of three tokens is continued for as long as the budget allows. Several earlier occurrences with
different continuations are merged by prefix into a tree, whose nodes are taken best first.

The value of a node is the product, along its path, of acceptance rates. A rate belongs to a cell: how many tokens the
copy had in common with the text before this node (once the path above is accepted, that is match length + depth - 1),
and how many siblings were taken before it. Rates are running counts over all requests of a tenant, with a prior.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specdec.drafters._ngram_index import MAX_MATCH, NUM_RANKS, count_outcomes, extend, find_copies, grow_tree
from specdec.errors import ConfigError, InternalError
from specdec.protocols import DrafterNeeds
from specdec.tree import FloatArray
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["NgramDrafter"]

_PRIOR_WEIGHT = 8.0  # observations that the prior counts for
# What a step leaves of older observations: half after 700 steps. So rates follow a change of text, and a rate so low
# that nothing is drafted on it any more returns to its prior and is tried again.
_KEPT = 0.999
_MAX_TENANTS = 1024  # whose rates are remembered, 1 KB each
# Room that a request gets beyond its prompt at once; an index that outgrows it is doubled.
_MAX_INITIAL_ROOM = 4096


def _prior_rates() -> FloatArray:
    """[cells] float32: acceptance by tokens in common and rank before anything was observed."""
    strength = np.arange(MAX_MATCH + 1, dtype=np.float64)[:, None] ** 1.5
    rank = np.arange(NUM_RANKS, dtype=np.float64)[None, :]
    # Fitted by eye to 80 recorded replies of coding, SQL, tool and chat models. Measured for 1, 2, 4, 8, 16 and 32
    # tokens in common: .20, .37, .65, .82, .87, .98; this curve: .20, .41, .67, .85, .94, .98. A second guess was right
    # in about a fifth of the remaining cases.
    first = strength / (strength + 4)
    return np.where(rank == 0, first, (1 - first) * 0.2 * 0.8 ** (rank - 1)).astype(np.float32).ravel()


class _Rates:
    """Acceptance rates that one tenant's requests share. Nobody else's drafts tell of them."""

    __slots__ = ("_hits", "_prior", "_tries", "values")

    def __init__(self) -> None:
        self._prior = _prior_rates()
        self._tries = np.zeros_like(self._prior)
        self._hits = np.zeros_like(self._prior)
        self.values = self._prior.copy()  # [cells] float32

    def count(self, nodes: IntArray, truth: IntArray) -> None:
        """Count what became of a draft; see ``count_outcomes``."""
        count_outcomes(nodes, truth, self._tries, self._hits)

    def refresh(self) -> None:
        """Make the rates of the counts, then let the counts fade."""
        self.values = (self._hits + _PRIOR_WEIGHT * self._prior) / (self._tries + _PRIOR_WEIGHT)
        self._tries *= _KEPT
        self._hits *= _KEPT


class _Index:
    """What the drafter keeps of one request."""

    __slots__ = ("drafted", "latest", "num_indexed", "previous", "rates")

    def __init__(self, rates: _Rates, num_orders: int, capacity: int) -> None:
        self.rates = rates
        self.drafted: IntArray | None = None  # nodes of the last tree, until its outcome is observed
        self.allocate(num_orders, capacity)

    def allocate(self, num_orders: int, capacity: int) -> None:
        """Make room for ``capacity`` tokens; what was indexed is forgotten."""
        self.num_indexed = 0
        self.previous = np.zeros((num_orders, capacity), dtype=np.int32)
        # At most half full, as a position adds at most one n-gram of each order.
        self.latest = np.zeros((num_orders, 1 << (2 * capacity - 1).bit_length()), dtype=np.int32)


class NgramDrafter:
    """Guesses that text repeats itself; needs no model (`specdec.protocols.Drafter`).

    With ``max_branches=1`` it is the classic prompt lookup: one chain.

    Args:
        min_n: shortest n-gram to look for, >= 1.
        max_n: longest n-gram to look for, from min_n to 16; of the places found the one that has most in common with
            the text (up to 32 tokens) counts most.
        max_draft_tokens: longest path of a tree, >= 1; the budget limits the number of nodes.
        max_branches: most earlier places that one tree copies from, >= 1.
        max_candidates: earlier places that a lookup compares, >= max_branches.
        min_value: nodes whose expected chance of acceptance is below this are not drafted, in [0, 1]; 0 = off. On
            recorded replies the defaults brought a mean acceptance length of 2.1 for 3.9 drafted tokens per step
            (budget 8), and ``min_n=2, min_value=0`` 1.9 for 3.0.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        min_n: int = 1,
        max_n: int = 4,
        max_draft_tokens: int = 32,
        max_branches: int = 4,
        max_candidates: int = 8,
        min_value: float = 0.05,
    ) -> None:
        for ok, name, rule, value in (
            (min_n >= 1, "min_n", ">= 1", min_n),
            (min_n <= max_n <= 16, "max_n", f"in [min_n, 16] with min_n = {min_n}", max_n),
            (max_draft_tokens >= 1, "max_draft_tokens", ">= 1", max_draft_tokens),
            (max_branches >= 1, "max_branches", ">= 1", max_branches),
            (max_candidates >= max_branches, "max_candidates", f">= max_branches = {max_branches}", max_candidates),
            (0 <= min_value <= 1, "min_value", "in [0, 1]", min_value),
        ):
            if not ok:
                raise ConfigError(f"{name} must be {rule}, got {value}")
        self.needs = DrafterNeeds()
        self._min_n = min_n
        self._num_orders = max_n - min_n + 1
        self._max_depth = max_draft_tokens
        self.min_value = float(min_value)
        self._limits = (max_candidates, max_branches)
        self._indexes: dict[str, _Index] = {}
        self._rates: OrderedDict[str, _Rates] = OrderedDict()  # by tenant, the one that was served last at the end

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            room = min(state.request.sampling.max_new_tokens, _MAX_INITIAL_ROOM)
            rates = self._rates.setdefault(state.request.tenant, _Rates())
            self._rates.move_to_end(state.request.tenant)
            self._indexes[state.request_id] = index = _Index(rates, self._num_orders, state.num_tokens + room)
            self._catch_up(index, state)
        while len(self._rates) > _MAX_TENANTS:  # a live request goes on with the rates that it holds
            self._rates.popitem(last=False)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            index = self._indexes.get(state.request_id)
            if index is None:
                raise InternalError(f"request {state.request_id!r} was not started")
            index.drafted = None
            if budget < 1:
                trees.append(DraftTree.root_only(int(state.token_ids[-1])))
                continue
            token_ids = self._catch_up(index, state)
            copies = find_copies(token_ids, index.previous, self._min_n, self._limits)
            limits = (int(budget), self._max_depth, self.min_value)
            nodes, values = grow_tree(token_ids, copies, limits, index.rates.values)
            if nodes.shape[1] > 1:
                index.drafted = nodes
            trees.append(DraftTree(nodes[0], nodes[1], values))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        # The tree that was verified may be a pruned or fused one; what the target chose judges our own tree as well.
        touched: dict[int, _Rates] = {}
        for event in events:
            index = self._indexes.get(event.state.request_id)
            if index is None:
                continue
            rates = touched.setdefault(id(index.rates), index.rates)
            if index.drafted is None:
                continue
            truth = np.append(event.result.accepted_ids, np.int32(event.result.bonus_id)).astype(np.int32, copy=False)
            rates.count(index.drafted, truth)
            index.drafted = None
        for rates in touched.values():
            rates.refresh()

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._indexes.pop(request_id, None)

    @property
    def nbytes(self) -> int:
        """Bytes that the indexes of the live requests take."""
        return sum(index.latest.nbytes + index.previous.nbytes for index in self._indexes.values())

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        text = np.zeros(4, dtype=np.int32)
        index = _Index(_Rates(), self._num_orders, len(text))
        extend(text, 0, self._min_n, index.latest, index.previous)
        copies = find_copies(text, index.previous, self._min_n, self._limits)
        nodes, _ = grow_tree(text, copies, (1, self._max_depth, self.min_value), index.rates.values)
        index.rates.count(nodes, text[:1])

    def _catch_up(self, index: _Index, state: RequestState) -> npt.NDArray[np.int32]:
        """Index the committed tokens that are new, and return all."""
        token_ids = state.token_ids
        if len(token_ids) > index.previous.shape[1]:
            # Doubled and indexed anew: amortised over the tokens that fill it, a constant per token.
            index.allocate(self._num_orders, 2 * len(token_ids))
        extend(token_ids, index.num_indexed, self._min_n, index.latest, index.previous)
        index.num_indexed = len(token_ids)
        return token_ids
