"""The target's own token at every node of every tree: processed law, plus noise keyed by (seed, position).

The token at a node is ``argmax(scores)`` (greedy) or ``argmax(scores + gumbel(seed, position))``, which is a draw from
``softmax(scores)``. Scores are the logits after the request's processors on the node's true prefix. So the token is a
function of (logits, prefix, parameters, seed, position) and of nothing else.

With the Triton kernels the tokens of all requests whose processors are fused (``specdec.processors.fused`` says which)
are drawn together, and nothing of size [T, V] is made for them. The processors of the others run before as torch
operations on the device. Which way a request goes is a matter of its parameters, never of its neighbours. Both give the
same tokens, top-p's and min-p's edges apart, where a probability equals the limit up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.device_work import HostCopy, start_copy
from specdec.errors import InternalError
from specdec.kernels.launch import Backend, uses_triton
from specdec.kernels.node_laws import Law, NodeLaws
from specdec.processors import NodeBatch, Op, compile_processors, fused_law, run
from specdec.rng import gumbel_argmax
from specdec.types import DraftTree, IntArray, Request, RequestState, SamplingParams, TargetOutput

__all__ = ["Sampler"]


class _Live:
    """What the sampler knows of one live request."""

    __slots__ = ("expires_at", "is_plain", "law", "ops", "seed", "vocab_size")

    def __init__(self, state: RequestState, ops: list[Op], vocab_size: int | None) -> None:
        self.vocab_size = vocab_size  # None: no kernel draws
        self.seed = None if state.request.sampling.is_greedy else state.request.sampling.seed  # None: greedy
        self.ops = ops
        self.drop_expired(state.num_tokens)

    def drop_expired(self, num_tokens: int) -> None:
        """Forget the processors that change nothing any more once ``num_tokens`` tokens are committed."""
        self.ops = [op for op in self.ops if op.expires_at is None or op.expires_at > num_tokens]
        self.expires_at = min((op.expires_at for op in self.ops if op.expires_at is not None), default=None)
        self.is_plain = self.seed is None and not self.ops
        # What the kernel does when it can do all that the processors do, else None.
        self.law = None if self.vocab_size is None else fused_law(self.ops, self.seed, self.vocab_size)


class Sampler:
    """Turns the target's logits into the target's tokens at every node of every tree.

    Args:
        vocab_size: V, the number of columns of the logits.
        device: of the logits.
        kernels: who draws; see ``specdec.kernels.launch.uses_triton``.
        copy: brings drawn tokens to the host; for tests.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on ``device``.

    Example:
        >>> sampler = Sampler(32000)
        >>> sampler.start(state)
        >>> ids = sampler.target_ids([state], [tree], output)  # one token per node
        >>> sampler.commit(state, ids[:1])
        >>> state.append(ids[:1])
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
        copy: Callable[[Tensor], HostCopy] = start_copy,
    ) -> None:
        self.vocab_size = vocab_size
        self._copy = copy
        self.device = torch.device(device)
        self.has_kernels = uses_triton(kernels, self.device)
        self._live: dict[str, _Live] = {}

    def start(self, state: RequestState) -> None:
        """Take up a request: compile its processors.

        Raises:
            RequestError: a token id of the parameters is outside [0, V), or a processor is none.
            UnsupportedError: a processor that cannot be applied to a tree; the message names its class.
        """
        ops = compile_processors(state, self.vocab_size, self.device)
        self._live[state.request_id] = _Live(state, ops, self.vocab_size if self.has_kernels else None)

    def warmup(self) -> None:
        """Compile, or load from the disk cache, all loops that a request could need, so that none does it in a step."""
        params = SamplingParams(
            temperature=0.5, top_k=1, top_p=0.5, repetition_penalty=1.1, presence_penalty=0.1, no_repeat_ngram_size=2
        )
        state = RequestState(Request("warmup", np.zeros(3, dtype=np.int32), params))
        trees = [DraftTree.chain(0, [0])]
        output = TargetOutput(torch.zeros(2, self.vocab_size, device=self.device), np.array([0, 2], dtype=np.int32))
        scratch = Sampler(self.vocab_size, device=self.device)
        scratch.start(state)
        scratch.target_ids([state], trees, output)
        scratch.commit(state, [0])

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are no error."""
        for request_id in request_ids:
            self._live.pop(request_id, None)

    def commit(self, state: RequestState, emitted_ids: Sequence[int] | IntArray) -> None:
        """Follow the tokens that are about to be appended to ``state``."""
        live = self._live[state.request_id]
        if not live.ops:
            return
        ids = np.asarray(emitted_ids, dtype=np.int64)
        for op in live.ops:
            op.commit(ids)
        num_tokens = state.num_tokens + len(ids)
        if live.expires_at is not None and num_tokens >= live.expires_at:
            live.drop_expired(num_tokens)

    def scores(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> Tensor:
        """The logits of every node after all processors of its request; the law at a node is their softmax.

        Returns:
            [T, V] float32, always a copy. If a processor runs per node, the rows of nodes below an impossible token
            (score -inf at their ancestor) are not defined: no verifier may come there.
        """
        return self._processed(NodeBatch(states, trees, self.device), output)

    def target_ids(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> IntArray:
        """The target's own token after every node.

        Returns:
            [T] int32, in the order of ``output.logits``.
        """
        return self.launch(states, trees, output)()

    def launch(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> HostCopy:
        """Let the device draw, and start the one copy of a step from the device to the host.

        Returns:
            Waits for the copy and gives ``target_ids``.
        """
        live = [self._live[state.request_id] for state in states]
        if self.has_kernels and output.logits.dtype != torch.float64:
            return self._draw_by_kernel(live, NodeBatch(states, trees, self.device), output)
        busy = [request for request, one in enumerate(live) if not one.is_plain]
        if not busy:
            self._check(sum(map(len, trees)), output)
            return self._bring(_argmax(output.logits), output)
        if len(busy) == len(live):
            return self._bring(self._draw(states, trees, output), output)
        nodes = NodeBatch(states, trees, self.device)
        self._check(nodes.num_nodes, output)
        rows = nodes.rows(busy)
        some = TargetOutput(output.logits[rows], np.cumsum([0, *(nodes.sizes[r] for r in busy)], dtype=np.int32))
        ids = _argmax(output.logits)
        ids[rows] = self._draw([states[r] for r in busy], [trees[r] for r in busy], some)
        return self._bring(ids, output)

    def _bring(self, ids: Tensor, output: TargetOutput) -> HostCopy:
        """The one copy of a step: drawn tokens, and what the target wants to come along."""
        return self._copy(ids) if output.late is None else output.late.ride(ids, self._copy)

    def _draw(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> Tensor:
        """[T] int64 on the device: greedy requests take the best score, the others draw."""
        nodes = NodeBatch(states, trees, self.device)
        scores = self._processed(nodes, output)
        seeds = [self._live[state.request_id].seed for state in states]
        sampled = [request for request, seed in enumerate(seeds) if seed is not None]
        if not sampled:
            return _argmax(scores)
        row_seeds = np.repeat(np.array([seed or 0 for seed in seeds], dtype=np.uint64), nodes.sizes)
        if len(sampled) == len(seeds):
            return gumbel_argmax(scores, row_seeds, nodes.prefix_lengths)
        ids = _argmax(scores)
        rows = nodes.rows(sampled)
        chosen = rows if isinstance(rows, slice) else rows.cpu().numpy()
        ids[rows] = gumbel_argmax(scores[rows], row_seeds[chosen], nodes.prefix_lengths[chosen])
        return ids

    def _draw_by_kernel(self, live: Sequence[_Live], nodes: NodeBatch, output: TargetOutput) -> HostCopy:
        """[T] int32."""
        self._check(nodes.num_nodes, output)
        fused = [request for request, one in enumerate(live) if one.law is not None]
        others = [request for request, one in enumerate(live) if one.law is None]
        ids = torch.empty(nodes.num_nodes, dtype=torch.int32, device=self.device)
        if fused:
            rows = nodes.rows(fused)
            laws = [one.law for one in live if one.law is not None]
            ids[rows] = self._launch(output.logits[rows], laws, nodes.part(fused))
        if others:
            rows, some = nodes.rows(others), nodes.part(others)
            scores = self._processed(some, TargetOutput(output.logits[rows], np.array([*some.starts], dtype=np.int32)))
            ids[rows] = self._launch(scores, [Law(live[request].seed) for request in others], some)
        return self._bring(ids, output)

    def _launch(self, scores: Tensor, laws: Sequence[Law], nodes: NodeBatch) -> Tensor:
        from specdec.kernels.verify import draw_tokens  # imports Triton, which is not everywhere

        of_nodes = NodeLaws(
            laws, nodes.sizes, nodes.prefix_lengths, self.vocab_size, self.device,
            token_ids=nodes.token_ids, parents=nodes.parent_rows,
        )  # fmt: skip
        return draw_tokens(scores, of_nodes, backend="triton")

    def _processed(self, nodes: NodeBatch, output: TargetOutput) -> Tensor:
        self._check(nodes.num_nodes, output)
        scores = output.logits.to(torch.float32, copy=True)
        run([self._live[state.request_id].ops for state in nodes.states], nodes, scores)
        return scores

    def _check(self, num_nodes: int, output: TargetOutput) -> None:
        if output.logits.shape != (num_nodes, self.vocab_size):
            raise InternalError(
                f"logits of shape ({num_nodes}, {self.vocab_size}) were expected, got {tuple(output.logits.shape)}"
            )


def _argmax(scores: Tensor) -> Tensor:
    """[T] int64: ``scores.argmax(-1)``, first index first; numpy is ten times as fast on the CPU."""
    if scores.is_cpu and scores.dtype == torch.float32:
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)
