"""Runs a block-diffusion head for many requests over a cache that keeps rows of the target's states and nothing else.

What a block puts into the cache is dropped when its pass is done (DFlash, arXiv 2602.06036, section 3), so nothing has
to be cropped, matched or moved after verification: the next step reads the states of the tokens that were kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec.attention import AttentionStep, StepAttention, TailMasks
from specdec.drafters.diffusion_head import DiffusionHead
from specdec.drafters.growing import GrowingCache, Growth, chain_growth
from specdec.drafters.head_runner import head_runner
from specdec.drafters.state_reader import PIECE, StateReader
from specdec.kernels.launch import Backend, uses_triton
from specdec.kv_cache import CallShape, GroupKey, KVPool
from specdec.step_buffers import Outputs, Step
from specdec.types import RequestState

__all__ = ["BlockScorer"]


class BlockScorer:
    """One denoising pass per step for all requests of a batch.

    Args:
        head: weights and arithmetic.
        kv_tokens: rows that the cache holds over all requests, the blocks of a step included.
        max_requests: most requests at a time.
        kernels: who attends; see ``specdec.kernels.launch.uses_triton``. A head of which some layers see later rows
            and others do not is torch's.
        graphs: capture the head's forwards as CUDA graphs where there are any.
    """

    def __init__(
        self,
        head: DiffusionHead,
        *,
        kv_tokens: int,
        max_requests: int,
        kernels: Backend = "auto",
        graphs: bool = True,
    ) -> None:
        config = head.config
        shape = CallShape(config.num_kv_heads, config.head_dim, config.head_dim)
        groups: list[GroupKey] = [("sliding", window) if window else ("full", 0) for window in config.windows]
        self.head = head
        if len(set(config.causal)) > 1:
            kernels = "torch"
        self._cache = GrowingCache(
            KVPool(
                [(group, shape) for group in groups], kv_tokens, num_live_requests=max_requests,
                num_step_tokens=max(PIECE, config.block_size) * max_requests, dtype=head.dtype, device=head.device,
                keep_runs=False if uses_triton(kernels, head.device) else None,
            )
        )  # fmt: skip
        self._runner = head_runner(
            self._cache.pool, self._run_head, kernels=kernels, graphs=graphs, max_requests=max_requests, max_tree=0,
            name="a diffusion head",
        )  # fmt: skip
        self._reader = StateReader(self._cache, config.hidden_layers)
        self._masks: dict[bool, dict[tuple[GroupKey, int], TailMasks]] = {False: {}, True: {}}

    @property
    def num_used(self) -> int:
        """Cache slots taken; 0 when no request is held."""
        return self._cache.pool.num_used

    def read(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[int]:
        """Read the target's newest states; the indices of the requests that a block can be guessed for.

        Without a budget states are kept unread: a draft of theirs may never be wanted.
        """
        ready = [index for index in self._reader.take(states) if budgets[index] > 0]
        read = self._reader.read([states[index] for index in ready], self._read_rows)
        return [index for place, index in enumerate(ready) if place in read]

    def guess(self, states: Sequence[RequestState]) -> Tensor:
        """One block behind the last token of each request.

        Args:
            states: R requests that ``read`` named in this step.

        Returns:
            [R', guesses, H]: the rows that guess, of the first R' <= R requests that the cache has room for.
        """
        config = self.head.config
        room = self._cache.pool.num_free // config.block_size
        masks = [config.mask_token_id] * (config.block_size - 1)
        growths = [
            chain_growth(state.request_id, np.array([state.token_ids[-1], *masks], dtype=np.int32))
            for state in states[:room]
        ]
        if not growths or not self._cache.reserve(growths):
            return torch.empty(0, config.num_guesses, config.hidden_size, dtype=self.head.dtype)
        outputs = self._run(growths)
        self._cache.drop([growth.request_id for growth in growths])
        return self.head.guessing_rows(outputs.unflatten(0, (len(growths), config.block_size)))

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are no error."""
        self._reader.release(request_ids)

    def _read_rows(self, growths: Sequence[Growth], states: Tensor) -> Tensor:
        """Write keys and values of context rows in all layers, by one product."""
        _, positions = self._cache.lay_out(growths)
        keys, values = self.head.context(self.head.fuse(states), torch.from_numpy(positions).to(self.head.device))
        for group in self._cache.pool.groups.values():
            reserved = np.concatenate([group.tables[growth.request_id].reserved for growth in growths])
            slots = torch.from_numpy(reserved.astype(np.int64)).to(self.head.device)
            for layer in group.keys:
                group.keys[layer].index_copy_(0, slots, keys[layer])
                group.values[layer].index_copy_(0, slots, values[layer])
        return states

    def _run(self, growths: Sequence[Growth]) -> Tensor:
        """[T, H]: the head over blocks whose slots are reserved."""
        config = self.head.config
        layouts, positions = self._cache.lay_out(growths)
        open_ = [replace(layout, ancestors=np.ones_like(layout.ancestors)) for layout in layouts]
        ids = np.concatenate([growth.token_ids for growth in growths], dtype=np.int64)
        if self._runner is not None:
            seen = layouts if config.causal[0] else open_
            return self._runner.run(Step(seen, ids, positions, np.arange(len(ids))))[0]
        steps = {
            is_causal: StepAttention(
                self._cache.pool, layouts if is_causal else open_,
                [config.num_heads // config.num_kv_heads] * config.num_layers, dtype=self.head.dtype,
                device=self.head.device, masks=self._masks[is_causal],
            )
            for is_causal in set(config.causal)
        }  # fmt: skip

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            step = steps[config.causal[layer]]
            step.num_calls = layer
            return step.attend(query, key, value, None, None, None)

        token_ids, where = (torch.from_numpy(numbers).to(self.head.device) for numbers in (ids, positions))
        return self.head.forward(token_ids, where, attend)

    def _run_head(
        self,
        step: AttentionStep,
        input_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        *,
        states: Tensor | None = None,
    ) -> Outputs:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return step.attend(query, key, value, None, None, None)

        return Outputs(self.head.forward(input_ids, positions, attend))  # ``logit_rows`` are all rows
