"""Small targets with one multi-token-prediction layer each, file by file as each publisher lays them out.

``python -m tests.drafters.mtp_checkpoints DIR`` writes one of each into a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, MellumConfig

__all__ = ["LAYOUTS", "VOCAB_SIZE", "load_target", "write"]

VOCAB_SIZE, WIDTH, NUM_LAYERS, INNER, EXPERTS = 257, 32, 2, 48, 8
Weights = dict[str, Tensor]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "intermediate_size": INNER, "moe_intermediate_size": 16,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None, "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_SIGMOID_ROUTER: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
LAYOUTS: dict[str, Any] = {
    "deepseek-v3": lambda: DeepseekV3Config(
        **_COMMON, **_SIGMOID_ROUTER, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "glm-4.5": lambda: Glm4MoeConfig(
        **_COMMON, **_SIGMOID_ROUTER, num_key_value_heads=2, head_dim=16, attention_bias=True, use_qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    ),
    "mellum": lambda: MellumConfig(
        **_COMMON, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def _random(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape) / shape[-1] ** 0.5


def _norm(width: int = WIDTH) -> Tensor:
    return 1 + 0.3 * torch.randn(width)


def _linear(prefix: str, **shapes: tuple[int, int]) -> Weights:
    return {f"{prefix}{name}.weight": _random(*shape) for name, shape in shapes.items()}


def _gated(prefix: str, inner: int) -> Weights:
    return _linear(prefix, gate_proj=(inner, WIDTH), up_proj=(inner, WIDTH), down_proj=(WIDTH, inner))


def _layer(prefix: str, config: Any) -> Weights:
    """Norms and experts of a decoder layer."""
    weights = {f"{prefix}{name}.weight": _norm() for name in ("input_layernorm", "post_attention_layernorm")}
    weights[f"{prefix}mlp.gate.weight"] = _random(EXPERTS, WIDTH)
    for expert in range(EXPERTS):
        weights |= _gated(f"{prefix}mlp.experts.{expert}.", config.moe_intermediate_size)
    if config.model_type != "mellum":
        weights |= _gated(f"{prefix}mlp.shared_experts.", config.moe_intermediate_size)
        weights[f"{prefix}mlp.gate.e_score_correction_bias"] = 0.3 * torch.randn(EXPERTS)
    return weights


def _latent_attention(prefix: str, config: Any) -> Weights:
    heads, queries = config.num_attention_heads, config.q_lora_rank
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    return {
        **_linear(
            prefix, q_a_proj=(queries, WIDTH), q_b_proj=(heads * (config.qk_nope_head_dim + rope), queries),
            kv_a_proj_with_mqa=(latent + rope, WIDTH), o_proj=(WIDTH, heads * config.v_head_dim),
            kv_b_proj=(heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        ),
        f"{prefix}q_a_layernorm.weight": _norm(queries),
        f"{prefix}kv_a_layernorm.weight": _norm(latent),
    }  # fmt: skip


def _attention(prefix: str, config: Any) -> Weights:
    dim = config.head_dim
    rows = {"q_proj": config.num_attention_heads * dim}
    rows |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * dim)
    weights = _linear(prefix, o_proj=(WIDTH, rows["q_proj"]), **{name: (n, WIDTH) for name, n in rows.items()})
    weights |= {f"{prefix}{name}.weight": _norm(dim) for name in ("q_norm", "k_norm")}
    if config.attention_bias:
        weights |= {f"{prefix}{name}.bias": 0.3 * torch.randn(n) for name, n in rows.items()}
    return weights


def _mtp_weights(config: Any, target: Weights) -> Weights:
    """The layer as published, with the copies of embedding and head that some checkpoints carry."""
    if config.model_type == "mellum":
        layer = "mtp.layers.0."
        names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
        extra: Weights = {"mtp.fc.weight": _random(WIDTH, 2 * WIDTH)}
    else:
        layer = f"model.layers.{NUM_LAYERS}."
        names = (f"{layer}enorm", f"{layer}hnorm", f"{layer}shared_head.norm")
        extra = {
            f"{layer}eh_proj.weight": _random(WIDTH, 2 * WIDTH),
            f"{layer}embed_tokens.weight": target["model.embed_tokens.weight"].clone(),
            f"{layer}shared_head.head.weight": target["lm_head.weight"].clone(),
        }
    attend = _latent_attention if config.model_type == "deepseek_v3" else _attention
    norms = {f"{name}.weight": _norm() for name in names}
    return {**extra, **norms, **_layer(layer, config), **attend(f"{layer}self_attn.", config)}


def write(layout: str, path: Path, *, seed: int = 0) -> Path:
    """Write a target with its layer, in two shards and an index; the same bytes for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LAYOUTS[layout]()).eval()
        for parameter in model.parameters():
            parameter.data += 0.08 * torch.randn_like(parameter)
        extra = _mtp_weights(model.config, model.state_dict())
    model.save_pretrained(path)
    first, second = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
    (path / "model.safetensors").rename(path / first)
    save_file(extra, path / second, metadata={"format": "pt"})
    where = dict.fromkeys(_names(path / first), first) | dict.fromkeys(extra, second)
    size = sum(weight.nbytes for weight in (*model.state_dict().values(), *extra.values()))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return path


def _names(file: Path) -> list[str]:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return [name for name in json.loads(file.read_bytes()[8 : 8 + size]) if name != "__metadata__"]


def load_target(path: Path) -> Any:
    """What anybody makes of the checkpoint: transformers leaves the layer out."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def main() -> None:
    """One checkpoint of each layout."""
    for layout in LAYOUTS:
        write(layout, Path(sys.argv[1]) / layout)


if __name__ == "__main__":
    main()
