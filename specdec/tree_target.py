"""The target that verifies batches of token trees: a Hugging Face causal LM over specdec's own KV pool.

The model is not changed: its attention implementation is ours only while a step of ours runs, so ``model.generate``
and everything else work on the same object between steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from specdec.attention import IMPLEMENTATION, QueryLayout, StepAttention, TailMasks, active
from specdec.errors import ConfigError, InternalError
from specdec.kv_cache import CallShape, GroupKey, KVPool
from specdec.types import Chunk, IntArray, RequestState, TargetOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.probe import CallSpec

__all__ = ["TreeTarget", "group_key", "kv_bytes_per_token"]

_LongArray: TypeAlias = npt.NDArray[np.int64]


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

    Raises:
        ConfigError: a size is below 1.
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
    ) -> None:
        for name, value in (("kv_tokens", kv_tokens), ("max_length", max_length), ("max_batch_size", max_batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        self.model = model
        self.calls = tuple(calls)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_length = max_length
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
        self._num_query_groups = [c.num_query_heads // c.num_kv_heads for c in calls]
        self._masks: dict[tuple[GroupKey, int], TailMasks] = {}
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        # A ready 4-D mask goes through every mask builder untouched; without one, each forward looks for packed
        # sequences in the position ids, which costs a synchronisation.
        self._dummy_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self._configs = _attention_configs(model)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_tokens

    def has_room(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_free

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        sampling = state.request.sampling
        expected = min(state.num_prompt_tokens + sampling.max_new_tokens, self.max_length) + self.max_draft_tokens
        return self.pool.reserve(state.request_id, num_tokens, expected)

    def release(self, state: RequestState) -> None:
        self.pool.release(state.request_id)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        layouts, input_ids, position_ids, logit_rows, cu_nodes = _flatten(chunks)
        step = StepAttention(
            self.pool, layouts, self._num_query_groups, dtype=self.dtype, device=self.device, masks=self._masks
        )
        rows = torch.from_numpy(logit_rows).to(self.device)
        options: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_logits else {}
        with active(step), self._our_attention():
            out = self.model(
                input_ids=torch.from_numpy(input_ids)[None].to(self.device),
                position_ids=torch.from_numpy(position_ids)[None].to(self.device),
                attention_mask=self._dummy_mask,
                use_cache=False,
                **options,
            )
        if step.num_calls != len(self.calls):
            raise InternalError(f"the forward made {step.num_calls} attention calls, the probe saw {len(self.calls)}")
        logits = out.logits[0] if self._keeps_logits else out.logits[0, rows]
        return TargetOutput(logits=logits, cu_nodes=cu_nodes)

    @torch.inference_mode()
    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        for chunk, nodes in zip(chunks, keep, strict=True):
            prefix = len(chunk.prefix_ids)
            self.pool.commit(chunk.state.request_id, [*range(prefix), *(prefix + node for node in nodes)])

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


def _flatten(
    chunks: Sequence[Chunk],
) -> tuple[list[QueryLayout], _LongArray, _LongArray, _LongArray, IntArray]:
    """Layouts, input ids [T] and positions [T] (int64), flat rows of the trees' nodes, cu_nodes [trees + 1]."""
    layouts: list[QueryLayout] = []
    ids: list[IntArray] = []
    positions: list[IntArray] = []
    rows: list[_LongArray] = []
    cu_nodes = [0]
    start = 0
    for chunk in chunks:
        prefix, tree, cached = len(chunk.prefix_ids), chunk.tree, chunk.state.num_cached
        total = chunk.num_tokens
        if tree is None or tree.is_chain:
            parents = np.arange(-1, total - 1, dtype=np.int32)
            depths = np.arange(total, dtype=np.int32)
            is_chain = True
        else:
            parents = np.concatenate((np.arange(-1, prefix - 1, dtype=np.int32), tree.parents + prefix))
            depths = np.concatenate((np.arange(prefix, dtype=np.int32), tree.depths() + prefix))
            is_chain = False
        layouts.append(QueryLayout(chunk.state.request_id, start, total, cached, parents, depths, is_chain))
        ids.append(chunk.prefix_ids)
        if tree is not None:
            ids.append(tree.token_ids)
            rows.append(np.arange(start + prefix, start + total, dtype=np.int64))
            cu_nodes.append(cu_nodes[-1] + len(tree))
        positions.append(depths + cached)
        start += total
    no_rows = np.empty(0, dtype=np.int64)
    return (
        layouts,
        np.concatenate(ids).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        np.concatenate(rows) if rows else no_rows,
        np.array(cu_nodes, dtype=np.int32),
    )
