"""A block-diffusion head that copies from its first step: each row of a block k + 1 tokens ahead.

The head begins as layers of its target that look back a few tokens. Three things stop such a head from copying, and
each is mended here by a regression on a few texts:

- *One fused row serves all layers as context.* It is what the last layer would read; the keys and values of the others
  are fitted to it.
- *No layer ever saw a mask.* What says "mask" is taken out of everything that the layers read. So row k, at the place k
  behind the anchor, finds m tokens back what any row would, as far as it is known, and nothing at another mask.
- *The last layer should find where the context stood before.* Row k holds the tokens before the anchor as far back as
  they are from its place; a context row r holds those before r in the same way, and the token r itself. Where they
  agree, the token r is the guess of row k: an induction head (Olsson et al. 2022, arXiv 2209.11895) that skips what is
  not known yet. Its queries are a regression of the fused state at the guessed place on the row; both are compared in
  the directions that the regression explains, each as loudly as it is explained. Masks are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from specdec.drafters.block_training import forward_blocks
from specdec.drafters.decoder_parts import rms_norm
from specdec.drafters.diffusion_files import stacked_weights
from specdec.drafters.diffusion_head import DiffusionConfig, DiffusionHead
from specdec.errors import ConfigError
from specdec.online_training.data import Example

__all__ = ["copying_head"]

_SAMPLE = 14_000  # tokens of the regressions
_ANCHORS = 48  # of a text
_SLOW = 3e-3  # radians a token: rotary pairs that turn more slowly than this take part in the match
_MATCH = 60.0  # score of a perfect match
_RIDGE = 1e-3  # of the mean square
_FIT_RIDGE = 1e-4
_LEAST_NOISE = 0.1  # of the mean: what the regression leaves open is at least so much in every direction
_AWAY = 4.0  # a mask's key in dimensions that no query uses, against the size of a key


def copying_head(
    config: DiffusionConfig,
    weights: Mapping[str, Tensor],
    target: Any,
    *,
    begin_as: Sequence[int],
    examples: Sequence[Example],
    seed: int,
) -> tuple[DiffusionConfig, dict[str, Tensor]]:
    """Shape and weights of the same head with all that it takes to copy; every query head has keys of its own.

    Args:
        config: of a head whose layers are the target's ``begin_as``.
        weights: its own, by their published names, float32 on the CPU.
        target: where the layers come from.
        begin_as: target layers.
        examples: texts for the regressions.
        seed: of the directions that each head compares in.

    Raises:
        ConfigError: there is no layer before the last one, or the first state that the head reads is not what enters
            the last of ``begin_as``.
    """
    if len(begin_as) < 2 or config.hidden_layers[0] != begin_as[-1]:
        raise ConfigError(
            f"a copying head begins as two or more layers and reads first the state that enters the last of them, got "
            f"begin_as {tuple(begin_as)} and layers {config.hidden_layers}"
        )
    made = dict(weights)
    sample = _sample(target, config, begin_as, examples)
    _silence_masks(made, target, config)
    _fit_context(made, target, config, begin_as, sample)
    config = _own_keys(made, config)
    _find_again(made, target, config, sample, seed)
    return config, made


@dataclass(frozen=True, slots=True)
class _Text:
    """token_ids [1, T]; what the head reads, [1, T, layers * E]; the input [T, H] of every copied layer."""

    token_ids: Tensor
    states: Tensor
    entering: list[Tensor]


@torch.no_grad()
def _sample(target: Any, config: DiffusionConfig, begin_as: Sequence[int], examples: Sequence[Example]) -> list[_Text]:
    long_enough = [one for one in examples if len(one.token_ids) > 2 * config.block_size]
    ends = np.cumsum([len(example.token_ids) for example in long_enough])
    found = []
    for example in long_enough[: max(1, int(np.searchsorted(ends, _SAMPLE)))]:
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        out = target(input_ids=ids.to(target.device), output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = [state.float().cpu() for state in out.hidden_states]
        read = torch.cat([states[layer] for layer in config.hidden_layers], dim=-1)
        found.append(_Text(ids, read, [states[layer][0] for layer in begin_as]))
    if not found:
        raise ConfigError(f"a copying head needs a text of more than {2 * config.block_size} tokens")
    return found


def _own(weights: Mapping[str, Tensor], target: Any, config: DiffusionConfig, norm: str) -> Tensor:
    """[H]: where a norm puts what the mask's embedding has beside what all embeddings share."""
    embedding = target.get_input_embeddings().weight.detach().float().cpu()
    gain = weights[f"{norm}.weight"]
    common = normalize(embedding.mean(0) * gain, dim=0)
    said = embedding[config.mask_token_id] * gain
    return normalize(said - (said @ common) * common, dim=0)


