"""The target that verifies batches of token trees: a Hugging Face causal LM over specdec's own KV pool.

The model is not changed: its attention implementation is ours only while a step of ours runs, so ``model.generate``
and everything else work on the same object between steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from specdec.attention import IMPLEMENTATION, StepAttention, TailMasks, active
from specdec.errors import ConfigError, InternalError
from specdec.kv_cache import CallShape, GroupKey, Keep, KVPool
from specdec.prefix_cache import PrefixCache
from specdec.query_layout import QueryLayout
from specdec.readings import HiddenStates, Successors
from specdec.types import Chunk, IntArray, RequestState, TargetOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.probe import CallSpec

__all__ = ["TreeTarget", "group_key", "kv_bytes_per_token"]


def group_key(call: CallSpec) -> GroupKey:
    """The KV group of an attention call: calls that forget alike share slots."""
    if call.mask_kind == "other":
        raise InternalError(f"attention call {call.layer_name} has a mask that the tree target does not know")
    return (call.mask_kind, call.window or 0)


def kv_bytes_per_token(calls: Sequence[CallSpec], dtype: torch.dtype) -> int:
    """Bytes of K and V that one token takes over all attention calls."""
    return sum(c.num_kv_heads * (c.key_dim + c.value_dim) for c in calls) * dtype.itemsize


class TreeTarget:
    """A ``TargetModel`` over any causal LM whose attention goes through transformers' attention interface.

    Args:
        model: in evaluation mode; on one device.
        calls: what the probe saw, one entry per attention call of a forward.
        kv_tokens: tokens that the pool holds over all requests.
        max_length: most tokens of one request.
        max_batch_size: most requests held at a time.
        max_step_tokens: most query tokens of one step.
        is_strict: attention gives a query the same bits whatever else is in the step; for models on the CPU whose
            attention has no soft-cap, no sinks, and values as wide as keys.
        hidden_layers: whose states drafters read, as indices into ``output_hidden_states``; all different.
        keeps_prefixes: K/V of finished requests serves later ones that begin alike; not where drafters read states,
            which they need of every token.
        num_successors: likeliest next tokens that drafters read after prefix tokens; 0: none, and none are scored.

    Raises:
        ConfigError: a size is below 1, or the model is in training mode.
    """

    supports_trees = True
    max_draft_tokens = 256

    def __init__(
        self,
        model: PreTrainedModel,
        calls: Sequence[CallSpec],
        *,
        kv_tokens: int,
        max_length: int,
        max_batch_size: int,
        max_step_tokens: int,
        is_strict: bool = False,
        hidden_layers: tuple[int, ...] = (),
        keeps_prefixes: bool = False,
        num_successors: int = 0,
    ) -> None:
        if model.training:
            raise ConfigError("the model must be in evaluation mode: call model.eval() first, or dropout would act")
        for name, value in (
            ("kv_tokens", kv_tokens),
            ("max_length", max_length),
            ("max_batch_size", max_batch_size),
            ("max_step_tokens", max_step_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        self.model = model
        self.is_strict = is_strict
        self.calls = tuple(calls)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_length = max_length
        self.hidden_layers = tuple(dict.fromkeys(hidden_layers))
        self.num_successors = min(num_successors, self.vocab_size)
        self.device = model.device
        self.dtype = _kv_dtype(model)
        self.pool = KVPool(
            [(group_key(c), CallShape(c.num_kv_heads, c.key_dim, c.value_dim)) for c in calls],
            kv_tokens,
            num_live_requests=max_batch_size,
            num_step_tokens=max_step_tokens + max_batch_size * (self.max_draft_tokens + 1),
            dtype=self.dtype,
            device=self.device,
        )
        self.prefixes = PrefixCache(self.pool) if keeps_prefixes and not hidden_layers else None
        self._num_query_groups = [c.num_query_heads // c.num_kv_heads for c in calls]
        self._masks: dict[tuple[GroupKey, int], TailMasks] = {}
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        # A ready 4-D mask goes through every mask builder untouched; without one, each forward looks for packed
        # sequences in the position ids, which costs a synchronisation.
        self._dummy_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self._configs = _attention_configs(model)
        # Compiled here, so that no request waits for it.
        empty = np.empty(0, dtype=np.int64)
        _expand(empty.reshape(0, 3), empty.astype(np.int32), empty, empty.astype(np.bool_), empty)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_tokens

    def has_room(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_free + (self.prefixes.num_tokens if self.prefixes else 0)

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        expected = self._expected_length(state)
        if self.prefixes and not state.num_cached:  # a newcomer should find a run that is long enough
            while self.pool.num_free < expected and self.prefixes.drop_oldest():
                pass
        while not self.pool.reserve(state.request_id, num_tokens, expected):
            if not (self.prefixes and self.prefixes.drop_oldest()):
                return False
        return True

    def recall(self, state: RequestState) -> int:
        return self.prefixes.recall(state, self._expected_length(state)) if self.prefixes is not None else 0

    def retire(self, state: RequestState) -> None:
        if self.prefixes is None:
            self.release(state)
        else:
            self.prefixes.keep(state)

    def release(self, state: RequestState) -> None:
        self.pool.release(state.request_id)
        if self.prefixes is not None:
            self.prefixes.forget(state.request_id)

    def _expected_length(self, state: RequestState) -> int:
        sampling = state.request.sampling
        return min(state.num_prompt_tokens + sampling.max_new_tokens, self.max_length) + self.max_draft_tokens

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        batch = _flatten(chunks)
        is_asked = self.num_successors > 0 and any(len(chunk.prefix_ids) for chunk in chunks)
        places = _last_places(chunks) if is_asked else []
        rows = np.concatenate([batch.tree_rows, *places]) if places else batch.tree_rows
        logits, hidden = self.run(batch.layouts, batch.input_ids, batch.positions, rows)
        successors = self._successors(batch.input_ids, places, logits[len(batch.tree_rows) :])
        logits = logits[: len(batch.tree_rows)]
        if hidden is None:
            return TargetOutput(logits, batch.cu_nodes, successors=successors)
        states = HiddenStates(self.hidden_layers, hidden)
        return TargetOutput(logits, batch.cu_nodes, states, batch.tree_rows, successors)

    def _successors(
        self, input_ids: npt.NDArray[np.int64], places: Sequence[npt.NDArray[np.int64]], logits: torch.Tensor
    ) -> list[Successors]:
        """Of each chunk the likeliest next tokens at its ``places`` in the flat row, whose ``logits`` lie in order."""
        if len(logits) == 0:
            return []
        next_ids = torch.topk(logits, self.num_successors, dim=-1).indices.cpu().numpy().astype(np.int32)
        parts = np.split(next_ids, np.cumsum([len(rows) for rows in places])[:-1])
        return [Successors(input_ids[rows].astype(np.int32), part) for rows, part in zip(places, parts, strict=True)]

    @torch.inference_mode()
    def run(
        self,
        layouts: Sequence[QueryLayout],
        input_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        logit_rows: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One forward over a flat row of query tokens, whose slots have been reserved.

        Args:
            layouts: the requests in flat order.
            input_ids: [T].
            positions: [T] absolute.
            logit_rows: [L] indices in the flat row.

        Returns:
            [L, V] logits, and the states of ``hidden_layers`` at all query tokens, [T, layers * E], or None. The K/V
            of all query tokens are written.

        Raises:
            InternalError: the model gives no hidden states, or makes other attention calls than the probe saw.
        """
        step = StepAttention(
            self.pool, layouts, self._num_query_groups, dtype=self.dtype, device=self.device, masks=self._masks,
            is_strict=self.is_strict,
        )  # fmt: skip
        rows = torch.from_numpy(logit_rows).to(self.device)
        options: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_logits else {}
        if self.hidden_layers:
            options["output_hidden_states"] = True
        with active(step), self._our_attention():
            out = self.model(
                input_ids=torch.from_numpy(input_ids)[None].to(self.device),
                position_ids=torch.from_numpy(positions)[None].to(self.device),
                attention_mask=self._dummy_mask,
                use_cache=False,
                **options,
            )
        if step.num_calls != len(self.calls):
            raise InternalError(f"the forward made {step.num_calls} attention calls, the probe saw {len(self.calls)}")
        logits: torch.Tensor = out.logits[0] if self._keeps_logits else out.logits[0, rows]
        if not self.hidden_layers:
            return logits, None
        if not out.hidden_states or max(self.hidden_layers) >= len(out.hidden_states):
            num_states = len(out.hidden_states or ())
            raise InternalError(f"states {self.hidden_layers} were asked for, the model gives {num_states}")
        return logits, torch.cat([out.hidden_states[layer][0] for layer in self.hidden_layers], dim=-1)

    @torch.inference_mode()
    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        keeps = []
        for chunk, nodes in zip(chunks, keep, strict=True):
            num_prefix = len(chunk.prefix_ids)
            keeps.append(Keep(chunk.state.request_id, num_prefix, np.array(nodes, dtype=np.int32) + num_prefix))
        self.pool.commit(keeps)

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = IMPLEMENTATION
        try:
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = implementation


