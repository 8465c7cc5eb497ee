"""New block-diffusion heads, and writing them as others publish theirs, so that a training can begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.diffusion_head import DiffusionConfig
from specdec.errors import ConfigError

__all__ = ["new_weights", "published_form", "unstacked_weights"]


def new_weights(
    config: DiffusionConfig, *, vocab_size: int, inner_size: int, rank: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of an untrained head in float32, by the names of `specdec.drafters.diffusion_head`.

    Matrices are drawn with a standard deviation of 0.02, and ``markov_w2`` is zero, so that training starts from
    independent guesses. The embedding and the ``lm_head`` are the target's.

    Args:
        config: its shape.
        vocab_size: V of the target.
        inner_size: width of the MLPs.
        rank: of the Markov head, where there is one.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim

    def matrix(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    keys = config.num_kv_heads * config.head_dim
    weights = {
        "fc.weight": matrix(hidden, len(config.hidden_layers) * config.target_hidden_size),
        "hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
        "kv_proj.weight": matrix(config.num_layers, 2, keys, hidden),
        "k_norm.weight": torch.ones(config.num_layers, config.head_dim),
    }
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": torch.ones(hidden),
            f"{name}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{name}.self_attn.q_proj.weight": matrix(queries, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, queries),
            f"{name}.self_attn.q_norm.weight": torch.ones(config.head_dim),
            f"{name}.mlp.gate_proj.weight": matrix(inner_size, hidden),
            f"{name}.mlp.up_proj.weight": matrix(inner_size, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, inner_size),
        }
    if config.markov != "none":
        weights["markov_head.markov_w1.weight"] = matrix(vocab_size, rank)
        weights["markov_head.markov_w2.weight"] = torch.zeros(vocab_size, rank)
    shapes = {"gated": ("gate_proj", rank, hidden + rank), "rnn": ("joint_proj", 3 * rank, hidden + 2 * rank)}
    if config.markov in shapes:
        name, rows, columns = shapes[config.markov]
        weights[f"markov_head.{name}.weight"] = matrix(rows, columns)
        weights[f"markov_head.{name}.bias"] = torch.zeros(rows)
    if config.has_confidence:
        reads = hidden + rank * config.confidence_reads_markov
        weights |= {"confidence_head.proj.weight": matrix(1, reads), "confidence_head.proj.bias": torch.zeros(1)}
    return weights


def published_form(
    config: DiffusionConfig, weights: Mapping[str, Tensor], *, vocab_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``config.json`` and ``model.safetensors`` of a head hold: DeepSpec's dialect, or z-lab's for a plain DFlash.

    Args:
        config: of the head; full attention that is not causal, halves as rotary pairs, unscaled ends.
        weights: by the names of `specdec.drafters.diffusion_head`.
        vocab_size: of the target.

    Raises:
        ConfigError: no dialect can say this.
    """
    plain = (config.is_interleaved, any(config.windows), any(config.causal), config.softcap) == (False, False, False, 0)
    if not plain or (config.embedding_scale, config.output_scale) != (1, 1):
        raise ConfigError("windows, causal blocks, neighbours as rotary pairs and scaled ends are read, not written")
    if not config.guesses_next and (config.markov != "none" or config.has_confidence):
        raise ConfigError("a head whose rows guess their own place is written without a Markov or confidence head")
    ids = [layer - 1 for layer in config.hidden_layers]
    said: dict[str, Any] = {
        "model_type": "qwen3", "hidden_size": config.hidden_size, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": len(weights["layers.0.mlp.gate_proj.weight"]), "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.eps, "max_position_embeddings": config.max_length, "vocab_size": vocab_size,
        "rope_parameters": dict(config.rope), "layer_types": ["full_attention"] * config.num_layers,
        "block_size": config.block_size, "tie_word_embeddings": False,
    }  # fmt: skip
    if config.guesses_next:
        rank = weights["markov_head.markov_w1.weight"].shape[1] if config.markov != "none" else 0
        said |= {
            "architectures": ["Qwen3DSparkModel"], "target_layer_ids": ids, "mask_token_id": config.mask_token_id,
            "enable_confidence_head": config.has_confidence, "markov_rank": rank,
            "confidence_head_with_markov": config.confidence_reads_markov,
        }  # fmt: skip
        if rank:
            said["markov_head_type"] = config.markov
    else:
        nested = {"mask_token_id": config.mask_token_id, "target_layer_ids": ids}
        said |= {"architectures": ["DFlashDraftModel"], "dflash_config": nested}
    return said, unstacked_weights(config, weights)


def unstacked_weights(config: DiffusionConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their published names, from those of `specdec.drafters.diffusion_head`."""
    stacked = ("kv_proj.weight", "kv_proj.bias", "k_norm.weight")
    published = {name: weight.detach().contiguous() for name, weight in weights.items() if name not in stacked}
    for layer in range(config.num_layers):
        name = f"layers.{layer}.self_attn"
        for end in ("weight", "bias"):
            if f"kv_proj.{end}" in weights:
                parts = weights[f"kv_proj.{end}"][layer].detach()
                published |= {f"{name}.{part}_proj.{end}": parts[i].clone() for i, part in enumerate("kv")}
        if "k_norm.weight" in weights:
            published[f"{name}.k_norm.weight"] = weights["k_norm.weight"][layer].detach().clone()
    return published
