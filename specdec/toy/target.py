"""A target without a model: exact logits, and book-keeping that notices every mistake of its user.

It keeps all rules of `specdec.protocols.TargetModel` and breaks loudly when its user does not: its law at a node is a
hash of the tokens that it *holds* for the path to that node, so one wrong, missing or extra KV entry changes every
later token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, InternalError
from specdec.types import Chunk, IntArray, RequestState, TargetOutput

__all__ = ["ToyTarget"]

_MASK = (1 << 64) - 1
Memory = tuple[int, ...]  # what the KV of a path amounts to: one running hash, or the last tokens


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value}")


def _mix(value: int) -> int:
    """64 well-mixed bits of ``value``: the finaliser of SplitMix64 (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_mix` of every entry; products of arrays wrap around."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Held:
    """What the target holds for one request."""

    __slots__ = ("cached", "chunk", "num_reserved", "step")

    def __init__(self) -> None:
        self.cached: list[Memory] = []  # one entry per cached token
        self.num_reserved = 0
        self.chunk: Chunk | None = None  # scored but not committed
        self.step: list[Memory] = []  # one entry per query token of that chunk


class ToyTarget:
    """A random language model over a small vocabulary, with exact float64 logits and strict book-keeping.

    The law after a prefix is a flat Dirichlet draw (``sharpness`` 1), fixed by ``seed`` and the prefix.

    Args:
        vocab_size: V >= 2.
        seed: which language.
        order: how many last tokens the law depends on, >= 1; None = all of them, which shows every KV mistake. A small
            order gives text that repeats itself, for drafters that look things up.
        sharpness: factor on the logits, > 0; larger = less random text.
        kv_tokens: tokens that it can hold over all requests, drafts included.
        max_length: most tokens of one request.
        max_draft_tokens: most draft tokens per request and step.
        supports_trees: False: a tree with branches is refused.

    Raises:
        ConfigError: an option is outside its rule.
        InternalError: its user broke a rule of the protocol: unreserved tokens, a cache that is not what the state
            says, a path that is none.

    Example:
        >>> ToyTarget(vocab_size=50, seed=3, order=1).greedy([7], 10)  # repeats itself: food for prompt lookup
        [25, 19, 34, 18, 32, 12, 27, 23, 7, 25]
        >>> ToyTarget(vocab_size=50, seed=3).greedy([7], 10)  # depends on every token before
        [34, 47, 28, 38, 46, 0, 7, 22, 36, 16]
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        seed: int = 0,
        order: int | None = None,
        sharpness: float = 1.0,
        kv_tokens: int = 1 << 20,
        max_length: int = 1 << 20,
        max_draft_tokens: int = 64,
        supports_trees: bool = True,
    ) -> None:
        _require(vocab_size >= 2, "vocab_size", ">= 2", vocab_size)
        _require(order is None or order >= 1, "order", ">= 1 or None", order)
        _require(sharpness > 0, "sharpness", "> 0", sharpness)
        _require(kv_tokens >= 1, "kv_tokens", ">= 1", kv_tokens)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.max_draft_tokens = max_draft_tokens
        self.supports_trees = supports_trees
        self.kv_tokens = kv_tokens
        self.num_forwards = 0
        self._seed = _mix(seed & _MASK)
        self._order = order
        self._sharpness = sharpness
        self._held: dict[str, _Held] = {}

    @property
    def num_held_tokens(self) -> int:
        """Tokens cached or reserved over all requests; 0 once every request was released."""
        return sum(len(held.cached) + held.num_reserved for held in self._held.values())

    @property
    def request_ids(self) -> list[str]:
        """The requests that something is held for."""
        return list(self._held)

    def logits(self, token_ids: Iterable[int]) -> npt.NDArray[np.float64]:
        """[V] float64: the logits after a text, computed from the text alone."""
        [row] = self._logits([self._memory(token_ids)])
        return np.asarray(row, dtype=np.float64)

    def greedy(self, token_ids: Sequence[int] | IntArray, num_tokens: int) -> list[int]:
        """The next ``num_tokens`` tokens of greedy decoding."""
        memory = self._memory(token_ids)
        output = []
        for _ in range(num_tokens):
            output.append(int(np.argmax(self._logits([memory])[0])))
            memory = self._after(memory, output[-1])
        return output

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        if not self.has_room(num_tokens):
            return False
        self._held.setdefault(state.request_id, _Held()).num_reserved += num_tokens
        return True

    def has_room(self, num_tokens: int) -> bool:
        return self.num_held_tokens + num_tokens <= self.kv_tokens

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.kv_tokens

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        import torch  # here, so that the other doubles do not load it

        if len({chunk.state.request_id for chunk in chunks}) != len(chunks):
            raise InternalError("a request has two chunks in one forward")
        memories: list[Memory] = []
        cu_nodes = [0]
        for chunk in chunks:
            held = self._take(chunk)
            if chunk.tree is not None:
                memories += held.step[len(chunk.prefix_ids) :]
                cu_nodes.append(len(memories))
        self.num_forwards += 1
        return TargetOutput(torch.from_numpy(self._logits(memories)), np.array(cu_nodes, dtype=np.int32))

    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        for chunk, nodes in zip(chunks, keep, strict=True):
            held = self._held[chunk.state.request_id]
            if held.chunk is not chunk:
                raise InternalError(f"request {chunk.state.request_id!r}: a chunk is committed that was not scored")
            if chunk.tree is None:
                if len(nodes) > 0:
                    raise InternalError(f"nodes {list(nodes)} of a chunk without a tree are kept")
            elif len(nodes) == 0 or list(nodes) != chunk.tree.path(nodes[-1]):
                raise InternalError(f"the nodes kept must be a path from the root, got {list(nodes)}")
            num_prefix = len(chunk.prefix_ids)
            held.cached += held.step[:num_prefix] + [held.step[num_prefix + node] for node in nodes]
            held.num_reserved, held.chunk, held.step = 0, None, []

    def recall(self, state: RequestState) -> int:
        return 0

    def retire(self, state: RequestState) -> None:
        self.release(state)

    def release(self, state: RequestState) -> None:
        self._held.pop(state.request_id, None)

    def _take(self, chunk: Chunk) -> _Held:
        """Compute and remember what the query tokens of a chunk would leave in the cache."""
        state, tree = chunk.state, chunk.tree
        held = self._held.get(state.request_id) or _Held()
        if (len(held.cached), held.num_reserved) != (state.num_cached, chunk.num_tokens):
            raise InternalError(
                f"request {state.request_id!r} has {len(held.cached)} cached and {held.num_reserved} reserved tokens, "
                f"but its state says {state.num_cached} cached and its chunk has {chunk.num_tokens}"
            )
        held.chunk, held.step = chunk, []
        last = held.cached[-1] if held.cached else ()
        for token_id in chunk.prefix_ids.tolist():
            last = self._after(last, token_id)
            held.step.append(last)
        if tree is None:
            return held
        tree.check(self.vocab_size)
        if tree.num_draft_tokens > self.max_draft_tokens or not (self.supports_trees or tree.is_chain):
            raise InternalError(f"this target was given a tree that it does not take: parents {tree.parents.tolist()}")
        first = len(held.step)
        for parent, token_id in zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True):
            held.step.append(self._after(last if parent < 0 else held.step[first + parent], token_id))
        return held

    def _memory(self, token_ids: Iterable[int]) -> Memory:
        memory: Memory = ()
        for token_id in token_ids:
            memory = self._after(memory, int(token_id))
        return memory

    def _after(self, memory: Memory, token_id: int) -> Memory:
        if self._order is None:
            return (_mix((memory[0] if memory else self._seed) ^ (token_id + 1)),)
        return (*memory, token_id)[-self._order :]

    def _logits(self, memories: Sequence[Memory]) -> npt.NDArray[np.float64]:
        """[T, V] float64: logs of independent exponential draws, so that the law is a flat Dirichlet one."""
        keys = np.full((len(memories), self.vocab_size), self._seed, dtype=np.uint64)
        for row, memory in enumerate(memories):
            for part in memory:
                keys[row] = _mix(int(keys[row, 0]) ^ (part + 1))
        bits = _mix_array(keys ^ np.arange(1, self.vocab_size + 1, dtype=np.uint64))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        logits: npt.NDArray[np.float64] = self._sharpness * np.log(-np.log(uniform))
        return logits
