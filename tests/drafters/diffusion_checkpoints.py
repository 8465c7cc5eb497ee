"""Small block-diffusion checkpoints with random weights, file by file as each publisher lays them out.

``python -m tests.drafters.diffusion_checkpoints DIR`` writes one of each, and a target for them, into a directory.
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

from tests.drafters.eagle_checkpoints import VOCAB_SIZE, WIDTH, eagle_target

__all__ = ["DIALECTS", "MASK_ID", "NUM_LAYERS", "write"]

NUM_LAYERS, INNER, HEADS, KV_HEADS, HEAD_DIM, NUM_DRAFT_IDS, RANK = 2, 48, 4, 2, 8, 120, 6
MASK_ID = 255
Weights = dict[str, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) / shape[-1] ** 0.5


def _norm(width: int = WIDTH) -> Tensor:
    return 1 + 0.3 * torch.randn(width)


def _backbone(num_states: int) -> Weights:
    """What every dialect has under the same names."""
    weights = {
        "fc.weight": _random(WIDTH, num_states * WIDTH), "hidden_norm.weight": _norm(), "norm.weight": _norm(),
    }  # fmt: skip
    for layer in range(NUM_LAYERS):
        name = f"layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": _norm(),
            f"{name}.post_attention_layernorm.weight": _norm(),
            f"{name}.self_attn.q_proj.weight": _random(HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.k_proj.weight": _random(KV_HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.v_proj.weight": _random(KV_HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.o_proj.weight": _random(WIDTH, HEADS * HEAD_DIM),
            f"{name}.self_attn.q_norm.weight": _norm(HEAD_DIM),
            f"{name}.self_attn.k_norm.weight": _norm(HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": _random(INNER, WIDTH),
            f"{name}.mlp.up_proj.weight": _random(INNER, WIDTH),
            f"{name}.mlp.down_proj.weight": _random(WIDTH, INNER),
        }
    return weights


def _qwen3_config(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": NUM_LAYERS, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "max_position_embeddings": 40960, "vocab_size": VOCAB_SIZE, "rope_theta": 1_000_000,
        "attention_bias": False, "layer_types": ["full_attention"] * NUM_LAYERS, "sliding_window": None,
        "dtype": "bfloat16", **more,
    }  # fmt: skip


def zlab(path: Path, **more: Any) -> None:
    """z-lab DFlash for Qwen3: block size at the top, no embedding, no head."""
    nested = {"mask_token_id": MASK_ID, "target_layer_ids": [1, 3, 5]}
    config = _qwen3_config(
        architectures=["DFlashDraftModel"], auto_map={"AutoModel": "dflash.DFlashDraftModel"}, num_target_layers=8,
        block_size=6, dflash_config=nested,
    )  # fmt: skip
    _write(path, config | more, _backbone(3))


def zlab_later(path: Path) -> None:
    """z-lab from Qwen3.5 on: block size nested, a window, a causal block, scaled ends."""
    nested = {
        "block_size": 5, "mask_token_id": MASK_ID, "target_layer_ids": [1, 3, 5], "causal": True, "use_swa": False,
        "input_embedding_scale": 2.0, "output_multiplier": 0.5, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"]
    config = _qwen3_config(architectures=["DFlashDraftModel"], num_target_layers=8, dflash_config=nested)
    _write(path, config | {"layer_types": kinds, "sliding_window": 9}, _backbone(3))


def deepspec_dflash(path: Path) -> None:
    """DeepSpec without its small heads: flat fields, its own embedding and head."""
    _deepspec(path, {})


def deepspec_dspark(path: Path, kind: str = "vanilla") -> None:
    """DeepSpec with both small heads."""
    extra = {
        "markov_head.markov_w1.weight": _random(VOCAB_SIZE, RANK),
        "markov_head.markov_w2.weight": 2 * _random(VOCAB_SIZE, RANK),
        "confidence_head.proj.weight": _random(1, WIDTH + RANK),
        "confidence_head.proj.bias": torch.randn(1),
    }
    shapes = {"gated": ("gate_proj", RANK, WIDTH + RANK), "rnn": ("joint_proj", 3 * RANK, 2 * RANK + WIDTH)}
    if kind in shapes:
        name, rows, columns = shapes[kind]
        extra[f"markov_head.{name}.weight"] = _random(rows, columns)
        extra[f"markov_head.{name}.bias"] = 0.3 * torch.randn(rows)
    _deepspec(path, extra, markov_rank=RANK, markov_head_type=kind, confidence_head_with_markov=True)


def deepspec_gated(path: Path) -> None:
    """A gated Markov head."""
    deepspec_dspark(path, "gated")


def deepspec_rnn(path: Path) -> None:
    """A recurrent Markov head."""
    deepspec_dspark(path, "rnn")


def _deepspec(path: Path, extra: Weights, **more: Any) -> None:
    config = _qwen3_config(
        architectures=["Qwen3DSparkModel"], num_target_layers=8, block_size=5, mask_token_id=MASK_ID,
        target_layer_ids=[-1, 2, 6], num_anchors=512, tie_word_embeddings=False,
        enable_confidence_head="confidence_head.proj.weight" in extra, **{"markov_rank": 0, **more},
    )  # fmt: skip
    own = {"embed_tokens.weight": _random(VOCAB_SIZE, WIDTH), "lm_head.weight": _random(VOCAB_SIZE, WIDTH)}
    _write(path, config, {**_backbone(3), **own, **extra})


def speculators_dflash(path: Path) -> None:
    """The speculators library: nested layer, reduced vocabulary, one sliding layer, the anchor guesses nothing."""
    _speculators(path, "dflash", {}, sample_from_anchor=False)


def speculators_dspark(path: Path) -> None:
    """The same with small heads over the reduced vocabulary; the anchor guesses."""
    extra = {
        "markov_head.markov_w1.weight": _random(VOCAB_SIZE, RANK),
        "markov_head.markov_w2.weight": 2 * _random(NUM_DRAFT_IDS, RANK),
        "confidence_head.proj.weight": _random(1, WIDTH),
        "confidence_head.proj.bias": torch.randn(1),
    }
    more = {"markov_rank": RANK, "markov_head_type": "vanilla", "enable_confidence_head": True}
    _speculators(path, "dspark", extra, **more, confidence_head_with_markov=False)


def _speculators(path: Path, kind: str, extra: Weights, **more: Any) -> None:
    layer = _qwen3_config()
    layer |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
    tokens = 4 if kind == "dflash" else 5
    config = {
        "architectures": ["DFlashDraftModel"], "speculators_model_type": kind, "speculators_version": "0.5.0",
        "draft_vocab_size": NUM_DRAFT_IDS, "aux_hidden_state_layer_ids": [2, 4, 6], "block_size": 5,
        "max_anchors": 256, "mask_token_id": MASK_ID, "tie_word_embeddings": False, "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind, "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"name_or_path": "target", "architectures": ["LlamaForCausalLM"]},
        },
        **more,
    }  # fmt: skip
    ids = torch.randperm(VOCAB_SIZE)[:NUM_DRAFT_IDS].sort().values
    known = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    known[ids] = True
    own = {
        "lm_head.weight": _random(NUM_DRAFT_IDS, WIDTH), "d2t": ids - torch.arange(NUM_DRAFT_IDS), "t2d": known,
        "verifier_norm.weight": _norm(),
    }  # fmt: skip
    _write(path, config, {**_backbone(3), **own, **extra})


DIALECTS: dict[str, Callable[[Path], None]] = {
    "zlab": zlab,
    "zlab-later": zlab_later,
    "deepspec-dflash": deepspec_dflash,
    "deepspec-dspark": deepspec_dspark,
    "deepspec-gated": deepspec_gated,
    "deepspec-rnn": deepspec_rnn,
    "speculators-dflash": speculators_dflash,
    "speculators-dspark": speculators_dspark,
}


def _write(path: Path, config: dict[str, Any], weights: Weights) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")


def write(dialect: str, path: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint in a dialect; the same bytes for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        DIALECTS[dialect](path)
    return path


def main() -> None:
    """One checkpoint of each dialect, and their target."""
    root = Path(sys.argv[1])
    eagle_target().save_pretrained(root / "target")
    for dialect in DIALECTS:
        write(dialect, root / dialect)


if __name__ == "__main__":
    main()