def _last_places(chunks: Sequence[Chunk]) -> list[npt.NDArray[np.int64]]:
    """Where in the flat row each different token of a chunk's prefix stands last."""
    places, start = [], 0
    for chunk in chunks:
        backwards = chunk.prefix_ids[::-1]
        _, first = np.unique(backwards, return_index=True)
        places.append(start + len(backwards) - 1 - first.astype(np.int64))
        start += chunk.num_tokens
    return places


def _kv_dtype(model: PreTrainedModel) -> torch.dtype:
    dtype = model.dtype
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct config object that a module of the model may read its attention implementation from."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


@dataclass(frozen=True, slots=True, eq=False)
class _FlatBatch:
    """All chunks of a step as one row of T tokens."""

    layouts: list[QueryLayout]
    input_ids: npt.NDArray[np.int64]  # [T]
    positions: npt.NDArray[np.int64]  # [T]
    tree_rows: npt.NDArray[np.int64]  # flat rows of the trees' nodes, tree after tree
    cu_nodes: IntArray  # [trees + 1]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _expand(
    spans: npt.NDArray[np.int64],
    parents: IntArray,
    positions: npt.NDArray[np.int64],
    ancestors: npt.NDArray[np.bool_],
    tree_rows: npt.NDArray[np.int64],
) -> int:
    """Positions and ancestors of a flat batch, in one pass.

    Args:
        spans: [R, 3] int64: context length, prefix tokens and tree nodes of each chunk.
        parents: the trees' parents, tree after tree.
        positions: [T] int64, written: context length + depth in the chunk.
        ancestors: [sum of T_r * T_r] bool, all False, written: per chunk a matrix, (i, j) True if j is i or above it.
        tree_rows: [nodes] int64, written: the flat rows of the trees' nodes.

    Returns:
        -1, or the first node (among all trees' nodes) whose parent is not a node before it in its own tree.
    """
    start = 0
    first_node = 0
    first_bit = 0
    for chunk in range(len(spans)):
        num_cached, num_prefix, num_nodes = spans[chunk]
        num_tokens = num_prefix + num_nodes
        for token in range(num_tokens):
            above = token - 1
            node = token - num_prefix
            if node >= 0:
                tree_rows[first_node + node] = start + token
                parent = parents[first_node + node]
                if (parent != -1 if node == 0 else parent < 0) or parent >= node:
                    return int(first_node + node)
                above = num_prefix + parent
            row = first_bit + token * num_tokens
            if above >= 0:
                positions[start + token] = positions[start + above] + 1
                for column in range(above + 1):
                    ancestors[row + column] = ancestors[first_bit + above * num_tokens + column]
            else:
                positions[start + token] = num_cached
            ancestors[row + token] = True
        start += num_tokens
        first_node += num_nodes
        first_bit += num_tokens * num_tokens
    return -1


