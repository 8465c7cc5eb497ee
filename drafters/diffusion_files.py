"""Reads checkpoints of block-diffusion heads as they were published, and says which dialect they speak.

| dialect | recognised by | states it reads | rows that guess |
| --- | --- | --- | --- |
| z-lab DFlash | ``dflash_config`` | outputs of ``target_layer_ids`` | all but the anchor's: the token at their place |
| DeepSpec | flat ``target_layer_ids`` | the same; -1: the embedding | all: the token after their place |
| speculators | ``speculators_model_type`` | inputs of ``aux_hidden_state_layer_ids`` | as ``sample_from_anchor`` says |

The last entry of ``output_hidden_states`` went through the target's final norm; no layer of a head was trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.checkpoint_files import draft_vocabulary, read_config, read_weights, stated_rope
from specdec.drafters.diffusion_head import DiffusionConfig, MarkovKind
from specdec.errors import LoadError

__all__ = ["DiffusionFiles", "is_block_diffusion", "read_diffusion_files", "stacked_weights"]

_MARKOV = "markov_head.markov_w1.weight"
_KINDS: tuple[MarkovKind, ...] = ("vanilla", "gated", "rnn")
_STACKED = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")  # one tensor over all layers
_NOT_OURS = ("t2d", "d2t", "embed_tokens.weight", "lm_head.weight")


def is_block_diffusion(config: Mapping[str, Any]) -> bool:
    """True if a ``config.json`` is that of a block-diffusion head in one of the three dialects."""
    return bool({"dflash_config", "target_layer_ids"} & config.keys()) or config.get("speculators_model_type") in (
        "dflash",
        "dspark",
    )


def read_diffusion_files(path: Path) -> DiffusionFiles:
    """The configuration and the weights in a directory.

    Raises:
        LoadError: a file is missing, cut, no checkpoint, or holds a number that is none.
    """
    return DiffusionFiles(path, read_config(path), read_weights(path, lambda name: name.removeprefix("model.")))


def stacked_weights(published: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Weights by the names of `specdec.drafters.diffusion_head` from the published ones; gradients pass."""
    layers = [f"layers.{layer}.self_attn" for layer in range(num_layers)]
    weights = {
        name: weight
        for name, weight in published.items()
        if weight.is_floating_point() and not name.rpartition(".")[0].endswith(_STACKED)
    }
    for end in ("weight", "bias"):
        if f"{layers[0]}.k_proj.{end}" in published:
            pairs = [[published[f"{name}.{part}_proj.{end}"] for part in "kv"] for name in layers]
            weights[f"kv_proj.{end}"] = torch.stack([torch.stack(pair) for pair in pairs])
    if f"{layers[0]}.k_norm.weight" in published:
        weights["k_norm.weight"] = torch.stack([published[f"{name}.k_norm.weight"] for name in layers])
    return weights


