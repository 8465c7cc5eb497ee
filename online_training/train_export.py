"""Writes trained drafters as published checkpoints: what this project, vLLM and SGLang load.

A head whose residual stream carries the normed state (``norm_before_residual``) is written in the layout of the
speculators library, which has a field for that (vLLM); any other in SpecForge's: SafeAILab's names (``midlayer``), and
in ``eagle_config`` the layers whose outputs it reads (SGLang). The latter's are counted one lower; both layouts carry
the number of the layer that is entered at the top level, and agree.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.eagle_head import EagleConfig

__all__ = ["write_checkpoint", "write_eagle"]

_DRAFTED = 5  # tokens a step that a speculators checkpoint proposes to its engine


def write_eagle(
    folder: Path, config: EagleConfig, weights: Mapping[str, Tensor], *, target: Any, target_ids: Tensor | None
) -> None:
    """An EAGLE-3 head in bfloat16.

    Args:
        folder: where to; ``config.json`` and ``model.safetensors`` there are replaced once both are written.
        config: its shape.
        weights: by the names of the ``speculators`` layout.
        target: configuration of the target.
        target_ids: [D] int64: the target's id of every draft id; None: all of them.
    """
    vocab_size = int(target.get_text_config().vocab_size)
    ids = torch.arange(vocab_size) if target_ids is None else target_ids.cpu()
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[ids] = True
    named = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    layer = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": weights["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope["rope_theta"],
        "max_position_embeddings": config.max_length,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shared = {
        "target_hidden_size": config.target_hidden_size,
        "draft_vocab_size": len(ids),
        "eagle_aux_hidden_state_layer_ids": list(config.hidden_layers),
    }
    if config.norm_before_residual:
        written = {**_speculators(target), "transformer_layer_config": layer, **shared}
    else:
        named = {name.replace("layers.0.", "midlayer.", 1): weight for name, weight in named.items()}
        outputs = [layer_id - 1 for layer_id in config.hidden_layers]
        nested = {"eagle_aux_hidden_state_layer_ids": outputs, "use_aux_hidden_state": True}
        written = {"architectures": ["LlamaForCausalLMEagle3"], **layer, "eagle_config": nested, **shared}
    write_checkpoint(folder, written, {**named, "d2t": ids - torch.arange(len(ids)), "t2d": known})


def _speculators(target: Any) -> dict[str, Any]:
    """What the speculators library says about itself, and of the target by its last name only: no path of a machine."""
    verifier = {
        "name_or_path": Path(str(getattr(target, "_name_or_path", ""))).name,
        "architectures": list(getattr(target, "architectures", None) or []),
    }
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": _DRAFTED,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "norm_before_residual": True,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
    }


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """``config.json`` and ``model.safetensors``; other files of the folder (a model card) stay as they are."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (draft / "config.json").write_text(text, encoding="utf-8")
        tensors = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            (draft / name).replace(folder / name)
    finally:
        shutil.rmtree(draft)
