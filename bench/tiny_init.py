"""Mimetic start for the bundled model: an induction circuit that copies by n-gram match before any training.

A few million tokens are too few for copying heads to form reliably by themselves, so the first two layers start as
the circuit that interpretability work finds in trained models; all of it is ordinary weights that training is free
to change, and the other layers start as usual with zero output projections.

Layer 0: head m looks m+1 tokens back. All its keys are one constant vector, read from a constant direction that
every embedding holds (QK-norm removes the amplitude); its queries are the same vector turned by minus m+1 positions,
so the rotary score sum_i a_i^2 cos(theta_i (d - m - 1)) peaks at distance d = m+1. It writes a short code of the
token found there into subspace m.
Layer 1: a key holds the codes of the tokens before it, a query those of the current token and the ones before it,
both mapped to the slow rotary pairs that hardly turn within the context. Where they agree, the same n-gram stood
before; the value found there is the token that followed it, and the output writes it so that the tied unembedding
raises it.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads", section on the mechanism; Trockman and Kolter
2023, "Mimetic Initialization of Self-Attention Layers", for the idea of starting from what training would build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CircuitSpec", "init_induction"]

_WINDOW_SCORE = 9.0  # a window's score at distance 0: a thousand far tokens together then weigh less than the window


@dataclass(frozen=True, slots=True)
class CircuitSpec:
    """Strengths of the circuit; the defaults were found by free-running copies of held-out files at step 0."""

    windows: tuple[int, ...] = (32,)  # widths in tokens of layer 0's last heads; the others look back 1, 2, ...
    window_weight: float = 0.8  # of a window's code in the match, where the last token's has 1
    decay: float = 0.85  # of the weight per token further back: near tokens decide, far ones break ties
    code_dims: int = 15  # dimensions of one earlier token's code
    look_back: float = 80.0  # peak attention score of layer 0; its spectrum needs this much to single out one position
    match: float = 60.0  # attention score of a perfect match in layer 1
    write: float = 4.0  # output of layer 1 relative to the embedding
    embedding_norm: float = 1.0
    final_gain: float = 1.0  # weight of the final norm: sets how sure the first predictions are
    slow_pairs: int = 14  # rotary pairs that carry content: the slowest ones
    spectrum: float = 5.0  # a_i^2 ~ exp(-i / spectrum): fast pairs separate neighbours, slower ones far positions


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return [rows, columns] float32 with orthonormal columns."""
    q: torch.Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    return q


def _frequencies(config: Any) -> torch.Tensor:
    half = config.head_dim // 2
    return torch.pow(float(config.rope_parameters["rope_theta"]), -torch.arange(half, dtype=torch.float32) / half)


def _queries(config: Any, spec: CircuitSpec) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """Return layer 0's constant key [D], each head's query [D], and how many tokens each head averages."""
    half, theta = config.head_dim // 2, _frequencies(config)
    used = half - spec.slow_pairs
    index = torch.arange(half, dtype=torch.float32)
    key = torch.cat([(index < used).float(), torch.zeros(half)])
    key /= key.norm()
    queries, averaged = [], []
    for back in range(1, config.num_attention_heads - len(spec.windows) + 1):
        amplitude = torch.exp(-index / (2 * spec.spectrum)) * (index < used)
        query = torch.cat([amplitude * (back * theta).cos(), -amplitude * (back * theta).sin()])
        queries.append(query / query.norm())
        averaged.append(1.0)
    for width in spec.windows:
        band = ((theta > 0.35 / width) & (theta < 1.2 / width) & (index < used)).float()
        wave = torch.cat([band, torch.zeros(half)])
        peak = _WINDOW_SCORE / spec.look_back / (wave @ key)  # the score at distance 0, as a share of the largest
        idle = torch.zeros(config.head_dim)
        idle[-1] = 1.0  # a slow pair, where the key is 0: takes up the rest of the norm that QK-norm fixes
        wave = wave * peak
        queries.append(wave + idle * (1 - wave @ wave).clamp(min=0).sqrt())
        averaged.append(float(width))
    return key, queries, averaged


