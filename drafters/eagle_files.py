"""Reads EAGLE checkpoints as they were published, and says which version and which layout they are.

| layout | weights | layer's prefix | states it reads |
| --- | --- | --- | --- |
| SafeAILab, EAGLE-1/2 | ``pytorch_model.bin`` or safetensors | ``layers.0`` | the input of the target's ``lm_head`` |
| SafeAILab, EAGLE-3 | the same | ``midlayer`` | 2, N // 2, N - 3, not stated |
| SpecForge | safetensors | ``midlayer`` | ``eagle_config.eagle_aux_hidden_state_layer_ids``: the layers *before* them |
| speculators | safetensors | ``layers.0`` | ``eagle_aux_hidden_state_layer_ids`` at the top |
| DeepSpec | safetensors | ``layers.0`` | ``target_layer_ids``, five of them: the layers *before* them |

Nothing in a file is executed: pickles are read with ``weights_only``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.drafters.checkpoint_files import draft_vocabulary, read_config, read_weights, stated_rope
from specdec.drafters.eagle_head import EagleConfig
from specdec.errors import LoadError

__all__ = ["EagleFiles", "read_files"]

_NOT_USED = ("t2d", "d2t", "embed_tokens.weight", "lm_head.weight")  # by the layer itself
_LAYER = "layers.0."


def read_files(path: Path) -> EagleFiles:
    """The configuration and the weights in a directory.

    Raises:
        LoadError: a file is missing, cut, no checkpoint, or holds a number that is none.
    """
    return EagleFiles(path, read_config(path), read_weights(path, _canonical))


def _canonical(name: str) -> str:
    """The name in the ``speculators`` layout."""
    name = name.removeprefix("model.")
    return _LAYER + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


class EagleFiles:
    """One checkpoint as read: what it says of itself, checked against a target.

    Args:
        path: where it lies, for messages.
        config: of ``config.json``.
        weights: by canonical name.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.path, self.config, self.weights = path, config, weights
        self.layer: Mapping[str, Any] = config.get("transformer_layer_config") or config

    @property
    def version(self) -> int:
        """1 or 3, from the names of the weights."""
        return 3 if {"d2t", _LAYER + "hidden_norm.weight"} & self.weights.keys() else 1

    def head_config(self, target: Any) -> EagleConfig:
        """How the checkpoint says that it is to be read.

        Args:
            target: configuration of the target.

        Raises:
            LoadError: it contradicts itself or does not fit the target.
        """
        num_layers, width = int(target.num_hidden_layers), int(target.hidden_size)
        fused = self._shape("fc.weight", 2)
        hidden, num_heads = fused[0], int(self._stated("num_attention_heads"))
        head_dim = self._shape(_LAYER + "self_attn.q_proj.weight", 2)[0] // num_heads
        if self.version == 1:
            layers: tuple[int, ...] = (num_layers,)
            expected = 2 * hidden
            if hidden != width:
                raise self._misfit(f"its states have {hidden} numbers, the target's {width}")
        else:
            layers = self.stated_layers(num_layers)
            expected = len(layers) * width
        if fused[1] != expected:
            raise self._misfit(f"fc reads {fused[1]} numbers, but {len(layers)} states of the target make {expected}")
        config = EagleConfig(
            version=self.version,
            hidden_size=hidden,
            target_hidden_size=width,
            num_heads=num_heads,
            num_kv_heads=self._shape(_LAYER + "self_attn.k_proj.weight", 2)[0] // head_dim,
            head_dim=head_dim,
            eps=float(self.layer.get("rms_norm_eps", 1e-6)),
            hidden_layers=layers,
            rope=stated_rope(self.layer),
            max_length=int(self.layer.get("max_position_embeddings", 2048)),
            norm_before_residual=bool(self.config.get("norm_before_residual", False)),
            norm_output=bool(self.config.get("norm_output", False)),
        )
        self._check_names(config)
        return config

    def stated_layers(self, num_layers: int) -> tuple[int, ...]:
        """Which states an EAGLE-3 head reads, as indices into ``output_hidden_states``; each layout counts its way.

        Raises:
            LoadError: the target has no such layers.
        """
        nested = (self.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        stated = self.config.get("eagle_aux_hidden_state_layer_ids")
        outputs = nested if nested is not None else self.config.get("target_layer_ids")
        if outputs is not None:
            layers = tuple(int(layer) + 1 for layer in outputs)  # the layers whose outputs are taken
        else:
            layers = tuple(map(int, stated)) if stated is not None else (2, num_layers // 2, num_layers - 3)
        if not all(0 <= layer <= num_layers for layer in layers):
            raise self._misfit(f"it reads states {layers}, the target has 0 to {num_layers}")
        return layers

    def target_ids(self, vocab_size: int) -> Tensor | None:
        """[D] int64: the target's id of every draft id; None where the vocabularies are the same.

        Raises:
            LoadError: there is no such map, or it is none.
        """
        if self.version == 1:
            return None
        return draft_vocabulary(self.weights, vocab_size, self.config.get("draft_vocab_size"), self._misfit)

    def check_vocabulary(self, vocab_size: int, hidden_size: int) -> None:
        """Check the embedding and the ``lm_head``, where the checkpoint has its own.

        Raises:
            LoadError: one has another shape, or there is neither.
        """
        hidden = self._shape("fc.weight", 2)[0]
        if "embed_tokens.weight" in self.weights:
            shape = self._shape("embed_tokens.weight", 2)
            if shape != (vocab_size, hidden):
                raise self._misfit(f"embed_tokens.weight has shape {shape}, expected {(vocab_size, hidden)}")
        elif hidden != hidden_size:
            raise self._misfit(f"its width is {hidden}, the target embeds tokens in {hidden_size} numbers")
        if "lm_head.weight" in self.weights:
            if self._shape("lm_head.weight", 2)[1] != hidden:
                raise self._misfit(
                    f"lm_head.weight has shape {self._shape('lm_head.weight', 2)}, its width is {hidden}"
                )
        elif self.version == 3:
            raise self._misfit("lm_head.weight missing")

    def _check_names(self, config: EagleConfig) -> None:
        wanted = self._expected(config)
        missing = sorted(wanted.keys() - self.weights.keys())
        if missing:
            raise self._misfit(f"{', '.join(missing[:4])} missing")
        given = {name for name in self.weights if name not in _NOT_USED and not name.startswith("verifier_")}
        optional = {f"{name.removesuffix('.weight')}.bias" for name in wanted if name.endswith("proj.weight")}
        optional |= {_LAYER + "self_attn.q_norm.weight", _LAYER + "self_attn.k_norm.weight", "fc.bias"}
        optional |= {"input_norm.weight", *(f"fc_norm.{i}.weight" for i in range(len(config.hidden_layers)))}
        unknown = sorted(given - wanted.keys() - optional)
        if unknown:
            raise self._misfit(f"it holds {', '.join(unknown[:4])}, which no EAGLE head of version {self.version} has")
        for name, shape in wanted.items():
            if tuple(self.weights[name].shape) != shape:
                raise self._misfit(f"{name} has shape {tuple(self.weights[name].shape)}, expected {shape}")

    def _expected(self, config: EagleConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes that must be there."""
        hidden, attn = config.hidden_size, _LAYER + "self_attn."
        reads = hidden if config.version == 1 else 2 * hidden
        inner = self._shape(_LAYER + "mlp.gate_proj.weight", 2)[0]
        keys = config.num_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            f"{attn}q_proj.weight": (config.num_heads * config.head_dim, reads),
            f"{attn}k_proj.weight": (keys, reads),
            f"{attn}v_proj.weight": (keys, reads),
            f"{attn}o_proj.weight": (hidden, config.num_heads * config.head_dim),
            f"{_LAYER}mlp.gate_proj.weight": (inner, hidden),
            f"{_LAYER}mlp.up_proj.weight": (inner, hidden),
            f"{_LAYER}mlp.down_proj.weight": (hidden, inner),
            f"{_LAYER}post_attention_layernorm.weight": (hidden,),
            "fc.weight": self._shape("fc.weight", 2),
        }
        if config.version == 3:
            names = (_LAYER + "hidden_norm.weight", _LAYER + "input_layernorm.weight", "norm.weight")
            shapes |= dict.fromkeys(names, (hidden,))
        return shapes

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.weights:
            raise self._misfit(f"{name} missing")
        if self.weights[name].ndim != rank:
            raise self._misfit(f"{name} has shape {tuple(self.weights[name].shape)}")
        return tuple(self.weights[name].shape)

    def _stated(self, name: str) -> Any:
        if self.layer.get(name) is None:
            raise self._misfit(f"config.json does not say {name}")
        return self.layer[name]

    def _misfit(self, why: str) -> LoadError:
        return LoadError(f"the EAGLE checkpoint {str(self.path)!r} cannot be used: {why}")
