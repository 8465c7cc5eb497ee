"""Small EAGLE checkpoints with random weights, file by file as each publisher lays them out.

``python -m tests.drafters.eagle_checkpoints DIR`` writes one of each, and a target for them, into a directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["LAYOUTS", "NUM_LAYERS", "VOCAB_SIZE", "WIDTH", "eagle_target", "write"]

VOCAB_SIZE, WIDTH, NUM_LAYERS, INNER, NUM_DRAFT_IDS = 257, 32, 8, 48, 120
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
Weights = dict[str, Tensor]


def eagle_target(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of eight layers whose weights are large enough that every layer matters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=256, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.08 * torch.randn_like(parameter)
    return model


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def _norm() -> Tensor:
    return 1 + 0.3 * torch.randn(WIDTH)


def _layer(prefix: str, reads: int) -> Weights:
    """What every head's layer has."""
    return {
        f"{prefix}self_attn.q_proj.weight": _random(HEADS * HEAD_DIM, reads),
        f"{prefix}self_attn.k_proj.weight": _random(KV_HEADS * HEAD_DIM, reads),
        f"{prefix}self_attn.v_proj.weight": _random(KV_HEADS * HEAD_DIM, reads),
        f"{prefix}self_attn.o_proj.weight": _random(WIDTH, HEADS * HEAD_DIM),
        f"{prefix}mlp.gate_proj.weight": _random(INNER, WIDTH),
        f"{prefix}mlp.up_proj.weight": _random(INNER, WIDTH),
        f"{prefix}mlp.down_proj.weight": _random(WIDTH, INNER),
        f"{prefix}post_attention_layernorm.weight": _norm(),
    }


def _llama_config(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 2048, "vocab_size": VOCAB_SIZE, "torch_dtype": "float16", **more,
    }  # fmt: skip


def _third(prefix: str) -> Weights:
    """An EAGLE-3 head over a reduced vocabulary, with offsets in d2t."""
    ids = torch.randperm(VOCAB_SIZE)[:NUM_DRAFT_IDS].sort().values
    known = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    known[ids] = True
    return {
        "fc.weight": _random(WIDTH, 3 * WIDTH),
        **_layer(prefix, 2 * WIDTH),
        f"{prefix}hidden_norm.weight": _norm(),
        f"{prefix}input_layernorm.weight": _norm(),
        "norm.weight": _norm(),
        "lm_head.weight": _random(NUM_DRAFT_IDS, WIDTH),
        "d2t": ids - torch.arange(NUM_DRAFT_IDS),
        "t2d": known,
    }


def safeailab_1(path: Path, *, has_bias: bool = True, pickled: bool = True) -> None:
    """EAGLE-1 and 2: a frozen copy of the embedding, no input norm, mostly a pickle."""
    weights = {
        "embed_tokens.weight": _random(VOCAB_SIZE, WIDTH),
        "fc.weight": _random(WIDTH, 2 * WIDTH),
        **_layer("layers.0.", WIDTH),
    }
    if has_bias:
        weights["fc.bias"] = 0.1 * torch.randn(WIDTH)
    config = _llama_config(architectures=["LlamaForCausalLM"])
    if not has_bias:
        config |= {"bias": False, "rope_theta": 500_000.0}
    _write(path, config, weights, "pytorch_model.bin" if pickled else "model.safetensors")


def safeailab_1_llama3(path: Path) -> None:
    """EAGLE-1 for LLaMA-3: no bias, a stated rotary base."""
    safeailab_1(path, has_bias=False, pickled=False)


def safeailab_3(path: Path) -> None:
    """EAGLE-3: ``midlayer``, states not stated, no rotary base."""
    config = _llama_config(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=NUM_DRAFT_IDS)
    _write(path, config, _third("midlayer."), "pytorch_model.bin")


def specforge(path: Path) -> None:
    """SpecForge: official names, layers counted by their outputs."""
    config = _llama_config(
        architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=NUM_DRAFT_IDS, rope_theta=10_000.0,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True},
    )  # fmt: skip
    _write(path, config, _third("midlayer."), "model.safetensors")


def speculators(path: Path, **more: Any) -> None:
    """The speculators library: ``layers.0``, the layer's configuration nested, layers at the top."""
    config = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0",
        "draft_vocab_size": NUM_DRAFT_IDS, "target_hidden_size": None, "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6], "transformer_layer_config": _llama_config(rope_theta=10_000.0),
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "target", "architectures": ["LlamaForCausalLM"]},
        },
        **more,
    }  # fmt: skip
    _write(path, config, {**_third("layers.0."), **_extra(more)}, "model.safetensors")


def speculators_31(path: Path) -> None:
    """EAGLE-3.1: every fused state has its norm, the output is normed before it is fed back."""
    speculators(path, norm_before_residual=False, norm_output=True, fc_norm=True)


def speculators_input_norm(path: Path) -> None:
    """``norm_before_fc``, and an embedding of its own."""
    speculators(path, norm_before_fc=True)


def deepspec(path: Path) -> None:
    """DeepSpec's Qwen3 head: five states, norms of queries and keys, the target's whole vocabulary, its own ends."""
    weights = _third("layers.0.")
    del weights["d2t"], weights["t2d"]
    weights |= {
        "fc.weight": _random(WIDTH, 5 * WIDTH),
        "embed_tokens.weight": _random(VOCAB_SIZE, WIDTH),
        "lm_head.weight": _random(VOCAB_SIZE, WIDTH),
        **{f"layers.0.self_attn.{name}.weight": 1 + 0.3 * torch.randn(HEAD_DIM) for name in ("q_norm", "k_norm")},
    }
    config = _llama_config(
        architectures=["Qwen3Eagle3Model"], head_dim=HEAD_DIM, rope_theta=1_000_000.0, num_target_layers=NUM_LAYERS,
        target_layer_ids=[0, 2, 3, 5, 6], ttt_length=7, step_loss_decay=0.8, tie_word_embeddings=False,
    )  # fmt: skip
    _write(path, {**config, "model_type": "qwen3"}, weights, "model.safetensors")


def _extra(config: dict[str, Any]) -> Weights:
    extra: Weights = {}
    if config.get("fc_norm"):
        extra |= {f"fc_norm.{i}.weight": _norm() for i in range(3)}
    if config.get("norm_before_fc"):
        extra["input_norm.weight"] = 1 + 0.3 * torch.randn(3 * WIDTH)
        extra["embed_tokens.weight"] = _random(VOCAB_SIZE, WIDTH)
    return extra


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "safeailab-1": safeailab_1,
    "safeailab-1-llama3": safeailab_1_llama3,
    "safeailab-3": safeailab_3,
    "specforge": specforge,
    "speculators": speculators,
    "speculators-3.1": speculators_31,
    "speculators-input-norm": speculators_input_norm,
    "deepspec": deepspec,
}


def _write(path: Path, config: dict[str, Any], weights: Weights, file: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if file.endswith(".bin"):
        torch.save(weights, path / file)
    else:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path / file)


def write(layout: str, path: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint in a layout; the same bytes for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LAYOUTS[layout](path)
    return path


def main() -> None:
    """One checkpoint of each layout, and their target."""
    root = Path(sys.argv[1])
    eagle_target().save_pretrained(root / "target")
    for layout in LAYOUTS:
        write(layout, root / layout)


if __name__ == "__main__":
    main()
