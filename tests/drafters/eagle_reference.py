"""EAGLE heads and trees written down once more, straight from the formulas: no cache, no batch, no shared code.

Every node of the tree is computed from its whole path in one causal pass. Slow and plain on purpose.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.drafters.eagle_checkpoints import HEAD_DIM, HEADS, KV_HEADS, NUM_LAYERS

# What each published layout means, by hand: which hidden_states of the target, rotary base, and variants.
READS: dict[str, tuple[int, ...]] = {
    "safeailab-3": (2, NUM_LAYERS // 2, NUM_LAYERS - 3),
    "specforge": (2, 4, 5),
    "speculators": (1, 4, 6),
    "speculators-3.1": (1, 4, 6),
    "speculators-input-norm": (1, 4, 6),
    "deepspec": (1, 3, 4, 6, 7),
}


class Reference:
    """The head of a checkpoint and the target's states on one text."""

    def __init__(self, layout: str, path: Path, target: Any, text: list[int]) -> None:
        self.layout, self.target, self.text = layout, target, text
        self.config = json.loads((path / "config.json").read_text())
        file = path / "model.safetensors"
        raw = load_file(file) if file.exists() else torch.load(path / "pytorch_model.bin", weights_only=True)
        prefix = "midlayer." if "midlayer.mlp.up_proj.weight" in raw else "layers.0."
        self.w = {name.replace(prefix, ""): value for name, value in raw.items()}
        self.theta = float(self.config.get("rope_theta", 10_000.0))
        with torch.no_grad():
            out = target(torch.tensor([text]), output_hidden_states=True)
        self.states = out.hidden_states

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[name + ".weight"]

    def inputs(self) -> Tensor:
        """[n - 1, H]: what the head reads for the pairs of the text."""
        if self.layout.startswith("safeailab-1"):
            return self.states[-1][0, :-1]
        parts = [self.states[layer][0, :-1] for layer in READS[self.layout]]
        if self.config.get("fc_norm"):
            parts = [self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
        fused = torch.cat(parts, -1)
        if self.config.get("norm_before_fc"):
            fused = self.norm(fused, "input_norm")
        return fused @ self.w["fc.weight"].T

    def embed(self, ids: list[int]) -> Tensor:
        own = self.w.get("embed_tokens.weight")
        return (self.target.model.embed_tokens.weight if own is None else own)[ids].detach()

    def attention(self, x: Tensor) -> Tensor:
        """Causal over the rows of x, row by row and head by head; row t is at position t."""
        rows = len(x)
        angles = torch.arange(rows)[:, None] / self.theta ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)

        def turned(y: Tensor) -> Tensor:
            a, b = y[:, : HEAD_DIM // 2], y[:, HEAD_DIM // 2 :]
            return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

        heads = []
        for head in range(HEADS):
            mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            group = head // (HEADS // KV_HEADS)
            shared = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            q = x @ self.w["self_attn.q_proj.weight"][mine].T
            k = x @ self.w["self_attn.k_proj.weight"][shared].T
            if "self_attn.q_norm.weight" in self.w:
                q, k = self.norm(q, "self_attn.q_norm"), self.norm(k, "self_attn.k_norm")
            q, k = turned(q), turned(k)
            v = x @ self.w["self_attn.v_proj.weight"][shared].T
            scores = (q @ k.T / math.sqrt(HEAD_DIM)).masked_fill(torch.ones(rows, rows).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        return torch.cat(heads, -1) @ self.w["self_attn.o_proj.weight"].T

    def mlp(self, x: Tensor) -> Tensor:
        gate = x @ self.w["mlp.gate_proj.weight"].T
        return (gate * gate.sigmoid() * (x @ self.w["mlp.up_proj.weight"].T)) @ self.w["mlp.down_proj.weight"].T

    def outputs(self, ids: list[int], states: Tensor) -> Tensor:
        """[rows, H] from the tokens and states of all rows of one path."""
        e = self.embed(ids)
        if self.layout.startswith("safeailab-1"):
            h = torch.cat((e, states), -1) @ self.w["fc.weight"].T + self.w.get("fc.bias", torch.zeros(1))
            y = h + self.attention(h)
        else:
            normed = self.norm(states, "hidden_norm")
            stream = normed if self.config.get("norm_before_residual") else states
            y = stream + self.attention(torch.cat((self.norm(e, "input_layernorm"), normed), -1))
        return y + self.mlp(self.norm(y, "post_attention_layernorm"))

    def log_probs(self, output: Tensor) -> tuple[Tensor, list[int]]:
        """The head's law [D], and the target's ids of its entries."""
        if self.layout.startswith("safeailab-1"):
            logits = output @ self.target.lm_head.weight.T.detach()
            return logits.log_softmax(-1), list(range(len(logits)))
        logits = self.norm(output, "norm") @ self.w["lm_head.weight"].T
        if "d2t" not in self.w:
            return logits.log_softmax(-1), list(range(len(logits)))
        ids = [draft_id + int(offset) for draft_id, offset in enumerate(self.w["d2t"])]
        return logits.log_softmax(-1), ids

    def after(self, path: list[int]) -> Tensor:
        """[H]: the head's output at the end of a drafted path (none: at the root)."""
        ids, states = self.text[1:], self.inputs()
        output = self.outputs(ids, states)[-1]
        for token_id in path:
            fed = self.norm(output, "norm") if self.config.get("norm_output") else output
            ids, states = [*ids, token_id], torch.cat((states, fed[None]))
            output = self.outputs(ids, states)[-1]
        return output

    def tree(self, num_nodes: int, top_k: int, num_levels: int) -> list[tuple[int, ...]]:
        """The paths of the draft tree, in node order: EAGLE-2's expansion and reranking."""
        pool: list[tuple[float, tuple[int, ...]]] = []
        frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(num_levels):
            children: list[tuple[float, tuple[int, ...]]] = []
            for score, path in frontier:
                law, ids = self.log_probs(self.after(list(path)))
                best = law.topk(min(top_k, len(law)))
                children += [
                    (score + float(value), (*path, ids[int(index)]))
                    for value, index in zip(best.values, best.indices, strict=True)
                ]
            pool += children
            frontier = sorted(children, key=lambda child: -child[0])[:top_k]
        kept = sorted(range(len(pool)), key=lambda i: -pool[i][0])[:num_nodes]
        return [pool[i][1] for i in sorted(kept)]