_READERS = {"input_layernorm": ("self_attn.q", "self_attn.v"), "post_attention_layernorm": ("mlp.gate", "mlp.up")}


def _silence_masks(weights: dict[str, Tensor], target: Any, config: DiffusionConfig) -> None:
    """Effects: ``weights`` read nothing of what says "mask", but for the keys."""
    for layer in range(config.num_layers):
        for norm, parts in _READERS.items():
            own = _own(weights, target, config, f"layers.{layer}.{norm}")
            for part in parts:
                _forget(weights, f"layers.{layer}.{part}_proj.weight", own)


def _forget(weights: dict[str, Tensor], name: str, direction: Tensor) -> None:
    weights[name] = weights[name] - torch.outer(weights[name] @ direction, direction)


def _fit_context(
    weights: dict[str, Tensor], target: Any, config: DiffusionConfig, begin_as: Sequence[int], sample: list[_Text]
) -> None:
    """Effects: fused rows are what the last layer reads; ``weights`` make the other layers' keys and values of them."""
    last, width = config.num_layers - 1, config.hidden_size
    entering = [torch.cat(rows) for rows in zip(*(text.entering for text in sample), strict=True)]
    read = [
        rms_norm(rows, weights[f"layers.{layer}.input_layernorm.weight"], config.eps)
        for layer, rows in enumerate(entering)
    ]
    size = entering[last].square().mean(1).sqrt().median()
    weights["fc.weight"] = torch.zeros_like(weights["fc.weight"])
    weights["fc.weight"][:, :width] = torch.eye(width) / size
    weights["hidden_norm.weight"] = weights[f"layers.{last}.input_layernorm.weight"].clone()
    for layer, index in enumerate(begin_as[:-1]):
        own = _own(weights, target, config, f"layers.{layer}.input_layernorm")
        rows = torch.cat([read[last], read[layer]]).double()
        for part in ("k", "v"):
            name = f"layers.{layer}.self_attn.{part}_proj.weight"
            source = getattr(target.base_model.layers[index].self_attn, f"{part}_proj").weight.detach().float().cpu()
            wanted = (read[layer] @ source.T).double().repeat(2, 1)
            weights[name] = _regression(rows, wanted, _FIT_RIDGE).float()
            _forget(weights, name, own)


