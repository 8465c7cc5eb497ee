"""Where the time of an EAGLE draft goes: a tree of 60 nodes, one request, random weights of several sizes.

    python -m specdec.bench.draft_profile --json bench/results/draft_profile.json

One draft reads four new tokens with the target's states and grows six levels of ten nodes. Time is split by wrapping:
*matmuls* are the head's linear layers, the fusing of states and the projection to the vocabulary; *attention* is the
attention function, with writing K and V; *norms* are what is left of the head's own tensor arithmetic; the rest is
searching, slots, masks and all other Python. Shares are of the clock on the wall, medians over drafts.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.attention import StepAttention
from specdec.bench.measure import write_json
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_head import EagleConfig, EagleHead
from specdec.readings import HiddenStates
from specdec.types import Request, RequestState

__all__ = ["SHAPES", "main", "profile_head", "random_head"]

# hidden size, inner size, heads, KV heads, head width, words of the head, words of the target: published shapes.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "bundled model": (256, 704, 8, 2, 64, 4096, 4096),
    "Qwen2.5-0.5B": (896, 4864, 14, 2, 64, 32_000, 151_936),
    "Llama-3.1-8B": (4096, 14_336, 32, 8, 128, 32_000, 128_256),
}
_LOW_PRECISION = {"Llama-3.1-8B": torch.bfloat16}  # as such heads are published, and for want of memory
_NODES, _TOP_K, _DEPTH, _CONTEXT, _ACCEPTED = 60, 10, 6, 512, 3


def random_head(shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> EagleHead:
    """An EAGLE-3 head over three states, with random weights."""
    hidden, inner, num_heads, num_kv_heads, head_dim, num_words, _ = shape
    layer, keys = "layers.0.", num_kv_heads * head_dim
    sizes = {
        "fc": (hidden, 3 * hidden),
        f"{layer}self_attn.q_proj": (num_heads * head_dim, 2 * hidden),
        f"{layer}self_attn.k_proj": (keys, 2 * hidden),
        f"{layer}self_attn.v_proj": (keys, 2 * hidden),
        f"{layer}self_attn.o_proj": (hidden, num_heads * head_dim),
        f"{layer}mlp.gate_proj": (inner, hidden),
        f"{layer}mlp.up_proj": (inner, hidden),
        f"{layer}mlp.down_proj": (hidden, inner),
        "lm_head": (num_words, hidden),
    }
    make = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.weight": (torch.randn(size, generator=make) / size[1] ** 0.5).to(dtype) for name, size in sizes.items()
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    weights["lm_head.weight"] *= 6  # laws as peaked as a trained head's, or no tree would grow to its depth
    weights |= {f"{layer}{name}.weight": torch.ones(hidden, dtype=dtype) for name in norms}
    weights["norm.weight"] = torch.ones(hidden, dtype=dtype)
    words = torch.randn(1024, hidden, generator=make).to(dtype)
    config = EagleConfig(
        version=3, hidden_size=hidden, target_hidden_size=hidden, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, eps=1e-6, hidden_layers=(2, 4, 6), rope={"rope_type": "default", "rope_theta": 1e4},
        max_length=2048,
    )  # fmt: skip
    return EagleHead(
        config, weights, embed=lambda ids: words[ids % len(words)], project=lambda outputs: outputs,
        target_ids=_ids(shape),
    )  # fmt: skip


def _ids(shape: Sequence[int]) -> Tensor | None:
    """The target's ids of the head's words: every n-th one."""
    num_words, vocab_size = shape[5:]
    return None if num_words == vocab_size else torch.arange(num_words) * (vocab_size // num_words)


class _Clock:
    """Seconds that are spent inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; calls within calls are counted once."""
        is_inside = False

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*args, **kwargs)
            is_inside, begin = True, perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                is_inside = False
                self.seconds += perf_counter() - begin

        return timed


@contextmanager
def _clocks(head: EagleHead) -> Iterator[dict[str, _Clock]]:
    """Clocks around the parts of a draft, for as long as the block lasts."""
    clocks = {name: _Clock() for name in ("matmuls", "attention", "norms")}
    attend = StepAttention.attend
    names = [("matmuls", "_linears"), ("norms", "_norm")]
    before = dict(vars(head))
    for clock, name in names:
        if hasattr(head, name):
            setattr(head, name, clocks[clock].around(getattr(head, name)))
    StepAttention.attend = clocks["attention"].around(attend)  # type: ignore[method-assign]
    try:
        yield clocks
    finally:
        StepAttention.attend = attend  # type: ignore[method-assign]
        vars(head).clear()
        vars(head).update(before)


class _Request:
    """One request whose target accepts three tokens and adds one in every step."""

    def __init__(self, head: EagleHead, vocab_size: int) -> None:
        self._draw, self._vocab_size = np.random.default_rng(0), vocab_size
        self._layers, self._width = head.config.hidden_layers, head.config.target_hidden_size
        self.state = RequestState(Request("a", self._ids(_CONTEXT)))
        self._cache(_CONTEXT - 1)

    def step(self) -> None:
        """Four more tokens, and the target's states at those that it has cached."""
        self.state.append(self._ids(_ACCEPTED + 1))
        self._cache(_ACCEPTED + 1)

    def _ids(self, count: int) -> Any:
        return self._draw.integers(0, self._vocab_size, count).astype(np.int32)

    def _cache(self, count: int) -> None:
        rows = self._draw.standard_normal((count, len(self._layers) * self._width)).astype(np.float32)
        self.state.num_cached += count
        self.state.hidden = HiddenStates(self._layers, torch.from_numpy(rows))


