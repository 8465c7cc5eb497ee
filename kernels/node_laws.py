"""What is done to a node's logits before its token is drawn: the processors that are fused, as one block of numbers.

In this order, as ``transformers`` has it: logit bias, repetition penalty, frequency and presence penalties,
temperature, top-k, top-p, min-p. Penalties read tables over the vocabulary that follow a request's committed tokens on
the device; the draft tokens above a node are added as the kernel meets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.kernels.launch import check_tensor

__all__ = ["MAX_TOP_K", "NUM_FIELDS", "NUM_TABLES", "Law", "NodeLaws", "scores_reference"]

MAX_TOP_K = 1024  # a k-th largest score is looked for among as many groups of scores, and more of them

NUM_FIELDS = 8  # numbers of a law: divisor, sampled, repetition, frequency, presence, tail, log of min-p, k
NUM_TABLES = 3  # addresses of a law: seen, counts, bias


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """From one request's logits to its tokens.

    Args:
        seed: in [0, 2^64); None: greedy, and then nothing truncates.
        temperature: above 0.
        repetition: penalty of the tokens in ``seen``; above 0.
        frequency: penalty of a token per time that it is in ``counts``.
        presence: penalty of a token that is in ``counts`` at all.
        top_k: in [1, MAX_TOP_K]; 0: all.
        tail: total probability of the least likely tokens that go: 1 - top-p; below 0: all stay.
        min_p: in [0, 1]: least share of the most likely token's probability; 0: all stay.
        seen: [V] bool: tokens of the committed prefix; None: no repetition penalty.
        counts: [V] float32: how often each token was written; None: neither of the two penalties.
        bias: [V] float32, added first; None: nothing.
    """

    seed: int | None = None
    temperature: float = 1.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    top_k: int = 0
    tail: float = -1.0
    min_p: float = 0.0
    seen: Tensor | None = None
    counts: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is read from memory besides the logits."""
        return self.seen, self.counts, self.bias

    @property
    def truncates(self) -> bool:
        """True if some tokens become impossible."""
        return self.seed is not None and (self.top_k > 0 or self.tail >= 0 or self.min_p > 0)


