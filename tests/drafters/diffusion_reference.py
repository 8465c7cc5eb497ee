"""Block-diffusion heads written down once more, straight from the formulas: no cache, no batch, no shared code.

A block is computed from the whole text in one pass, row by row and head by head. Slow and plain on purpose.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.drafters.diffusion_checkpoints import HEAD_DIM, HEADS, KV_HEADS, MASK_ID, NUM_LAYERS


@dataclass(frozen=True)
class Meaning:
    """What a dialect means, by hand."""

    reads: tuple[int, ...]  # which hidden_states of the target
    block: int  # rows
    shift: int  # row k guesses the token at its place + shift
    windows: tuple[int, int] = (0, 0)
    causal: tuple[bool, bool] = (False, False)
    embed_scale: float = 1.0
    out_scale: float = 1.0
    cap: float = 0.0
    markov: str = ""
    confidence: str = ""


MEANINGS = {
    "zlab": Meaning((2, 4, 6), 6, 0),
    "zlab-later": Meaning((2, 4, 6), 5, 0, (9, 0), (True, True), 2.0, 0.5, 3.0),
    "deepspec-dflash": Meaning((0, 3, 7), 5, 1),
    "deepspec-dspark": Meaning((0, 3, 7), 5, 1, markov="vanilla", confidence="with"),
    "deepspec-gated": Meaning((0, 3, 7), 5, 1, markov="gated", confidence="with"),
    "deepspec-rnn": Meaning((0, 3, 7), 5, 1, markov="rnn", confidence="with"),
    "speculators-dflash": Meaning((2, 4, 6), 5, 0, (0, 9), (False, True)),
    "speculators-dspark": Meaning((2, 4, 6), 5, 1, (0, 9), (False, True), markov="vanilla", confidence="alone"),
}


class Reference:
    """The head of a checkpoint, and the target's states on one text that ends with the anchor."""

    def __init__(self, dialect: str, path: Path, target: Any, text: list[int]) -> None:
        self.meaning, self.target, self.text = MEANINGS[dialect], target, text
        self.theta = 1e6
        config = json.loads((path / "config.json").read_text())
        assert (config.get("transformer_layer_config") or config)["rope_theta"] == self.theta
        self.w = load_file(path / "model.safetensors")
        with torch.no_grad():
            self.states = target(torch.tensor([text]), output_hidden_states=True).hidden_states

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name + ".weight"]

    def turned(self, y: Tensor, first: int) -> Tensor:
        angles = torch.arange(first, first + len(y))[:, None] / self.theta ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        a, b = y[:, : HEAD_DIM // 2], y[:, HEAD_DIM // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def attention(self, layer: int, x: Tensor, context: Tensor) -> Tensor:
        name, num_context = f"layers.{layer}.self_attn", len(context)
        seen = torch.zeros(len(x), num_context + len(x), dtype=torch.bool)
        for row in range(len(x)):
            for key in range(num_context + len(x)):
                place = num_context + row
                near = not self.meaning.windows[layer] or place - key < self.meaning.windows[layer]
                seen[row, key] = near and (key <= place or not self.meaning.causal[layer])
        everything, heads = torch.cat((context, x)), []
        for head in range(HEADS):
            mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            group = head // (HEADS // KV_HEADS)
            shared = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            q = self.norm(x @ self.w[f"{name}.q_proj.weight"][mine].T, f"{name}.q_norm")
            k = self.norm(everything @ self.w[f"{name}.k_proj.weight"][shared].T, f"{name}.k_norm")
            v = everything @ self.w[f"{name}.v_proj.weight"][shared].T
            scores = self.turned(q, num_context) @ self.turned(k, 0).T / math.sqrt(HEAD_DIM)
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v)
        return torch.cat(heads, -1) @ self.w[f"{name}.o_proj.weight"].T

    def rows(self) -> Tensor:
        """[guesses, H]: the normed rows that guess."""
        raw = torch.cat([self.states[index][0, :-1] for index in self.meaning.reads], -1)
        context = self.norm(raw @ self.w["fc.weight"].T, "hidden_norm")
        embedding = self.w.get("embed_tokens.weight", self.target.model.embed_tokens.weight.detach())
        x = embedding[[self.text[-1]] + [MASK_ID] * (self.meaning.block - 1)] * self.meaning.embed_scale
        for layer in range(NUM_LAYERS):
            x = x + self.attention(layer, self.norm(x, f"layers.{layer}.input_layernorm"), context)
            u = self.norm(x, f"layers.{layer}.post_attention_layernorm")
            gate = u @ self.w[f"layers.{layer}.mlp.gate_proj.weight"].T
            inner = gate * gate.sigmoid() * (u @ self.w[f"layers.{layer}.mlp.up_proj.weight"].T)
            x = x + inner @ self.w[f"layers.{layer}.mlp.down_proj.weight"].T
        return self.norm(x, "norm")[1 - self.meaning.shift :]

    def ids(self) -> list[int]:
        """The target's id of every draft id."""
        if "d2t" in self.w:
            return [draft_id + int(offset) for draft_id, offset in enumerate(self.w["d2t"])]
        return list(range(len(self.target.lm_head.weight)))

    def laws(self, path: list[int]) -> tuple[Tensor, list[float]]:
        """The log-laws [len(path) + 1, V] of the guesses along a path, and the confidences as chances."""
        laws, confidences = [], []
        state = torch.zeros(6)
        head = self.w.get("lm_head.weight", self.target.lm_head.weight.detach())
        for k, row in enumerate(self.rows()[: len(path) + 1]):
            previous = self.text[-1] if k == 0 else path[k - 1]
            scores = row @ head.T * self.meaning.out_scale
            if self.meaning.cap:
                scores = self.meaning.cap * torch.tanh(scores / self.meaning.cap)
            if self.meaning.markov:
                e = self.w["markov_head.markov_w1.weight"][previous]
                read = e
                if self.meaning.markov == "gated":
                    g, b = (self.w[f"markov_head.gate_proj.{part}"] for part in ("weight", "bias"))
                    e = (g @ torch.cat((row, e)) + b).sigmoid() * e
                if self.meaning.markov == "rnn":
                    g, b = (self.w[f"markov_head.joint_proj.{part}"] for part in ("weight", "bias"))
                    z = g @ torch.cat((state, e, row)) + b
                    gate = z[:6].sigmoid()
                    state, e = gate * state + (1 - gate) * z[6:12].tanh(), z[12:].tanh()
                scores = scores + self.w["markov_head.markov_w2.weight"] @ e
                row = torch.cat((row, read)) if self.meaning.confidence == "with" else row
            if self.meaning.confidence:
                w, b = (self.w[f"confidence_head.proj.{part}"] for part in ("weight", "bias"))
                confidences.append(float((w[0] @ row + b).sigmoid()))
            law = torch.full((len(self.target.lm_head.weight),), -math.inf)
            law[self.ids()] = scores.log_softmax(-1)
            laws.append(law)
        return torch.stack(laws), confidences

    def chain(self, length: int) -> list[int]:
        """The greedy draft."""
        path: list[int] = []
        while len(path) < length:
            path.append(int(self.laws(path)[0][-1].argmax()))
        return path

    def tree(self, num_nodes: int) -> list[tuple[int, ...]]:
        """The best paths by the product of their chances, best first: best-first search over single nodes."""
        heap: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        found: list[tuple[int, ...]] = []
        while len(found) <= num_nodes:
            score, path = max(heap)
            heap.remove((score, path))
            found.append(path)
            if len(path) < self.meaning.block - 1 + self.meaning.shift:
                law = self.laws(list(path))[0][-1]
                heap += [(score + float(law[i]), (*path, int(i))) for i in law.topk(num_nodes).indices]
        return found[1:]