def _look_back_layer(attention: Any, config: Any, spec: CircuitSpec, bases: list[torch.Tensor]) -> None:
    """Make each head of ``attention`` copy the code of the tokens it looks at into its own subspace."""
    constant, code, *slots = bases
    dim = config.head_dim
    key, queries, averaged = _queries(config, spec)
    for group in range(config.num_key_value_heads):
        rows = slice(group * dim, (group + 1) * dim)
        attention.k_proj.weight[rows] = torch.outer(key, constant)
        attention.v_proj.weight[rows] = 0.0
        attention.v_proj.weight[rows][: spec.code_dims] = code.T
    attention.o_proj.weight.zero_()
    for head, (slot, query, count) in enumerate(zip(slots, queries, averaged, strict=True)):
        attention.q_proj.weight[head * dim : (head + 1) * dim] = torch.outer(query, constant)
        # The input norm scales the embedding to norm sqrt(hidden); undo it, so that codes keep the embedding's scale.
        # A mean of n unrelated codes is sqrt(n) times shorter than one.
        scale = (2 * count) ** 0.5 * spec.embedding_norm / config.hidden_size**0.5
        attention.o_proj.weight[:, head * dim : head * dim + spec.code_dims] = scale * slot
    gain = (spec.look_back / dim**0.5) ** 0.5
    attention.q_norm.weight.fill_(gain)
    attention.k_norm.weight.fill_(gain)


def _match_layer(
    attention: Any, config: Any, spec: CircuitSpec, bases: list[torch.Tensor], generator: torch.Generator
) -> None:
    """Make the heads of ``attention`` find where this context stood before and predict what followed it."""
    constant, code, *slots = bases
    dim, half, width = config.head_dim, config.head_dim // 2, 2 * spec.slow_pairs
    slow = torch.cat([torch.arange(half - spec.slow_pairs, half), torch.arange(dim - spec.slow_pairs, dim)])
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    backs, windows = slots[: len(slots) - len(spec.windows)], slots[len(slots) - len(spec.windows) :]
    used = torch.cat([constant[:, None], *slots], dim=1)
    random = torch.randn(config.hidden_size, config.hidden_size, generator=generator)
    identity, _ = torch.linalg.qr(random - used @ (used.T @ random))  # token identity lives outside `used`
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).weight.zero_()
    weights = [spec.decay**m for m in range(len(backs))]
    for group in range(config.num_key_value_heads):
        mixes = [_orthogonal(width, spec.code_dims, generator) for _ in slots]
        bags = sum(spec.window_weight * t @ s.T for t, s in zip(mixes[len(backs) :], windows, strict=True))
        grams = zip(weights, mixes[: len(backs)], backs, strict=True)
        attention.k_proj.weight[slow + group * dim] = bags + sum(w * t @ s.T for w, t, s in grams)
        share = (config.hidden_size - used.shape[1]) // config.num_key_value_heads
        value = identity[:, group * share : group * share + min(dim, share)]
        attention.v_proj.weight[group * dim : group * dim + value.shape[1]] = value.T
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            grams = zip(weights, mixes[: len(backs)], [code, *backs[:-1]], strict=True)
            attention.q_proj.weight[slow + head * dim] = bags + sum(w * t @ s.T for w, t, s in grams)
            scale = spec.write * spec.embedding_norm / config.hidden_size**0.5 / heads_per_group
            attention.o_proj.weight[:, head * dim : head * dim + value.shape[1]] = scale * value
    gain = (spec.match / dim**0.5) ** 0.5
    attention.q_norm.weight.fill_(gain)
    attention.k_norm.weight.fill_(gain)


@torch.no_grad()
def init_induction(model: Any, *, seed: int, spec: CircuitSpec | None = None) -> None:
    """Write the circuit into a freshly made Qwen3-shaped model with tied embeddings.

    Args:
        model: a ``Qwen3ForCausalLM`` on the CPU in float32 with at least 2 layers.
        seed: of the random projections.
        spec: strengths; the defaults when None.

    Effects: overwrites the embedding, layers 0 and 1's attention and the final norm's weight; zeroes every MLP's
    output projection and the attention output projections of the layers above.
    """
    spec = spec or CircuitSpec()
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    heads = config.num_attention_heads
    basis = _orthogonal(config.hidden_size, 1 + heads * spec.code_dims, generator)
    constant, slots = basis[:, 0], list(torch.split(basis[:, 1:], spec.code_dims, dim=1))
    tokens = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    tokens -= tokens @ basis @ basis.T  # identity, constant and codes start in subspaces of their own
    tokens *= spec.embedding_norm / tokens.norm(dim=1, keepdim=True)
    model.model.embed_tokens.weight.copy_(tokens + spec.embedding_norm * constant)
    projected = torch.randn(config.hidden_size, spec.code_dims, generator=generator)
    code, _ = torch.linalg.qr(projected - basis @ (basis.T @ projected))
    bases = [constant, code, *slots]
    layers = model.model.layers
    for layer in layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    _look_back_layer(layers[0].self_attn, config, spec, bases)
    _match_layer(layers[1].self_attn, config, spec, bases, generator)
    model.model.norm.weight.fill_(spec.final_gain)
