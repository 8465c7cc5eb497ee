"""The shape and the first weights of a new block-diffusion head.

A head may begin as some of its target's own layers. Their keys and values of the context are then made from what the
head reads of the target, ``hidden_norm(fc(states))``, which is one row of the model's width for all layers: by a
regression of all that they were on the first of the states alone, on a few texts. From several states one row would
serve every layer a little and none well (measured: a head that copies from the first step, or does not); the other
states begin with zeros and join in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.diffusion_export import new_weights, unstacked_weights
from specdec.drafters.diffusion_head import DiffusionConfig, MarkovKind
from specdec.errors import ConfigError, UnsupportedError
from specdec.online_training.data import Example, collate
from specdec.online_training.train_block_copy import copying_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockShape", "new_block_head", "published_layers"]

_RIDGE = 1e-3  # of the mean square of the states
_SAMPLE = 8_000  # tokens of the regression
_BIGRAM_PRIOR = 8.0  # seen pairs that a token's own frequency stands for


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """What a new head looks like; widths and heads are its target's.

    Args:
        guesses_next: DSpark's reading of rows; False: DFlash's.
        num_guesses: tokens of a block.
        hidden_layers: states that it reads, as indices into ``output_hidden_states``; the last one, which went through
            the target's final norm, is not among them.
        num_layers: decoder layers.
        begin_as: the target's layers that they begin as; empty: random weights.
        is_copying: these are made to copy from the first step, see ``train_block_copy``.
        mask_token_id: a token that no text holds; None: the target's padding token.
        markov: kind of the Markov head.
        rank: of the Markov head.
        has_confidence: with a confidence head, which also reads the Markov head.
        inner_size: width of the MLPs; 0: the target's. Layers of the target keep their loudest units.
        max_length: longest text of the training.
        seed: of the weights.
    """

    guesses_next: bool
    num_guesses: int
    hidden_layers: tuple[int, ...]
    num_layers: int
    begin_as: tuple[int, ...] = ()
    is_copying: bool = False
    mask_token_id: int | None = None
    markov: MarkovKind = "none"
    rank: int = 0
    has_confidence: bool = False
    inner_size: int = 0
    max_length: int = 2048
    seed: int = 0


def published_layers(num_layers: int) -> tuple[int, ...]:
    """The states that published heads read: five, evenly from the output of layer 1 to that of layer N - 3 (DFlash).

    Fewer in targets of less than eight layers; as indices into ``output_hidden_states``.
    """
    count = max(1, min(5, num_layers - 3))
    if count == 1:
        return (min(num_layers // 2 + 1, num_layers - 1),)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) + 1 for i in range(count))


def new_block_head(
    shape: BlockShape, target: PreTrainedModel, examples: Sequence[Example]
) -> tuple[DiffusionConfig, dict[str, Tensor]]:
    """Shape and first weights, float32, on the CPU, by their published names.

    Args:
        shape: what is asked for.
        target: any decoder.
        examples: of the training: for the regression, and for the Markov head, which begins with how much likelier a
            token is behind another one than at large.

    Raises:
        ConfigError: the shape does not fit the target.
        UnsupportedError: the target's layers hold weights that a head has no place for.
    """
    config = _config(shape, target.config)
    text = target.config.get_text_config()
    vocab_size = int(text.vocab_size)
    inner = shape.inner_size or int(text.intermediate_size)
    if inner > int(text.intermediate_size):
        raise ConfigError(f"inner_size must be at most the target's {text.intermediate_size}, got {inner}")
    drawn = new_weights(config, vocab_size=vocab_size, inner_size=inner, rank=shape.rank, seed=shape.seed)
    weights = unstacked_weights(config, drawn)
    if shape.begin_as:
        _copy_layers(shape, target, examples, weights, inner)
    if shape.is_copying:
        config, weights = copying_head(
            config, weights, target, begin_as=shape.begin_as, examples=examples, seed=shape.seed
        )
    if shape.markov != "none":
        before, after = _bigrams(examples, vocab_size, shape.rank)
        weights |= {"markov_head.markov_w1.weight": before, "markov_head.markov_w2.weight": after}
    return config, weights


def _config(shape: BlockShape, target: Any) -> DiffusionConfig:
    text = target.get_text_config()
    num_target = int(text.num_hidden_layers)
    mask = shape.mask_token_id if shape.mask_token_id is not None else getattr(text, "pad_token_id", None)
    if mask is None or not 0 <= mask < int(text.vocab_size):
        raise ConfigError(f"the mask needs a token of the target's that no text holds, got {mask}: name one")
    for name, layers in (("layers", shape.hidden_layers), ("begin_as", shape.begin_as)):
        if not all(0 <= layer < num_target for layer in layers):
            raise ConfigError(f"{name} must be in 0..{num_target - 1}, got {layers}")
    if shape.begin_as and len(shape.begin_as) != shape.num_layers:
        raise ConfigError(f"begin_as must name one layer for each of {shape.num_layers}, got {shape.begin_as}")
    if (shape.markov != "none") != (shape.rank > 0):
        raise ConfigError(f"a Markov head has a rank > 0, and only it, got {shape.markov!r} with {shape.rank}")
    width, num_heads = int(text.hidden_size), int(text.num_attention_heads)
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10_000.0)
    return DiffusionConfig(
        hidden_size=width, target_hidden_size=width, num_heads=num_heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(text, "head_dim", None) or width // num_heads),
        eps=float(getattr(text, "rms_norm_eps", 1e-6)), hidden_layers=shape.hidden_layers,
        rope={"rope_type": "default", "rope_theta": theta}, max_length=shape.max_length,
        block_size=shape.num_guesses if shape.guesses_next else shape.num_guesses + 1, mask_token_id=mask,
        guesses_next=shape.guesses_next, windows=(0,) * shape.num_layers, causal=(False,) * shape.num_layers,
        markov=shape.markov, has_confidence=shape.has_confidence,
        confidence_reads_markov=shape.has_confidence and shape.markov != "none",
    )  # fmt: skip


def _copy_layers(
    shape: BlockShape, target: PreTrainedModel, examples: Sequence[Example], weights: dict[str, Tensor], inner: int
) -> None:
    """Put the target's layers and last norm in place, and ``fc`` and the context's keys and values that go with them.

    Effects: ``weights``.
    """
    body: Any = target.base_model
    layers = [body.layers[layer] for layer in shape.begin_as]
    for place, layer in enumerate(layers):
        for name in [name for name in weights if name.startswith(f"layers.{place}.")]:
            del weights[name]
        for name, weight in layer.state_dict().items():
            if name.split(".")[-2] not in _KNOWN:
                raise UnsupportedError(
                    f"{type(target).__name__} has layers with {name}, which no head has: begin with random weights"
                )
            weights[f"layers.{place}.{name}"] = weight.detach().float().cpu().clone()
        _narrow(weights, f"layers.{place}.mlp", inner)
    weights["norm.weight"] = body.norm.weight.detach().float().cpu().clone()
    read, made = _keys_and_values(shape, target, layers, examples)
    ridge = _RIDGE * float(read.square().mean()) * len(read)
    solved = torch.linalg.solve(read.T @ read + ridge * torch.eye(read.shape[1], dtype=read.dtype), read.T @ made)
    ways = torch.cat([_ways(layer).double() for layer in layers])  # [made, H]
    fused = torch.linalg.lstsq(ways, solved.T).solution  # [H, E]
    size = (read @ fused.T).square().mean().sqrt()
    weights["fc.weight"] = torch.zeros_like(weights["fc.weight"])
    weights["fc.weight"][:, : fused.shape[1]] = (fused / size).float()
    weights["hidden_norm.weight"] = torch.full_like(weights["hidden_norm.weight"], float(size))


def _narrow(weights: dict[str, Tensor], name: str, size: int) -> None:
    """Keep the units of an MLP that say most: by the product of the norms of what leads in and out.

    Effects: ``weights``.
    """
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(size).indices.sort().values
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        full = f"{name}.{part}_proj.weight"
        weights[full] = weights[full].index_select(axis, kept)


def _ways(layer: Any) -> Tensor:
    """[2 * Hkv * D, H]: to the keys and values of a layer."""
    attention = layer.self_attn
    return torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach().float().cpu()


@torch.no_grad()
def _keys_and_values(
    shape: BlockShape, target: Any, layers: Sequence[Any], examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """float64, on the CPU: [T, E] states of a few texts and [T, made] keys and values of the layers there."""
    ends = np.cumsum([len(example.token_ids) for example in examples])
    read, made = [], []
    for example in examples[: max(1, int(np.searchsorted(ends, _SAMPLE)))]:
        ids = collate([example]).token_ids.to(target.device)
        states = target(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        read.append(states[shape.hidden_layers[0]][0])
        entering = [
            layer.input_layernorm(states[index][0]) for index, layer in zip(shape.begin_as, layers, strict=True)
        ]
        made.append(
            torch.cat([rows.cpu().float() @ _ways(layer).T for rows, layer in zip(entering, layers, strict=True)], -1)
        )
    return torch.cat(read).double().cpu(), torch.cat(made).double()


def _bigrams(examples: Sequence[Example], vocab_size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices [V, rank] whose product [before, after] is how much likelier a pair is than its second token alone.

    ``log P(after | before) - log P(after)`` of the pairs seen in the texts, where that is positive; P is smoothed by
    the token's own frequency.
    """
    texts = [example.token_ids.astype(np.int64) for example in examples]
    codes = np.concatenate([text[:-1] * vocab_size + text[1:] for text in texts])
    pairs, counts = np.unique(codes, return_counts=True)
    before, after = np.divmod(pairs, vocab_size)
    alone = np.bincount(np.concatenate(texts), minlength=vocab_size) / sum(map(len, texts))
    seen = np.bincount(before, weights=counts, minlength=vocab_size)
    gain = np.log((counts / alone[after] + _BIGRAM_PRIOR) / (seen[before] + _BIGRAM_PRIOR))
    kept = gain > 0
    places = torch.from_numpy(np.stack([before[kept], after[kept]]))
    with torch.random.fork_rng(devices=[]), torch.sparse.check_sparse_tensor_invariants():
        torch.manual_seed(0)
        table = torch.sparse_coo_tensor(places, torch.from_numpy(gain[kept]).float(), (vocab_size, vocab_size))
        left, sizes, right = torch.svd_lowrank(table, q=min(rank, vocab_size), niter=4)
    found = []
    for side in (left, right):
        matrix = torch.zeros(vocab_size, rank)
        matrix[:, : len(sizes)] = side * sizes.sqrt()
        found.append(matrix)
    return found[0], found[1]


_KNOWN = (
    "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
