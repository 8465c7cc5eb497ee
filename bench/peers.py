"""Other people's drafters, where they are installed, behind the calls that the simulation makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.bench.traces import IntArray, TokenCall

__all__ = ["ArcticOptions", "arctic_cache", "replay_arctic"]

ArcticOptions = dict[str, float | bool]


def arctic_cache(depth: int = 64) -> Any:
    """A fresh ``SuffixDecodingCache`` of arctic-inference.

    Its package needs vLLM only in other parts; the extension of ``suffix_decoding`` can be built alone from the source
    distribution: ``cmake -S csrc/suffix_decoding -B build && cmake --build build`` with nanobind installed, the result
    beside its ``cache.py``.

    Raises:
        ImportError: it is not installed.
    """
    from arctic_inference.suffix_decoding import SuffixDecodingCache  # type: ignore[import-not-found, unused-ignore]

    return SuffixDecodingCache(depth)


def _accepted(token_ids: list[int], parents: list[int], as_tree: bool, truth: list[int], at: int) -> int:
    right, node = 0, -1
    if not as_tree:
        while right < len(token_ids) and at + right < len(truth) and token_ids[right] == truth[at + right]:
            right += 1
        return right
    for i, parent in enumerate(parents):
        if at + right < len(truth) and parent == node and token_ids[i] == truth[at + right]:
            node, right = i, right + 1
    return right


def replay_arctic(cache: Any, number: int, call: TokenCall, options: ArcticOptions) -> tuple[int, int, int]:
    """Draft and verify a recorded response; returns steps, accepted draft tokens, draft tokens."""
    cache.start_request(number, call.prompt_ids)
    text: IntArray = np.concatenate([call.prompt_ids, call.response_ids])
    truth = call.response_ids.tolist()
    start, at, steps, accepted, drafted = len(call.prompt_ids), 0, 0, 0, 0
    depth = cache.max_tree_depth
    while at < len(truth):
        end = start + at
        draft = cache.speculate(number, text[max(0, end - depth) : end], max_spec_tokens=depth, **options)
        right = _accepted(draft.token_ids, draft.parents, bool(options.get("use_tree_spec")), truth, at)
        stop = min(at + right + 1, len(truth))
        cache.add_active_response(number, call.response_ids[at:stop])
        steps, accepted, drafted, at = steps + 1, accepted + right, drafted + len(draft.token_ids), stop
    cache.stop_request(number)
    return steps, accepted, drafted