def _flatten(chunks: Sequence[Chunk]) -> _FlatBatch:
    """Lay the chunks out one after the other.

    Raises:
        InternalError: a tree's parents break their rule.
    """
    ids: list[IntArray] = []
    parents: list[IntArray] = [np.empty(0, dtype=np.int32)]
    spans: list[tuple[int, int, int]] = []
    cu_nodes = [0]
    for chunk in chunks:
        ids.append(chunk.prefix_ids)
        if chunk.tree is not None:
            ids.append(chunk.tree.token_ids)
            parents.append(chunk.tree.parents)
            cu_nodes.append(cu_nodes[-1] + len(chunk.tree))
        spans.append((chunk.state.num_cached, len(chunk.prefix_ids), chunk.num_tokens - len(chunk.prefix_ids)))
    input_ids = np.concatenate(ids, dtype=np.int64)
    positions = np.empty_like(input_ids)
    ancestors = np.zeros(sum((prefix + nodes) ** 2 for _, prefix, nodes in spans), dtype=np.bool_)
    tree_rows = np.empty(cu_nodes[-1], dtype=np.int64)
    bad: int = _expand(np.array(spans, dtype=np.int64), np.concatenate(parents), positions, ancestors, tree_rows)
    if bad >= 0:
        raise InternalError(
            f"a draft tree must have parents[0] = -1 and 0 <= parents[i] < i, but node {bad} of the "
            f"step's trees has parent {np.concatenate(parents)[bad]}"
        )
    layouts: list[QueryLayout] = []
    start = first_bit = 0
    for chunk, (num_cached, num_prefix, num_nodes) in zip(chunks, spans, strict=True):
        size = num_prefix + num_nodes
        matrix = ancestors[first_bit : first_bit + size * size].reshape(size, size)
        layouts.append(
            QueryLayout(chunk.state.request_id, start, size, num_cached, positions[start : start + size], matrix)
        )
        start += size
        first_bit += size * size
    return _FlatBatch(layouts, input_ids, positions, tree_rows, np.array(cu_nodes, dtype=np.int32))