def _regression(read: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """[made, H] float64: the matrix that makes [N, made] of [N, H]."""
    few = ridge * float(read.square().mean()) * len(read) * torch.eye(read.shape[1], dtype=read.dtype)
    found: Tensor = torch.linalg.solve(read.T @ read + few, read.T @ wanted).T
    return found


def _own_keys(weights: dict[str, Tensor], config: DiffusionConfig) -> DiffusionConfig:
    """The shape in which every query head has keys and values of its own. Effects: those of ``weights``."""
    group = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        for part in ("k", "v"):
            name = f"layers.{layer}.self_attn.{part}_proj.weight"
            by_head = weights[name].unflatten(0, (config.num_kv_heads, config.head_dim))
            weights[name] = by_head.repeat_interleave(group, dim=0).flatten(0, 1)
    return replace(config, num_kv_heads=config.num_heads)


def _find_again(
    weights: dict[str, Tensor], target: Any, config: DiffusionConfig, sample: list[_Text], seed: int
) -> None:
    """Effects: the last layer of ``weights`` finds where the context of a row stood before."""
    rows, states, masks = _rows(weights, target, config, sample, seed)
    attention = f"layers.{config.num_layers - 1}.self_attn"
    query, key = _match(config, rows, states, seed)
    context = torch.cat([rms_norm(text.entering[-1], weights["hidden_norm.weight"], config.eps) for text in sample])
    size = (context @ key.T).unflatten(1, (-1, config.head_dim)).norm(dim=2).mean()
    idle = int(query.unflatten(0, (-1, 2, config.head_dim // 2)).square().sum((0, 1, 3)).argmin())
    key[torch.arange(config.num_heads) * config.head_dim + idle] += _AWAY * size * _telling(masks, context)
    weights[f"{attention}.q_proj.weight"], weights[f"{attention}.k_proj.weight"] = query, key
    for part in ("q", "k"):
        if (name := f"{attention}.{part}_norm.weight") in weights:
            weights[name] = torch.full_like(weights[name], (_MATCH / config.head_dim**0.5) ** 0.5)


def _telling(masks: Tensor, context: Tensor) -> Tensor:
    """[H]: a direction in which masks [M, H] are 1 and context rows [N, H] are 0."""
    ridge = _RIDGE * torch.eye(masks.shape[1])
    found = torch.linalg.solve(masks.T @ masks / len(masks) + context.T @ context / len(context) + ridge, masks.mean(0))
    scaled: Tensor = found / (masks @ found).mean()
    return scaled


@torch.no_grad()
def _rows(
    weights: Mapping[str, Tensor], target: Any, config: DiffusionConfig, sample: list[_Text], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, H] each: what the last layer reads at rows of blocks, the fused states at the places guessed; masks alone."""
    last = config.num_layers - 1
    before = {name: weight for name, weight in weights.items() if not name.startswith(f"layers.{last}.")}
    before["norm.weight"] = weights[f"layers.{last}.input_layernorm.weight"]
    shorter = replace(config, windows=config.windows[:last], causal=config.causal[:last])
    embedding = target.get_input_embeddings().weight.detach().float().cpu()
    head = DiffusionHead(
        shorter, stacked_weights(before, last), embed=lambda ids: embedding[ids], project=lambda x: x, target_ids=None
    )
    generator = torch.Generator().manual_seed(seed)
    rows, states, masks = [], [], []
    for text in sample:
        length = text.token_ids.shape[1] - config.block_size
        anchors = (1 + torch.randperm(length - 1, generator=generator)[:_ANCHORS]).sort().values[None]
        found = forward_blocks(head, text.states, text.token_ids, anchors)[0]  # [A, rows, H]
        first = 1 if config.guesses_next else 0
        places = anchors[0][:, None] + first + torch.arange(config.block_size)
        rows.append(found.flatten(0, 1))
        states.append(head.fuse(text.states[0])[places.flatten()])
        masks.append(found[:, 1:].flatten(0, 1))
    return torch.cat(rows), torch.cat(states), torch.cat(masks)


def _match(config: DiffusionConfig, rows: Tensor, states: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """[heads * D, H] each: queries of rows [N, H] and keys of states [N, H]; each head in directions of its own."""
    rows, states = rows.double(), states.double()
    read, made = _beside_mean(rows), _beside_mean(states)
    expected = _regression(read, made, _RIDGE)
    rest = made - read @ expected.T
    white = _power(rest.T @ rest / len(rest), -0.5, _LEAST_NOISE)
    told = read @ expected.T @ white
    strength, axes = torch.linalg.eigh(told.T @ told / len(told))
    strength = strength.clamp_min(0.0)
    metric = (strength / (1 + strength)).sqrt()[:, None] * axes.T @ white
    half, width = config.head_dim // 2, config.hidden_size
    speeds = float(str(config.rope["rope_theta"])) ** (-torch.arange(half) / half)
    slow = (speeds < _SLOW).nonzero().flatten()
    slow = slow if len(slow) else torch.tensor([half - 1])
    pairs = torch.cat([slow, slow + half])[:width]
    generator = torch.Generator().manual_seed(seed)
    query = torch.zeros(config.num_heads, config.head_dim, width)
    key = torch.zeros_like(query)
    of_rows, of_states = (normalize(one.mean(0), dim=0) for one in (rows, states))
    for head in range(config.num_heads):
        seen = torch.linalg.qr(torch.randn(width, len(pairs), generator=generator))[0].T.double() @ metric
        asked = seen @ expected
        query[head, pairs] = (asked - torch.outer(asked @ of_rows, of_rows)).float()
        key[head, pairs] = (seen - torch.outer(seen @ of_states, of_states)).float()
    sizes = [(x.float() @ w.flatten(0, 1).T).norm(dim=1).median() for x, w in ((rows, query), (states, key))]
    loud = (_MATCH * config.num_heads * config.head_dim**0.5) ** 0.5  # for targets whose queries and keys have no norm
    return query.flatten(0, 1) * (loud / sizes[0]), key.flatten(0, 1) * (loud / sizes[1])


def _beside_mean(rows: Tensor) -> Tensor:
    """Rows without the direction of their mean."""
    shared = normalize(rows.mean(0), dim=0)
    return rows - torch.outer(rows @ shared, shared)


def _power(matrix: Tensor, exponent: float, least: float) -> Tensor:
    """A power of a symmetric matrix whose eigenvalues are raised by a share of their mean."""
    sizes, directions = torch.linalg.eigh(matrix)
    found: Tensor = directions * (sizes + least * sizes.mean()) ** exponent @ directions.T
    return found
