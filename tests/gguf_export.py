"""A Qwen3 of this repository as a GGUF file, which llama.cpp reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

__all__ = ["write_gguf"]

_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NORMAL, _CONTROL = 1, 3  # kinds of tokens in GGUF


def write_gguf(model: Path, path: Path) -> Path:
    """Write a saved model and its tokenizer, all weights in float32; returns ``path``."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    out = gguf.GGUFWriter(str(path), "qwen3")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(config["head_dim"])
    out.add_value_length(config["head_dim"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_vocab_size(config["vocab_size"])
    _add_tokenizer(out, model, config)
    for name, weight in load_file(model / "model.safetensors").items():
        out.add_tensor(_renamed(name), weight.float().numpy().astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _renamed(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        _, number, part = name.split(".", 2)
        return f"blk.{number}.{_LAYER[part.removesuffix('.weight')]}.weight"
    return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}[name]  # fmt: skip


def _add_tokenizer(out, model: Path, config) -> None:
    saved = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"] for token in saved["added_tokens"] if token["special"]}
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    tokens += [f"<unused{index}>" for index in range(len(tokens), config["vocab_size"])]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    out.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_add_bos_token(False)
    out.add_chat_template((model / "chat_template.jinja").read_text())