class NodeLaws:
    """The laws of a batch of nodes on the device, sent in one copy.

    Args:
        laws: [R].
        sizes: [R] nodes of each; together T.
        positions: [T] int64: absolute position of the token that is drawn after the node.
        vocab_size: V.
        device: of the logits.
        token_ids: [T]: of each node; only penalties need them.
        parents: [T]: index of a node's parent in the batch, -1 for roots; only penalties need them.
        rows: [T]: of the logits; None: in order.

    Raises:
        ValueError: a number or table breaks its rule.
    """

    def __init__(
        self,
        laws: Sequence[Law],
        sizes: Sequence[int],
        positions: npt.NDArray[np.int64],
        vocab_size: int,
        device: torch.device,
        *,
        token_ids: npt.NDArray[np.integer] | None = None,
        parents: npt.NDArray[np.integer] | None = None,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        for law in laws:
            _check(law, vocab_size, device)
        num_nodes = len(positions)
        if sum(sizes) != num_nodes or len(sizes) != len(laws):
            raise ValueError(f"sizes must be {len(laws)} with sum {num_nodes}, got {list(sizes)}")
        self.laws, self.vocab_size, self.num_nodes = tuple(laws), vocab_size, num_nodes
        self.has_tables = any(table is not None for law in laws for table in law.tables)
        self.truncates = any(law.truncates for law in laws)
        self.has_tails = any(law.truncates and law.tail >= 0 for law in laws)
        if self.has_tables and (token_ids is None or parents is None):
            raise ValueError("penalties need token_ids and parents")
        seeds = np.array([law.seed or 0 for law in laws], dtype=np.uint64).view(np.int64)
        nodes = np.zeros((6, num_nodes), dtype=np.int64)
        nodes[0] = np.arange(num_nodes) if rows is None else rows
        nodes[1], nodes[2] = np.repeat(seeds, sizes), positions
        nodes[3] = np.repeat(np.arange(len(laws)), sizes)
        nodes[4], nodes[5] = 0 if token_ids is None else token_ids, -1 if parents is None else parents
        numbers = np.array([_numbers(law, vocab_size) for law in laws], dtype=np.float64).reshape(-1, NUM_FIELDS)
        places = np.array(
            [[0 if table is None else table.data_ptr() for table in law.tables] for law in laws], dtype=np.int64
        )
        block = torch.from_numpy(np.concatenate([nodes.ravel(), numbers.view(np.int64).ravel(), places.ravel()]))
        if device.type == "cuda":
            block = block.pin_memory()
        block = block.to(device, non_blocking=True)
        ends = nodes.size, nodes.size + numbers.size
        self.nodes = block[: ends[0]].view(6, num_nodes)  # int64: row, seed, position, law, token, parent
        self.numbers = block[ends[0] : ends[1]].view(torch.float64).view(-1, NUM_FIELDS)
        self.addresses = block[ends[1] :].view(-1, NUM_TABLES)


def _numbers(law: Law, vocab_size: int) -> tuple[float, ...]:
    smallest = float(np.float32(law.min_p))
    return (
        law.temperature, float(law.seed is not None), law.repetition, law.frequency, law.presence, law.tail,
        math.log(smallest) if smallest > 0 else -math.inf, min(law.top_k, vocab_size),
    )  # fmt: skip


def _check(law: Law, vocab_size: int, device: torch.device) -> None:
    if not 0 <= law.top_k <= MAX_TOP_K:
        raise ValueError(f"top_k must be in [0, {MAX_TOP_K}], got {law.top_k}")
    if not law.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {law.temperature}; greedy is seed=None")
    kinds = torch.bool, torch.float32, torch.float32
    for name, table, kind in zip(("seen", "counts", "bias"), law.tables, kinds, strict=True):
        if table is not None:
            check_tensor(name, table, (vocab_size,), (kind,), device)


def scores_reference(logits: Tensor, laws: NodeLaws, *, multiplies: bool) -> tuple[Tensor, Tensor]:
    """In torch: every node's processed scores [T, V] float32, impossible tokens -inf, and which nodes draw [T] bool.

    Args:
        logits: [L, V].
        laws: of T nodes.
        multiplies: a division is a multiplication by the reciprocal, as torch has it on CUDA.
    """

    def divided(x: Tensor, number: float) -> Tensor:
        divisor = torch.tensor(number, dtype=torch.float32, device=x.device)
        return x * divisor.reciprocal() if multiplies else x / divisor

    rows, _, _, owners, tokens, parents = laws.nodes.tolist()
    lines = []
    for node, (row, owner) in enumerate(zip(rows, owners, strict=True)):
        law, line = laws.laws[owner], logits[row].float()
        path, walker = [], node
        while parents[walker] >= 0:
            path.append(tokens[walker])
            walker = parents[walker]
        path = [token for token in path if token < laws.vocab_size]
        above = torch.tensor(path, dtype=torch.int64, device=line.device)
        if law.bias is not None:
            line = line + law.bias
        if law.seen is not None:
            seen = law.seen.index_fill(0, above, True)
            line = torch.where(seen, torch.where(line < 0, line * law.repetition, divided(line, law.repetition)), line)
        if law.counts is not None:
            counts = law.counts.index_add(0, above, torch.ones(len(above), device=line.device))
            line = (line - law.frequency * counts) - law.presence * (counts > 0)
        lines.append(_truncated(divided(line, law.temperature), law))
    is_drawn = torch.tensor([laws.laws[owner].seed is not None for owner in owners], device=logits.device)
    empty = logits.new_empty(0, laws.vocab_size, dtype=torch.float32)
    return (torch.stack(lines) if lines else empty), is_drawn


def _truncated(line: Tensor, law: Law) -> Tensor:
    if not law.truncates:
        return line
    if law.top_k:
        least = torch.topk(line, min(law.top_k, len(line))).values[-1]
        line = line.masked_fill(line < least, -math.inf)
    if law.tail >= 0:
        ordered, order = torch.sort(line, stable=True)
        goes = ordered.softmax(-1).cumsum(-1) <= law.tail
        goes[-1] = False
        line = line.masked_fill(torch.zeros_like(goes).scatter(0, order, goes), -math.inf)
    if law.min_p:
        probs = line.softmax(-1)
        line = line.masked_fill(probs < law.min_p * probs.max(), -math.inf)
    return line
