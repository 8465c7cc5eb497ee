"""Early pruning inside verification: draft tokens that cannot win leave the forward half-way.

After a chosen layer the final norm and the head are applied to the states (a logit lens). A draft token that at least
``rank`` others beat at its parent is declared rejected: it and everything behind it are dropped, and the remaining
layers run over fewer rows. Under the match rule this is exact: the target's own token at every kept node still comes
from the full depth, and a dropped node is one that was not drafted. Only acceptance can be lost.

The probe costs a head over the nodes that have children, so it runs only in steps for which the cost model says that
the rows which it usually drops are worth more; otherwise in one step of ``_TRY_EVERY``, to know.

Source: FASER (2604.20503), token-wise early exit; the exactness under match is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from specdec.attention import StepAttention
from specdec.cost_model import CostModel
from specdec.errors import ConfigError, UnsupportedError
from specdec.readings import Successors
from specdec.types import Chunk, DraftTree, TargetOutput

__all__ = ["EarlyExit", "PrunedForward", "Pruning", "surviving_nodes"]

# (the attention of a forward, the rows whose logits are wanted) -> a context around the forward
Pruning: TypeAlias = Callable[[StepAttention, torch.Tensor], AbstractContextManager[None]]
_TRY_EVERY = 64
_NEWEST = 0.1  # share of a new observation
_FIRST_SHARE = 0.1  # of draft rows that are believed to drop before it was tried


def surviving_nodes(tree: DraftTree, is_beaten: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The nodes that are left when beaten ones go with everything behind them; the root always stays."""
    alive = ~is_beaten
    alive[0] = True
    for node in range(1, len(tree)):
        alive[node] &= alive[tree.parents[node]]
    return np.flatnonzero(alive)