class DiffusionFiles:
    """One checkpoint as read: what it says of itself, checked against a target.

    Args:
        path: where it lies, for messages.
        config: of ``config.json``.
        weights: by published name.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.path, self.config = path, config
        self.published = {name: weight for name, weight in weights.items() if not name.startswith("verifier_")}
        self.layer: Mapping[str, Any] = config.get("transformer_layer_config") or config
        self.nested: Mapping[str, Any] = config.get("dflash_config") or {}
        self.num_layers = int(self._stated("num_hidden_layers", self.layer))

    @property
    def is_speculators(self) -> bool:
        """True in the dialect of the speculators library."""
        return "speculators_model_type" in self.config

    def head_config(self, target: Any) -> DiffusionConfig:
        """How the checkpoint says that it is to be read.

        Args:
            target: configuration of the target.

        Raises:
            LoadError: it contradicts itself, asks for what is not covered, or does not fit the target.
        """
        hidden, reads = self._shape("fc.weight", 2)
        num_heads = int(self._stated("num_attention_heads", self.layer))
        head_dim = self._shape("layers.0.self_attn.q_proj.weight", 2)[0] // num_heads
        layers = self._hidden_layers(int(target.num_hidden_layers))
        width = int(target.hidden_size)
        if reads != len(layers) * width:
            raise self._misfit(f"fc reads {reads} numbers, but {len(layers)} states of the target make "
                               f"{len(layers) * width}")  # fmt: skip
        windows, causal = self._sight()
        config = DiffusionConfig(
            hidden_size=hidden,
            target_hidden_size=width,
            num_heads=num_heads,
            num_kv_heads=self._shape("layers.0.self_attn.k_proj.weight", 2)[0] // head_dim,
            head_dim=head_dim,
            eps=float(self.layer.get("rms_norm_eps", 1e-6)),
            hidden_layers=layers,
            rope=stated_rope(self.layer),
            max_length=int(self.layer.get("max_position_embeddings", 2048)),
            block_size=int(self._setting("block_size")),
            mask_token_id=int(self._setting("mask_token_id")),
            guesses_next=self._guesses_next(),
            windows=windows,
            causal=causal,
            markov=self._markov(),
            has_confidence="confidence_head.proj.weight" in self.published,
            confidence_reads_markov=bool(self._optional("confidence_head_with_markov", False)),
            embedding_scale=float(self._optional("input_embedding_scale", 1.0) or 1.0),
            output_scale=float(self._optional("output_multiplier", 1.0) or 1.0),
            softcap=float(self._optional("final_logit_softcapping", 0.0) or 0.0),
        )
        self._check(config)
        return config

    def target_ids(self, vocab_size: int) -> Tensor | None:
        """[D] int64: the target's id of every draft id; None where the vocabularies are the same.

        Raises:
            LoadError: there is no such map, or it is none.
        """
        return draft_vocabulary(self.published, vocab_size, self.config.get("draft_vocab_size"), self._misfit)

    def check_vocabulary(self, config: DiffusionConfig, vocab_size: int) -> None:
        """Check what has a row per token, and the mask's id.

        Raises:
            LoadError: a shape is another one, or the mask has no embedding.
        """
        num_rows = len(self.published.get("embed_tokens.weight", range(vocab_size)))
        if not 0 <= config.mask_token_id < num_rows:
            raise self._misfit(f"mask_token_id must be in [0, {num_rows}), got {config.mask_token_id}")
        if "embed_tokens.weight" not in self.published and config.hidden_size != config.target_hidden_size:
            raise self._misfit(
                f"its width is {config.hidden_size}, the target embeds tokens in {config.target_hidden_size} numbers"
            )
        num_ids = len(self.published.get("lm_head.weight", range(vocab_size)))
        hidden = config.hidden_size
        wanted = {"embed_tokens.weight": (vocab_size, hidden), "lm_head.weight": (num_ids, hidden)}
        if config.markov != "none":
            rank = self._shape(_MARKOV, 2)[1]
            wanted |= {_MARKOV: (vocab_size, rank), "markov_head.markov_w2.weight": (num_ids, rank)}
        self._check_shapes({name: shape for name, shape in wanted.items() if name in self.published})

    def weights(self, config: DiffusionConfig) -> dict[str, Tensor]:
        """The weights by the names of `specdec.drafters.diffusion_head`."""
        return stacked_weights(self.published, config.num_layers)

    def _hidden_layers(self, num_layers: int) -> tuple[int, ...]:
        if self.is_speculators:
            layers = tuple(int(layer) for layer in self._stated("aux_hidden_state_layer_ids", self.config))
        else:
            layers = tuple(int(layer) + 1 for layer in self._setting("target_layer_ids"))
        if not layers or not all(0 <= layer < num_layers for layer in layers):
            raise self._misfit(f"it reads states {layers}, the target has 0 to {num_layers - 1} before its final norm")
        return layers

    def _guesses_next(self) -> bool:
        if not self.is_speculators:
            return not self.nested
        stated = self.config.get("sample_from_anchor")
        if stated is not None:
            return bool(stated)
        proposals = (self.config.get("speculators_config") or {}).get("proposal_methods") or [{}]
        return bool(proposals[0].get("speculative_tokens") == self._setting("block_size"))

    def _sight(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Per layer, how far back its rows see (0: everything) and whether they see no later row of their block."""
        types = self.config.get("layer_types") or self.layer.get("layer_types") or ["full_attention"] * self.num_layers
        size = int(self.config.get("sliding_window") or self.layer.get("sliding_window") or 0)
        if self.nested.get("use_swa"):
            types, size = ["sliding_attention"] * self.num_layers, int(self.nested.get("swa_window_size") or 0)
        slides = [kind == "sliding_attention" for kind in types]
        if len(slides) != self.num_layers or set(types) - {"full_attention", "sliding_attention"}:
            raise self._misfit(f"layer_types must name full or sliding attention for {self.num_layers} layers: {types}")
        if any(slides) and size < 1:
            raise self._misfit("a sliding layer needs a sliding_window >= 1")
        if self.is_speculators:
            causal = [one and not self.config.get("sliding_window_non_causal", False) for one in slides]
        else:
            causal = [bool(self.nested.get("causal", False))] * self.num_layers
        return tuple(size if one else 0 for one in slides), tuple(causal)

    def _markov(self) -> MarkovKind:
        if _MARKOV not in self.published:
            if int(self._optional("markov_rank", 0) or 0):
                raise self._misfit(f"markov_rank is {self._optional('markov_rank', 0)}, but {_MARKOV} is missing")
            return "none"
        stated = self._optional("markov_head_type", "vanilla")
        for kind in _KINDS:
            if stated == kind:
                return kind
        raise self._misfit(f"markov_head_type must be one of {', '.join(_KINDS)}, got {stated!r}")

    def _check(self, config: DiffusionConfig) -> None:
        if config.block_size < 2:
            raise self._misfit(f"block_size must be >= 2, got {config.block_size}")
        for name, covered in (("attention_sink_bias", False), ("use_aux_hidden_state", True)):
            if bool(self.nested.get(name, covered)) is not covered:
                raise self._misfit(f"{name}={self.nested[name]} is not covered")
        if config.confidence_reads_markov and config.has_confidence and config.markov == "none":
            raise self._misfit("its confidence head reads a Markov head that it does not have")
        wanted = self._expected(config)
        self._check_shapes(wanted)
        optional = {f"{name.removesuffix('.weight')}.bias" for name in wanted if name.endswith("proj.weight")}
        unknown = sorted(self.published.keys() - wanted.keys() - optional - {*_NOT_OURS})
        if unknown:
            raise self._misfit(f"it holds {', '.join(unknown[:4])}, which no head of these dialects has")

    def _check_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        missing = sorted(wanted.keys() - self.published.keys())
        if missing:
            raise self._misfit(f"{', '.join(missing[:4])} missing")
        for name, shape in wanted.items():
            if tuple(self.published[name].shape) != shape:
                raise self._misfit(f"{name} has shape {tuple(self.published[name].shape)}, expected {shape}")

    def _expected(self, config: DiffusionConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes that must be there."""
        hidden, queries = config.hidden_size, config.num_heads * config.head_dim
        keys, inner = config.num_kv_heads * config.head_dim, self._shape("layers.0.mlp.gate_proj.weight", 2)[0]
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": self._shape("fc.weight", 2), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,),
        }  # fmt: skip
        has_bias = "layers.0.self_attn.k_proj.bias" in self.published
        has_head_norm = "layers.0.self_attn.k_norm.weight" in self.published
        for layer in range(config.num_layers):
            name = f"layers.{layer}"
            shapes |= {
                f"{name}.input_layernorm.weight": (hidden,),
                f"{name}.post_attention_layernorm.weight": (hidden,),
                f"{name}.self_attn.q_proj.weight": (queries, hidden),
                f"{name}.self_attn.k_proj.weight": (keys, hidden),
                f"{name}.self_attn.v_proj.weight": (keys, hidden),
                f"{name}.self_attn.o_proj.weight": (hidden, queries),
                f"{name}.mlp.gate_proj.weight": (inner, hidden),
                f"{name}.mlp.up_proj.weight": (inner, hidden),
                f"{name}.mlp.down_proj.weight": (hidden, inner),
            }
            if has_bias:
                shapes |= {f"{name}.self_attn.{part}_proj.bias": (keys,) for part in "kv"}
            if has_head_norm:
                shapes |= {f"{name}.self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
        rank = self._shape(_MARKOV, 2)[1] if config.markov != "none" else 0
        if rank:
            shapes |= {_MARKOV: self._shape(_MARKOV, 2)}
            shapes |= {"markov_head.markov_w2.weight": self._shape("markov_head.markov_w2.weight", 2)}
        if config.markov == "gated":
            shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
        if config.markov == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, hidden + 2 * rank)
        if config.has_confidence:
            shapes["confidence_head.proj.weight"] = (1, hidden + rank * config.confidence_reads_markov)
        return shapes

    def _shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        if name not in self.published:
            raise self._misfit(f"{name} missing")
        if self.published[name].ndim != num_axes:
            raise self._misfit(f"{name} has shape {tuple(self.published[name].shape)}")
        return tuple(self.published[name].shape)

    def _optional(self, name: str, default: Any) -> Any:
        """A setting of the head: nested where the dialect nests it, else at the top."""
        return self.nested.get(name, self.config.get(name, default))

    def _setting(self, name: str) -> Any:
        return self._stated(name, {name: self._optional(name, None)})

    def _stated(self, name: str, where: Mapping[str, Any]) -> Any:
        if where.get(name) is None:
            raise self._misfit(f"config.json does not say {name}")
        return where[name]

    def _misfit(self, why: str) -> LoadError:
        return LoadError(f"the diffusion checkpoint {str(self.path)!r} cannot be used: {why}")
