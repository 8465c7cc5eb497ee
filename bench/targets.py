"""The model under test: a real one, or any shape with random weights, which costs what a trained one costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from specdec.bench.results_schema import ModelInfo
from specdec.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SHAPES", "Target", "load_target", "random_target"]

# Name -> configuration of published models; the numbers are those of their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A model in evaluation mode whose generation defaults are neutral, with a tokenizer and a description."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...]
    info: ModelInfo


def random_target(shape: str | dict[str, Any], *, dtype: str = "float32", device: str = "cpu", seed: int = 0) -> Target:
    """A model of a named shape, or of a ``config.json``, with random weights.

    Args:
        shape: a name of ``SHAPES``, a config.json, a folder that holds one, or the configuration itself.
        dtype: float32, bfloat16 or float16.
        device: where it is made and lives; other devices draw other weights.
        seed: of the weights.

    Raises:
        ConfigError: an unknown shape or dtype.
        LoadError: the configuration cannot be read.
    """
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    values = dict(_config_of(shape) if isinstance(shape, str) else shape)
    name = shape if isinstance(shape, str) else str(values.get("model_type"))
    try:
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise LoadError(f"{name} is no model configuration: {error}") from error
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval().to(device)
    return Target(_neutral(model), None, (), _info(model, name, has_random_weights=True))


def _config_of(shape: str) -> dict[str, Any]:
    if shape in SHAPES:
        return SHAPES[shape]
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)} or a config.json, got {shape!r}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise LoadError(f"{path} has no model_type")
    return {key: value for key, value in values.items() if key not in ("torch_dtype", "dtype", "architectures")}


def load_target(model: Any, tokenizer: Any, name: str) -> Target:
    """A loaded model as a target; its own end-of-sequence ids become the stop ids of live answers."""
    stated = model.generation_config.eos_token_id if model.generation_config is not None else None
    stop_ids = tuple(stated) if isinstance(stated, list) else () if stated is None else (stated,)
    return Target(_neutral(model), tokenizer, stop_ids, _info(model, name, has_random_weights=False))


def _neutral(model: PreTrainedModel) -> PreTrainedModel:
    """Without generation defaults of its own: whoever decodes must be told everything, and all are told the same."""
    model.generation_config = transformers.GenerationConfig()
    return model


def _info(model: PreTrainedModel, name: str, *, has_random_weights: bool) -> ModelInfo:
    return ModelInfo(
        name=Path(name).name if Path(name).exists() else name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_parameters=sum(p.numel() for p in model.parameters()),
        has_random_weights=has_random_weights,
    )
