"""The target that verifies batches of token trees: a Hugging Face causal LM over specdec's own KV pool.

The model is not changed: its attention implementation is ours only while a step of ours runs, so ``model.generate``
and everything else work on the same object between steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from specdec.attention import IMPLEMENTATION, AttentionStep, StepAttention, TailMasks, active
from specdec.device_work import LateCopy
from specdec.early_exit import EarlyExit, Pruning
from specdec.errors import ConfigError, InternalError, UnsupportedError
from specdec.flat_batch import flatten, warm_up
from specdec.hidden_taps import HiddenTaps
from specdec.kernels.launch import Backend, uses_triton
from specdec.kv_cache import CallShape, GroupKey, Keep, KVPool
from specdec.placement import device_of
from specdec.prefix_cache import PrefixCache
from specdec.prompt_attention import PromptAttention, device_timer, verdict_file
from specdec.query_layout import QueryLayout
from specdec.readings import HiddenStates, LateSuccessors, Successors
from specdec.split_attention import SplitAttention
from specdec.step_buffers import Outputs, Step
from specdec.strict_operations import StrictOperations
from specdec.types import Chunk, RequestState, TargetOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.kernel_runner import KernelRunner
from specdec.probe import CallSpec

__all__ = ["TreeTarget", "group_key", "kv_bytes_by_device"]


def group_key(call: CallSpec) -> GroupKey:
    """The KV group of an attention call: calls that forget alike share slots."""
    if call.mask_kind == "other":
        raise InternalError(f"attention call {call.layer_name} has a mask that the tree target does not know")
    return (call.mask_kind, call.window or 0)


def kv_bytes_by_device(calls: Sequence[CallSpec], dtype: torch.dtype) -> dict[torch.device, int]:
    """Bytes of K and V that one token takes over the attention calls of each device."""
    found: dict[torch.device, int] = {}
    for c in calls:
        found[c.device] = found.get(c.device, 0) + c.num_kv_heads * (c.key_dim + c.value_dim) * dtype.itemsize
    return found


class TreeTarget:
    """A ``TargetModel`` over any causal LM whose attention goes through transformers' attention interface.

    Args:
        model: in evaluation mode; K and V of each layer lie on the layer's device.
        calls: what the probe saw, one entry per attention call of a forward.
        kv_tokens: tokens that the pool holds over all requests.
        max_length: most tokens of one request.
        max_batch_size: most requests held at a time.
        max_step_tokens: most query tokens of one step.
        is_strict: attention gives a query the same bits whatever else is in the step. By torch, that is for models on
            the CPU whose attention has no soft-cap, no sinks, and values as wide as keys.
        hidden_layers: whose states drafters read, as indices into ``output_hidden_states``; all different.
        keeps_prefixes: K/V of finished requests serves later ones that begin alike; not where drafters read states,
            which they need of every token.
        num_successors: likeliest next tokens that drafters read after prefix tokens; 0: none, and none are scored.
        kernels: who attends; see ``specdec.kernels.launch.uses_triton``.
        buckets: numbers of tokens whose forwards are captured by ``capture_graphs``; none: nothing is.
        max_earlier: nodes of earlier forwards of a step that a captured one has room for, for trees that grow.

    Raises:
        ConfigError: a size is below 1, the model is in training mode, or in a dtype that Triton was asked for by name
            and does not know.
        RuntimeError: Triton was asked for by name and cannot run on the model's device.
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
        kernels: Backend = "auto",
        buckets: Sequence[int] = (),
        max_earlier: int = 0,
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
        self.device = device_of(model)
        self.dtype = _kv_dtype(model)
        self.is_split = len({call.device for call in calls}) > 1
        if self.is_split and (is_strict or hidden_layers):
            raise UnsupportedError(
                "layers on several devices serve default numerics, and drafters that read no hidden states"
            )
        uses_kernels = _uses_kernels(kernels, self.device, self.dtype)
        self.pool = KVPool(
            [(group_key(c), CallShape(c.num_kv_heads, c.key_dim, c.value_dim)) for c in calls],
            kv_tokens,
            num_live_requests=max_batch_size,
            num_step_tokens=max_step_tokens + max_batch_size * (self.max_draft_tokens + 1),
            dtype=self.dtype,
            device=self.device,
            devices=[call.device for call in calls],
            keep_runs=False if uses_kernels else None,
        )
        self.early_exit: EarlyExit | None = None
        self.prefixes = PrefixCache(self.pool) if keeps_prefixes and not hidden_layers else None
        self._operations: AbstractContextManager[Any] = (
            StrictOperations() if is_strict and uses_kernels else nullcontext()
        )
        self.runner: KernelRunner | None = None
        if uses_kernels:
            from specdec.kernel_runner import KernelRunner  # imports Triton, which is not everywhere

            may_choose = kernels == "auto" and not is_strict and self.device.type == "cuda" and not self.is_split
            prompts = PromptAttention(device_timer(self.device), verdict_file(self.device)) if may_choose else None
            self.runner = KernelRunner(
                self.pool, self._forward, max_length=max_length + self.max_draft_tokens + 1,
                max_batch_size=max_batch_size, device=self.device, is_strict=is_strict, buckets=buckets,
                max_earlier=max_earlier, prompts=prompts,
            )  # fmt: skip
        self._num_query_groups = [c.num_query_heads // c.num_kv_heads for c in calls]
        self._masks: dict[torch.device, dict[tuple[GroupKey, int], TailMasks]] = {}
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted and not self.is_split  # they lie on the main device
        self._taps = HiddenTaps.of(model, self.hidden_layers) if self.hidden_layers else None
        # A ready 4-D mask goes through every mask builder untouched; without one, each forward looks for packed
        # sequences in the position ids, which costs a synchronisation.
        self._dummy_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self._configs = _attention_configs(model)
        warm_up()

    @torch.inference_mode()
    def capture_graphs(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture the forwards of all ``buckets`` as CUDA graphs.

        Args:
            on_progress: (graphs done, graphs in all).

        Raises:
            UnsupportedError: the model is not on a CUDA device or runs without the Triton kernels, or it does what a
                graph cannot hold; everything then runs eagerly.
        """
        if self.runner is None or self.device.type != "cuda":
            raise UnsupportedError(f"CUDA graphs need the Triton kernels on a CUDA device, not {self.device}")
        if self.is_split:
            raise UnsupportedError("CUDA graphs need all layers on one device")
        from specdec.kernel_runner import capture_cuda_graphs

        try:
            self.runner.capture(capture_cuda_graphs(self.device), on_progress)
        except RuntimeError as error:
            self.runner.forget_captured()
            line = str(error).splitlines()[0]
            raise UnsupportedError(f"{type(self.model).__name__} cannot be captured as a CUDA graph: {line}") from error

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_tokens

    def has_room(self, num_tokens: int) -> bool:
        return num_tokens <= self.pool.num_free + (self.prefixes.num_tokens if self.prefixes else 0)

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        expected = self._expected_length(state)
        if self.prefixes and state.request_id not in self.pool:
            self.prefixes.make_room(expected)
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
        batch = flatten(chunks)
        is_asked = self.num_successors > 0 and any(len(chunk.prefix_ids) for chunk in chunks)
        places = _last_places(chunks) if is_asked else []
        rows = np.concatenate([batch.tree_rows, *places]) if places else batch.tree_rows
        pruned = self.early_exit.plan(chunks, batch.tree_rows) if self.early_exit else None
        logits, hidden = self.run(
            batch.layouts, batch.input_ids, batch.positions, rows, pruning=pruned.around if pruned else None
        )
        late, successors = self._successors(batch.input_ids, places, logits)
        logits = logits[: len(batch.tree_rows)]
        if pruned is not None:
            return replace(pruned.output(logits, successors), late=late)
        if hidden is None:
            return TargetOutput(logits, batch.cu_nodes, successors=successors, late=late)
        states = HiddenStates(self.hidden_layers, hidden)
        return TargetOutput(logits, batch.cu_nodes, states, batch.tree_rows, successors, late=late)

    def prune_with(self, early: EarlyExit) -> None:
        """Drop hopeless draft tokens half-way through the forward from now on.

        Raises:
            UnsupportedError: the numerics are strict, drafters read states, which dropped rows have not, or our
                kernels run the step, whose buffers have a fixed shape.
        """
        if self.is_strict or self.hidden_layers or self.runner is not None or self.is_split:
            raise UnsupportedError(
                "early pruning needs numerics='default', one device, no kernels, and no drafter that reads states"
            )
        self.early_exit = early

    def _successors(
        self, input_ids: npt.NDArray[np.int64], places: Sequence[npt.NDArray[np.int64]], logits: torch.Tensor
    ) -> tuple[LateCopy | None, Sequence[Successors]]:
        """The likeliest next tokens of all rows, and of each chunk those at its ``places``, the last rows of all."""
        if not self.num_successors:
            return None, ()
        late = LateCopy(torch.topk(logits, self.num_successors, dim=-1).indices.to(torch.int32))
        return late, LateSuccessors([input_ids[rows].astype(np.int32) for rows in places], late) if places else ()

    @torch.inference_mode()
    def run(
        self,
        layouts: Sequence[QueryLayout],
        input_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        logit_rows: npt.NDArray[np.int64],
        *,
        pruning: Pruning | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One forward over a flat row of query tokens, whose slots have been reserved.

        Args:
            layouts: the requests in flat order.
            input_ids: [T].
            positions: [T] absolute.
            logit_rows: [L] indices in the flat row.
            pruning: entered around the forward with its attention and the rows; it may drop rows on the way.

        Returns:
            [L, V] logits, and the states of ``hidden_layers`` at all query tokens, [T, layers * E], or None. The K/V
            of all query tokens are written.

        Raises:
            InternalError: the model gives no hidden states, or makes other attention calls than the probe saw.
        """
        if self.runner is not None:
            return self.runner.run(Step(layouts, input_ids, positions, logit_rows))[:2]
        ids, places = (torch.from_numpy(x).to(self.device) for x in (input_ids, positions))
        rows = torch.tensor(logit_rows, device=self.device)  # a copy: pruning rewrites it
        steps = {
            place: StepAttention(
                self.pool, layouts, self._num_query_groups, dtype=self.dtype, device=place,
                masks=self._masks.setdefault(place, {}), is_strict=self.is_strict,
            )
            for place in set(self.pool.device_of_call)
        }  # fmt: skip
        if self.is_split:
            return self._forward(SplitAttention(steps, self.pool.device_of_call), ids, places, rows)[:2]
        (step,) = steps.values()
        with pruning(step, rows) if pruning else nullcontext():
            return self._forward(step, ids, places, rows)[:2]

    def _forward(
        self,
        step: AttentionStep,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        *,
        states: torch.Tensor | None = None,
    ) -> Outputs:
        """The model over one flat row [T] of tokens; see ``run``. It reads no ``states``."""
        options: dict[str, Any] = {"logits_to_keep": logit_rows} if self._keeps_logits else {}
        taking = self._taps.taking() if self._taps is not None else nullcontext()
        if self.hidden_layers and self._taps is None:
            options["output_hidden_states"] = True
        with active(step), self._our_attention(), self._operations, taking as taken:
            out = self.model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                attention_mask=self._dummy_mask,
                use_cache=False,
                **options,
            )
        if step.num_calls != len(self.calls):
            raise InternalError(f"the forward made {step.num_calls} attention calls, the probe saw {len(self.calls)}")
        logits: torch.Tensor = out.logits[0] if self._keeps_logits else out.logits[0, logit_rows]
        if not self.hidden_layers:
            return Outputs(logits)
        if taken is not None:
            return Outputs(logits, taken.rows)
        if not out.hidden_states or max(self.hidden_layers) >= len(out.hidden_states):
            num_states = len(out.hidden_states or ())
            raise InternalError(f"states {self.hidden_layers} were asked for, the model gives {num_states}")
        return Outputs(logits, torch.cat([out.hidden_states[layer][0] for layer in self.hidden_layers], dim=-1))

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


def _uses_kernels(kernels: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Float64, in which checks decide about ties, is torch's business on every device."""
    if not uses_triton(kernels, device) or dtype.itemsize <= torch.float32.itemsize:
        return uses_triton(kernels, device)
    if kernels == "triton":
        raise ConfigError(f'kernels="triton" needs float32, bfloat16 or float16, the model is in {dtype}')
    return False


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
