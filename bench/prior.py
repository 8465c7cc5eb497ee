"""Training of the starting tables that ``specdec.suffix_tree`` ships.

Only episodes of half 0 are used (``traces.episode_half``); results on half 1 are held out. Run as
``python -m specdec.bench.prior --out suffix_tree/prior.npz --tokenizer A.json --tokenizer B.json TRACES...``; with more
than one tokenizer the tables see coarse and fine cuts of the same text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from specdec.bench.traces import Encode, TokenCall, episode_half, read_calls, tokenize_calls
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.prior import Prior, untrained_prior

__all__ = ["take_tokens", "train_prior"]

# What a cell passes on counts as at most so many outcomes: enough to start well, little enough to move to new traffic.
COUNT_LIMIT = 60.0
_CARRIED = 250.0  # the same from one source to the next during training


def take_tokens(calls: Iterable[TokenCall], max_response_tokens: int) -> list[TokenCall]:
    """Whole episodes from a file's start until ``max_response_tokens`` response tokens are reached; 0 takes all."""
    taken: list[TokenCall] = []
    count = 0
    for call in calls:
        if max_response_tokens and count >= max_response_tokens and call.trace != taken[-1].trace:
            break
        taken.append(call)
        count += len(call.response_ids)
    return taken


def train_prior(sources: Sequence[Sequence[TokenCall]], *, threshold: float = 0.1) -> Prior:
    """Replay the sources one after the other, each with an empty index, and carry the tables over.

    Args:
        sources: calls of each source in file order.
        threshold: trees are drafted down to this path probability, so that unlikely nodes are learned about as well.
    """
    prior = untrained_prior()
    for calls in sources:
        cache = SuffixCache(prior=prior, max_bytes=1 << 28)
        for number, call in enumerate(calls):
            cache.start(number, call.prompt_ids)
            cache.replay(number, call.response_ids, budget=64, threshold=threshold, as_tree=True)
            cache.finish(number)
        prior = cache.index("").prior(count_limit=_CARRIED)
    return Prior(prior.probs, prior.counts.clip(max=COUNT_LIMIT), prior.weights)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the starting tables of the suffix index.")
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path, action="append", help="tokenizer.json; repeatable")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--max-response-tokens", type=int, default=50_000, help="per file")
    options = parser.parse_args()
    encoders = [_encoder(path) for path in options.tokenizer]
    sources = []
    for path in sorted(options.traces):
        for encode in encoders:
            calls = tokenize_calls(read_calls(path), encode, max_prompt=24_000)
            taken = take_tokens(calls, options.max_response_tokens)
            sources.append([call for call in taken if episode_half(call.trace) == 0])
    train_prior(sources).save(options.out)


def _encoder(path: Path) -> Encode:
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    _main()