class EarlyExit:
    """Prunes one model's verification.

    Args:
        model: a causal LM of transformers with ``model.layers``, ``model.norm`` and an output head.
        layer: how many layers have run when the probe looks, in [1, layers - 1].
        rank: so many better tokens mean rejection, >= 1.
        costs: what rows cost; None: the probe always runs.

    Raises:
        ConfigError: an option is outside its rule.
        UnsupportedError: the model is built otherwise.
    """

    def __init__(self, model: Any, *, layer: int, rank: int = 64, costs: CostModel | None = None) -> None:
        body = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "model", None)
        layers, norm = getattr(body, "layers", None), getattr(body, "norm", None)
        if layers is None or norm is None or model.get_output_embeddings() is None:
            raise UnsupportedError(f"{type(model).__name__} has no layers, norm and head that a probe could use")
        if not 1 <= layer < len(layers):
            raise ConfigError(f"layer must be in [1, {len(layers) - 1}], got {layer}")
        if rank < 1:
            raise ConfigError(f"rank must be >= 1, got {rank}")
        self._model, self._norm, self._layers = model, norm, list(layers)
        self._layer, self._rank, self._costs = layer, rank, costs
        self._dropped_share = _FIRST_SHARE
        self._probe_ms = 0.0  # per node that has children
        self._num_steps = 0
        self.num_dropped = 0

    def plan(self, chunks: Sequence[Chunk], tree_rows: npt.NDArray[np.int64]) -> PrunedForward | None:
        """The pruning of a step, or None where it would not pay.

        Args:
            chunks: of the step.
            tree_rows: [nodes] flat rows of the trees' nodes, tree after tree.
        """
        trees = [chunk.tree for chunk in chunks if chunk.tree is not None]
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        context = sum(chunk.state.num_cached for chunk in chunks) / len(chunks)
        return PrunedForward(self, trees, tree_rows) if self.is_worth_it(trees, num_tokens, context) else None

    def is_worth_it(self, trees: Sequence[DraftTree], num_tokens: int, context: float) -> bool:
        """True if the probe should run in this step.

        Args:
            trees: that are verified.
            num_tokens: query tokens of the step.
            context: mean length.
        """
        drafted = sum(tree.num_draft_tokens for tree in trees)
        if drafted == 0:
            return False
        self._num_steps += 1
        if self._costs is None or not self._probe_ms or self._num_steps % _TRY_EVERY == 0:
            return True
        fewer = num_tokens - self._dropped_share * drafted
        whole, less = self._costs.tables["target"].curve([num_tokens, fewer], context, len(trees))
        rest = 1 - self._layer / len(self._layers)
        inner = sum(len(set(tree.parents[1:].tolist())) for tree in trees)
        return bool((whole - less) * rest > self._probe_ms * inner)

    @contextmanager
    def pruning(
        self,
        step: StepAttention,
        trees: Sequence[DraftTree],
        tree_rows: npt.NDArray[np.int64],
        logit_rows: torch.Tensor,
    ) -> Iterator[list[npt.NDArray[np.int64]]]:
        """Prune the forward that runs inside; yields a list that holds each tree's surviving nodes afterwards.

        Args:
            step: the forward's attention.
            trees: of the step.
            tree_rows: [nodes] flat rows of their nodes, tree after tree.
            logit_rows: [L] flat rows whose logits are wanted; rewritten in place to where they are after pruning. Rows
                of dropped nodes point to some other row.
        """
        kept: list[npt.NDArray[np.int64]] = []
        alive: list[torch.Tensor] = []  # the kept flat rows, once they are known

        def probe(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            start = perf_counter()
            kept.extend(self._look(hidden[0], trees, tree_rows))
            drafted = sum(tree.num_draft_tokens for tree in trees)
            inner = sum(len(set(tree.parents[1:].tolist())) for tree in trees)
            self._note(drafted, sum(map(len, trees)) - sum(map(len, kept)), inner, 1e3 * (perf_counter() - start))
            rows = _flat_rows(hidden.shape[1], trees, kept, tree_rows)
            if len(rows) < hidden.shape[1]:
                step.keep_rows(rows)
                alive.append(torch.from_numpy(rows).to(hidden.device))
                place = torch.zeros(hidden.shape[1], dtype=torch.long, device=hidden.device)
                place[alive[0]] = torch.arange(len(rows), device=hidden.device)
                logit_rows.copy_(place[logit_rows])
                args = (hidden[:, alive[0]], *args[1:]) if args else args
                kwargs = kwargs if args else {**kwargs, "hidden_states": hidden[:, alive[0]]}
            return args, kwargs

        def narrow(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if not alive:
                return args, kwargs
            narrowed = dict(kwargs)
            if kwargs.get("position_embeddings") is not None:
                narrowed["position_embeddings"] = tuple(part[:, alive[0]] for part in kwargs["position_embeddings"])
            if kwargs.get("position_ids") is not None:
                narrowed["position_ids"] = kwargs["position_ids"][:, alive[0]]
            return args, narrowed

        hooks = [self._layers[self._layer].register_forward_pre_hook(probe, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in self._layers[self._layer :]]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def _look(
        self, hidden: torch.Tensor, trees: Sequence[DraftTree], tree_rows: npt.NDArray[np.int64]
    ) -> list[npt.NDArray[np.int64]]:
        """The surviving nodes of every tree by the logit lens; ``hidden`` is [T, E]."""
        parents, token_ids, first = [], [], 0
        for tree in trees:
            parents.append(tree_rows[first + tree.parents[1:]])
            token_ids.append(tree.token_ids[1:])
            first += len(tree)
        rows, which = np.unique(np.concatenate(parents), return_inverse=True)
        states = hidden[torch.from_numpy(rows).to(hidden.device)]
        logits = self._model.get_output_embeddings()(self._norm(states))  # [P, V]
        where = torch.from_numpy(which).to(hidden.device)
        tokens = torch.from_numpy(np.concatenate(token_ids).astype(np.int64)).to(hidden.device)
        own = logits[where, tokens]
        ranks = torch.stack([(logits[w] > score).sum() for w, score in zip(where.tolist(), own, strict=True)])
        is_beaten = (ranks >= self._rank).cpu().numpy()
        found, first = [], 0
        for tree in trees:
            last = first + tree.num_draft_tokens
            found.append(surviving_nodes(tree, np.append(False, is_beaten[first:last])))
            first = last
        return found

    def _note(self, drafted: int, dropped: int, inner: int, ms: float) -> None:
        self.num_dropped += dropped
        self._dropped_share += _NEWEST * (dropped / drafted - self._dropped_share)
        each = ms / inner
        self._probe_ms = each if not self._probe_ms else self._probe_ms + _NEWEST * (each - self._probe_ms)


class PrunedForward:
    """One step that is pruned.

    Args:
        early: how.
        trees: of the step.
        tree_rows: [nodes] flat rows of their nodes, tree after tree.
    """

    def __init__(self, early: EarlyExit, trees: Sequence[DraftTree], tree_rows: npt.NDArray[np.int64]) -> None:
        self._early, self._trees, self._tree_rows = early, trees, tree_rows
        self.kept: list[npt.NDArray[np.int64]] = []

    @contextmanager
    def around(self, step: StepAttention, logit_rows: torch.Tensor) -> Iterator[None]:
        """Entered around the forward; see ``EarlyExit.pruning``."""
        with self._early.pruning(step, self._trees, self._tree_rows, logit_rows) as self.kept:
            yield

    def output(self, logits: torch.Tensor, successors: Sequence[Successors]) -> TargetOutput:
        """What is left, from the logits [nodes, V] of all nodes, those of dropped ones without meaning."""
        starts = np.cumsum([0, *(len(tree) for tree in self._trees)])
        chosen = np.concatenate([first + nodes for first, nodes in zip(starts, self.kept, strict=False)])
        cu_nodes = np.cumsum([0, *(len(nodes) for nodes in self.kept)]).astype(np.int32)
        rows = logits[torch.from_numpy(chosen).to(logits.device)]
        return TargetOutput(rows, cu_nodes, successors=successors, kept_nodes=self.kept)


def _flat_rows(
    num_rows: int, trees: Sequence[DraftTree], kept: Sequence[npt.NDArray[np.int64]], tree_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The flat rows that go on: all but those of dropped nodes."""
    goes_on = np.ones(num_rows, dtype=np.bool_)
    goes_on[tree_rows] = False
    first = 0
    for tree, nodes in zip(trees, kept, strict=True):
        goes_on[tree_rows[first + nodes]] = True
        first += len(tree)
    return np.flatnonzero(goes_on)
