"""Block-diffusion heads: a few decoder layers that guess a whole block in one pass from the target's states.

DFlash (Chen et al. 2026, arXiv 2602.06036, section 3): the input is the last committed token, the *anchor*, and masks
behind it; ``H = hidden_norm(fc(states))`` of all tokens before the anchor joins every layer's attention as more keys
and values, made with the layer's own ``k_proj`` and ``v_proj``. Within a block every row sees every row. Row k guesses
the token at its own place, so the anchor's row guesses nothing.

DSpark (DeepSeek 2026, arXiv 2607.05147, section 3) adds two small heads and reads the rows one place on: row k guesses
the token *after* its place, so a block of as many rows gives one guess more. The Markov head adds to a guess's logits a
low-rank bias from the token before it; its kinds are ``vanilla``, ``gated`` and ``rnn``. The confidence head tells the
chance that a guess is accepted, from the row and the token before the guess, never from the guess itself.

Weights go by the names of the z-lab layout, except that the keys and values of all layers come from one tensor,
``kv_proj.weight`` [L, 2, Hkv * D, H] (and ``k_norm.weight`` [L, D]): the context's K and V of all layers are one
product, and its slices, which the blocks use, stay the same parameter for a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec.drafters.decoder_parts import (
    gated,
    rms_norm,
    rotary_embedding,
    rotate,
    rotate_pairs,
    spread_over_vocabulary,
)

__all__ = ["BlockAttend", "DiffusionConfig", "DiffusionHead", "MarkovKind"]

MarkovKind: TypeAlias = Literal["none", "vanilla", "gated", "rnn"]
# (layer, query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, D]) -> [1, T, Hq, D]
BlockAttend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig:
    """How a head is built and how its states are to be read.

    Args:
        hidden_size: H of the head.
        target_hidden_size: E, width of one state of the target.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: D.
        eps: of all RMS norms.
        hidden_layers: states it reads, as indices into ``output_hidden_states``.
        rope: ``rope_parameters`` of transformers: theta and, where there is one, scaling.
        max_length: longest text of its training.
        block_size: rows of a block, the anchor's included.
        mask_token_id: stands for a token that is not known yet.
        guesses_next: row k guesses the token after its place (DSpark), not the one at it (DFlash).
        windows: per layer: tokens back that a row sees; 0: all.
        causal: per layer: a row sees no later row of its block.
        is_interleaved: rotary pairs are neighbours, not halves.
        markov: kind of the Markov head.
        has_confidence: there is a confidence head.
        confidence_reads_markov: it also reads the Markov embedding of the token before.
        embedding_scale: factor on the embedding.
        output_scale: factor on the logits.
        softcap: c of c * tanh(logits / c); 0: none.
    """

    hidden_size: int
    target_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    hidden_layers: tuple[int, ...]
    rope: Mapping[str, object]
    max_length: int
    block_size: int
    mask_token_id: int
    guesses_next: bool
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    is_interleaved: bool = False
    markov: MarkovKind = "none"
    has_confidence: bool = False
    confidence_reads_markov: bool = False
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        """L: decoder layers."""
        return len(self.windows)

    @property
    def num_guesses(self) -> int:
        """Tokens that one block guesses."""
        return self.block_size if self.guesses_next else self.block_size - 1


class DiffusionHead:
    """The arithmetic of a head; it holds weights and nothing of any request.

    For training give every trained entry of ``weights`` ``requires_grad`` and use ``specdec.drafters.block_training``,
    which runs many blocks of one text at once; no other entry point keeps gradients for all of them.

    Args:
        config: its shape.
        weights: by the names in the module's docstring, all of one dtype, on one device.
        embed: ids [T] -> [T, H]: the target's embedding, or the head's own.
        project: [T, H] -> [T, D]: the target's ``lm_head``, or the head's own; D is the draft vocabulary.
        target_ids: [D] int64: the target's id of every draft id; None: they are the same.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        weights: Mapping[str, Tensor],
        *,
        embed: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        target_ids: Tensor | None,
    ) -> None:
        self.config = config
        self.weights = dict(weights)
        self.target_ids = target_ids
        self.device, self.dtype = self.weights["fc.weight"].device, self.weights["fc.weight"].dtype
        self._embed, self._project = embed, project
        self._rotary = rotary_embedding(
            config.rope, hidden_size=config.hidden_size, num_heads=config.num_heads, head_dim=config.head_dim,
            max_length=config.max_length,
        ).to(self.device)  # fmt: skip

    def fuse(self, states: Tensor) -> Tensor:
        """[T, H]: what the layers read of the target's states [T, layers * E]."""
        return self._norm("hidden_norm", self._linear("fc", states.to(self.dtype)))

    def context(self, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context rows in all layers, by one product.

        Args:
            fused: [T, H] of ``fuse``.
            positions: [T] int64: of the tokens.

        Returns:
            Keys, rotated, and values, both [L, T, Hkv, D].
        """
        config = self.config
        weight, bias = self.weights["kv_proj.weight"], self.weights.get("kv_proj.bias")
        made = linear(fused, weight.flatten(0, 2), None if bias is None else bias.flatten())
        key, value = made.view(len(fused), config.num_layers, 2, config.num_kv_heads, config.head_dim).unbind(2)
        if "k_norm.weight" in self.weights:
            key = rms_norm(key, self.weights["k_norm.weight"][None, :, None], config.eps)
        cos, sin = self._rotary(fused[None], positions[None])
        turned = self._rotated(key.permute(1, 2, 0, 3), cos, sin)  # [L, Hkv, T, D]
        return turned.transpose(1, 2), value.transpose(0, 1)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: BlockAttend) -> Tensor:
        """One pass over the rows of one or more blocks.

        Args:
            token_ids: [T] int64: anchors and masks.
            positions: [T] int64.
            attend: lets rows see their contexts and their blocks.

        Returns:
            [T, H]: normed, what logits and both small heads are made from.
        """
        config = self.config
        stream = self._embed(token_ids) * config.embedding_scale
        cos, sin = self._rotary(stream[None], positions[None])
        for layer in range(config.num_layers):
            name = f"layers.{layer}"
            read = self._norm(f"{name}.input_layernorm", stream)
            stream = stream + self._attention(layer, read, cos, sin, attend)
            read = self._norm(f"{name}.post_attention_layernorm", stream)
            gate, up = (self._linear(f"{name}.mlp.{part}_proj", read) for part in ("gate", "up"))
            stream = stream + self._linear(f"{name}.mlp.down_proj", gated(gate, up))
        return self._norm("norm", stream)

    def guessing_rows(self, outputs: Tensor) -> Tensor:
        """[..., guesses, H] of blocks [..., rows, H]: the rows that guess, in order."""
        return outputs if self.config.guesses_next else outputs[..., 1:, :]

    def logits(self, outputs: Tensor) -> Tensor:
        """[..., D]: over the draft vocabulary, without the Markov head."""
        logits = self._project(outputs) * self.config.output_scale
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def bias(self, outputs: Tensor, previous_ids: Tensor, memory: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the Markov head adds to the logits of guesses.

        Args:
            outputs: [..., H]: their rows.
            previous_ids: [...] int64: the token before each, the anchor before the first.
            memory: [..., r] of the guess before (``rnn`` only); None at the first.

        Returns:
            [..., D], or None without a Markov head; and the memory for the next guess.
        """
        kind = self.config.markov
        if kind == "none":
            return None, None
        before = self.weights["markov_head.markov_w1.weight"][previous_ids]
        if kind == "gated":
            gate = self._linear("markov_head.gate_proj", torch.cat((outputs, before), dim=-1))
            before = gate.sigmoid() * before
        elif kind == "rnn":
            state = torch.zeros_like(before) if memory is None else memory
            joint = self._linear("markov_head.joint_proj", torch.cat((state, before, outputs), dim=-1))
            gate, candidate, out = joint.chunk(3, dim=-1)
            memory = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh()
            before = out.tanh()
        return linear(before, self.weights["markov_head.markov_w2.weight"]), memory

    def confidence(self, outputs: Tensor, previous_ids: Tensor) -> Tensor:
        """[...] float32 logits of the chance that a guess is accepted, given that all before it were.

        Args:
            outputs: [..., H]: the rows of the guesses.
            previous_ids: [...] int64: the token before each.
        """
        read = outputs
        if self.config.confidence_reads_markov:
            read = torch.cat((outputs, self.weights["markov_head.markov_w1.weight"][previous_ids]), dim=-1)
        return self._linear("confidence_head.proj", read)[..., 0].float()

    def over_target(self, logits: Tensor, vocab_size: int) -> Tensor:
        """[..., V] float32 over the target's vocabulary from [..., D]."""
        return spread_over_vocabulary(logits, self.target_ids, vocab_size)

    def _attention(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: BlockAttend) -> Tensor:
        config, name = self.config, f"layers.{layer}.self_attn"
        weight, bias = self.weights["kv_proj.weight"][layer], self.weights.get("kv_proj.bias")
        query = self._linear(f"{name}.q_proj", x).unflatten(-1, (config.num_heads, config.head_dim))
        made = linear(x, weight.flatten(0, 1), None if bias is None else bias[layer].flatten())
        key, value = made.view(len(x), 2, config.num_kv_heads, config.head_dim).unbind(1)
        if "k_norm.weight" in self.weights:
            query = self._norm(f"{name}.q_norm", query)
            key = rms_norm(key, self.weights["k_norm.weight"][layer], config.eps)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))  # [1, heads, T, D]
        out = attend(layer, self._rotated(query, cos, sin), self._rotated(key, cos, sin), value)
        return self._linear(f"{name}.o_proj", out[0].flatten(1))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_pairs(x, cos, sin) if self.config.is_interleaved else rotate(x, cos, sin)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.eps)
