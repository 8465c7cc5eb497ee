"""Tiny randomly initialised models of every architecture in transformers' causal-LM mapping, by generic rules.

A model is built from its own config class: every field that ``TINY`` names and the class has gets the tiny value, lists
of layer kinds are cut to one round of all kinds, and ``SPECIAL`` adds what one config class wants otherwise. Weights
are then perturbed so that logits are spread and every norm, bias and gate does something: a fresh initialisation hides
mistakes behind zeros and ones. ``ARCHITECTURES[name]()`` is the same model every time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 128
WINDOW = 8  # of every sliding window and chunk: short texts cross it

TINY: dict[str, Any] = {
    # sizes
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "dim": 32,
    "embedding_size": 32,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "feed_forward_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "max_target_positions": 512,
    "context_length": 512,
    "model_max_length": 512,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "d_head": 8,
    "attention_head_size": 8,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "o_lora_rank": 8,
    "o_groups": 2,
    # what a layer sees
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "sliding_window_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 2,
    # recurrent, convolutional and sparse layers
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 2,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_headdim": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "lru_width": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "attention_hidden_size": 32,
    "index_n_heads": 16,  # scores are rectified: with few heads many are exactly zero, and ties have no order
    "index_head_dim": 16,
    "index_topk": 8,
    # generation and training switches
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers")

# Fields that one config class wants otherwise; the value may depend on nothing else.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "global_head_dim": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 16},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16], "num_buckets": 4},
    "roc_bert": {"shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Entries of the mapping that generic rules cannot build, each with the reason.
NOT_BUILT: dict[str, str] = {
    "blt": "reads bytes; sizes of its hash embeddings, patcher and cross-attention are tied together",
    "gemma3n": "its vision tower needs a package for images; its language model is gemma3n_text",
    "gemma4_assistant": "drafts for a Gemma 4, does not stand alone",
    "gemma4_unified_assistant": "drafts for a Gemma 4, does not stand alone",
    "musicgen": "writes several codebooks of sound at once, not text",
    "musicgen_melody": "writes several codebooks of sound at once, not text",
    "phi4_multimodal": "its audio and vision towers have fixed sizes",
    "xlstm": "its own generate fails at these sizes",
}


def _num_layers(defaults: dict[str, Any]) -> int:
    kinds = max((len(dict.fromkeys(defaults[key])) for key in LAYER_LISTS if defaults.get(key)), default=1)
    return max(4, kinds) if kinds > 1 else 2


def _tiny_fields(defaults: dict[str, Any]) -> dict[str, Any]:
    num_layers = _num_layers(defaults)
    fields = {key: value for key, value in TINY.items() if key in defaults}
    fields |= {key: num_layers for key in LAYER_COUNTS if key in defaults}
    for key in LAYER_LISTS:
        if defaults.get(key):
            kinds = list(dict.fromkeys(defaults[key]))
            fields[key] = [kinds[i % len(kinds)] for i in range(num_layers)]
    if "kv_lora_rank" in defaults:  # multi-head latent attention has as many key heads as query heads
        fields["num_key_value_heads"] = TINY["num_attention_heads"]
    return fields


def _fields(config_class: Any) -> dict[str, Any]:
    default = config_class()
    fields = _tiny_fields(default.to_dict())
    special = SPECIAL.get(config_class.model_type, {})
    for key in config_class.sub_configs:
        if getattr(default, key, None) is not None and key not in special:
            fields[key] = _fields(type(getattr(default, key)))
    return {**fields, **special}


def model_class(name: str) -> Any:
    """The class that ``AutoModelForCausalLM`` makes for this type."""
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])


def tiny_config(name: str) -> Any:
    """The config of the tiny model of this type, its sub-configs tiny too."""
    config_class = CONFIG_MAPPING[name]
    wanted = model_class(name).config_class
    if wanted is not None and not issubclass(config_class, wanted):
        config_class = wanted  # a multimodal type whose language model has a class of its own
    return config_class(**{**_fields(config_class), **SPECIAL.get(name, {})})


def _perturb(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a seeded random part: matrices of gain one, vectors of a tenth."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.add_(noise)
            elif parameter.ndim >= 2:
                parameter.add_(noise * 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)


def build(name: str) -> Any:
    """The tiny model of this type, in float32 and evaluation mode, without an end-of-sequence stop."""
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(name)(tiny_config(name)).float().eval()
    _perturb(model, seed)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    name: partial(build, name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT
}

# The path that each architecture takes, in transformers' own order.
_BY_ROUTE = {
    "tree": """
        afmoe apertus arcee aria_text axk1 beam bert bert-generation biogpt bitnet camembert cohere cohere2
        cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama dots1 electra
        emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text
        gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt-sw3 gpt2
        gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
        hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama
        llama4 llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
        ministral3 mistral mixtral mllama modernbert-decoder moss_transcribe_diarize nanochat nemotron olmo olmo2
        olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta roberta-prelayernorm
        roc_bert seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl xmod
        youtu
    """,
    "chain": """
        axk2 bailing_hybrid bamba bart big_bird bigbird_pegasus blenderbot blenderbot-small bloom codegen
        deepseek_v32 deepseek_v4 doge dots3_note dots3_note_text falcon falcon_h1 gemma4_unified git glm_moe_dsa
        gpt_neo gpt_neox_japanese gptj granitemoehybrid hy_v4 inkling2_text inkling_text kimi_linear lfm2 lfm2_moe
        lfm3 mamba2 marian mbart megatron-bert mpt mvp olmo_hybrid pegasus plbart qwen3_5 qwen3_5_moe
        qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text rembert roformer trocr xglm zaya
    """,
    "chain without drafts": """
        falcon_mamba jamba mamba moshi nemotron_h prophetnet zamba zamba2
    """,
    "plain": """
        minimax openai-gpt recurrent_gemma reformer rwkv
    """,
    "refused": """
        cpmant xlm xlnet
    """,
}
EXPECTED_ROUTES = {name: route for route, names in _BY_ROUTE.items() for name in names.split()}
# Every family once: what `make test` serves; the others are for `make test-slow`.
_FAST = """
    llama qwen2 qwen3 mistral ministral mixtral gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text gpt2
    gpt_neox gpt_oss gpt_bigcode opt phi phi3 phimoe olmo olmo2 olmo3 olmoe granite granite_swa granitemoe cohere
    cohere2 starcoder2 stablelm llama4_text deepseek_v2 deepseek_v3 minicpm3 qwen2_moe qwen3_moe glm glm4 glm4_moe
    smollm3 exaone4 ernie4_5 nemotron helium seed_oss biogpt persimmon apertus arcee dbrx dots1 hunyuan_v1_dense
    modernbert-decoder hrm_text qwen3_next lfm2 bloom nemotron_h mamba rwkv
"""
FAST = frozenset(_FAST.split())
