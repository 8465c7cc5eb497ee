"""A greedy loop over a target without an engine: ragged prompts in pieces, drafts that are right for a while."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec.types import Chunk, DraftTree, Request, RequestState


def prompts(vocab_size: int, lengths: Sequence[int] = (5, 13, 21), seed: int = 1) -> list[np.ndarray]:
    """Random prompts; ids below 4 are special in most vocabularies."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab_size, length).astype(np.int32) for length in lengths]


def generate(model, prompt_ids, num_new: int) -> list[int]:
    """What ``model.generate(do_sample=False)`` says."""
    ids = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new)
    return out[0, ids.shape[1] :].tolist()


def _chunk(state: RequestState, reference, rng, draft_length: int, vocab_size: int, piece: int) -> Chunk:
    missing = state.num_tokens - 1 - state.num_cached
    num_prefix = min(missing, piece)
    prefix = state.token_ids[state.num_cached : state.num_cached + num_prefix].copy()
    if num_prefix < missing:
        return Chunk(state, prefix, None)
    future = reference[state.num_output_tokens :]
    num_right = int(rng.integers(0, draft_length + 1))
    drafts = [
        future[i] if i < min(num_right, len(future)) else int(rng.integers(4, vocab_size)) for i in range(draft_length)
    ]
    return Chunk(state, prefix, DraftTree.chain(int(state.token_ids[-1]), drafts))


def decode(target, prompt_ids, references, num_new: int, *, draft_length: int = 4, piece: int = 6, seed: int = 0):
    """Greedy text of every prompt, [R] lists of ``num_new`` tokens; ``references`` only make drafts."""
    rng = np.random.default_rng(seed)
    draft_length = min(draft_length, target.max_draft_tokens)
    states = [RequestState(Request(str(i), p)) for i, p in enumerate(prompt_ids)]
    while live := [i for i, s in enumerate(states) if s.num_output_tokens < num_new]:
        chunks = [_chunk(states[i], references[i], rng, draft_length, target.vocab_size, piece) for i in live]
        assert all(target.reserve(chunk.state, chunk.num_tokens) for chunk in chunks)
        output = target.forward(chunks)
        keep, new_ids = [], []
        row = 0
        for chunk in chunks:
            nodes: list[int] = []
            tokens: list[int] = []
            if chunk.tree is not None:
                wanted = output.logits[output.cu_nodes[row] : output.cu_nodes[row + 1]].argmax(-1).tolist()
                nodes = [0]
                while nodes[-1] < draft_length and wanted[nodes[-1]] == chunk.tree.token_ids[nodes[-1] + 1]:
                    nodes.append(nodes[-1] + 1)
                tokens = [*chunk.tree.token_ids[1 : len(nodes)], wanted[nodes[-1]]]
                row += 1
            keep.append(nodes)
            new_ids.append(tokens)
        target.commit(chunks, keep)
        for chunk, nodes, tokens in zip(chunks, keep, new_ids, strict=True):
            chunk.state.num_cached += len(chunk.prefix_ids) + len(nodes)
            chunk.state.append(tokens)
    for state in states:
        target.release(state)
    return [state.output_ids[:num_new].tolist() for state in states]