def profile_head(name: str, *, drafts: int) -> dict[str, Any]:
    """Milliseconds of a draft and the shares of its parts, for one of ``SHAPES``."""
    dtype = _LOW_PRECISION.get(name, torch.float32)
    head, vocab_size = random_head(SHAPES[name], dtype=dtype), SHAPES[name][6]
    drafter = EagleDrafter(head, vocab_size=vocab_size, top_k=_TOP_K, depth=_DEPTH, kv_tokens=4096, max_requests=1)
    request = _Request(head, vocab_size)
    depths: list[int] = []

    def draft() -> float:
        begin = perf_counter()
        [tree] = drafter.propose([request.state], [_NODES - 1])
        seconds = perf_counter() - begin
        assert len(tree) == _NODES, "the budget must be used, or the draft is another one"
        depths.append(int(tree.depths().max()))
        request.step()
        return seconds

    for _ in range(3):  # reads the prompt, packs the weights, fills caches
        draft()
    shares: dict[str, list[float]] = {"matmuls": [], "attention": [], "norms": []}
    with _clocks(head) as clocks:
        for _ in range(drafts):
            before = {part: clock.seconds for part, clock in clocks.items()}
            seconds = draft()
            for part, clock in clocks.items():
                shares[part].append((clock.seconds - before[part]) / seconds)
    bare = [draft() for _ in range(drafts)]
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(drafts):
            drafter.propose([request.state], [_NODES - 1])
            request.step()
    both = [a + b for a, b in zip(shares["matmuls"], shares["attention"], strict=True)]
    return {
        "head": name,
        "dtype": str(dtype).removeprefix("torch."),
        "depth": median(depths),
        "ms": 1e3 * median(bare),
        "ms_range": [1e3 * min(bare), 1e3 * max(bare)],
        "shares": {part: median(values) for part, values in shares.items()},
        "matmuls_and_attention": median(both),
        "matmuls_and_attention_range": [min(both), max(both)],
        "most_expensive": _most_expensive(profiler),
    }


def _most_expensive(profiler: cProfile.Profile, count: int = 12) -> list[dict[str, Any]]:
    """The functions with the most time of their own, by module and name; no folders."""
    table: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in table.values())
    rows = sorted(table.items(), key=lambda item: -item[1][2])[:count]
    return [
        {"function": f"{Path(where[0]).stem}.{where[2]}", "calls": entry[0], "share": round(entry[2] / total, 4)}
        for where, entry in rows
    ]


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--drafts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [profile_head(name, drafts=args.drafts) for name in args.heads]
    what = {"nodes": _NODES, "top_k": _TOP_K, "depth": _DEPTH, "context": _CONTEXT, "batch": 1}
    write_json(args.json, {"what": "time of an EAGLE-3 draft by its parts, CPU", **what, "rows": rows})


if __name__ == "__main__":
    main()
