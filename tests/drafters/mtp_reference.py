"""Multi-token-prediction layers written down once more from the formulas: no cache, no batch, no shared code.

Every drafted path is computed whole, row by row and head by head. Slow and plain on purpose.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Reference"]


class Reference:
    """The layer in a checkpoint and the target's states on one text."""

    def __init__(self, path: Path, target: Any, text: list[int]) -> None:
        self.config = json.loads((path / "config.json").read_text())
        self.kind = self.config["model_type"]
        raw = load_file(path / "model-00002-of-00002.safetensors")
        own = {"mtp.pre_fc_norm_embedding": "enorm", "mtp.pre_fc_norm_hidden": "hnorm", "mtp.norm": "shared_head.norm"}
        self.w: dict[str, Tensor] = {}
        for name, weight in raw.items():
            for long, short in (*own.items(), ("mtp.fc", "eh_proj"), ("mtp.layers.0.", ""), ("model.layers.2.", "")):
                if name.startswith(long):
                    self.w[short + name.removeprefix(long)] = weight
                    break
        self.target, self.text = target, text
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            self.states = target(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name + ".weight"]

    def product(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def turned(self, x: Tensor, dims: int, base: float, *, pairs: bool) -> Tensor:
        """The first ``dims`` numbers of every row of x turned by its position; row t is at position t + 1."""
        angles = (torch.arange(len(x)) + 1)[:, None] / base ** (torch.arange(0, dims, 2) / dims)
        a, b = (x[:, 0:dims:2], x[:, 1:dims:2]) if pairs else (x[:, : dims // 2], x[:, dims // 2 : dims])
        left, right = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
        return torch.cat((left, right, x[:, dims:]), -1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | (distance >= (window or len(q)))
        return (q @ k.T / math.sqrt(q.shape[1])).masked_fill(hidden, -math.inf).softmax(-1) @ v

    def latent_attention(self, x: Tensor) -> Tensor:
        c, base, heads = self.config, self.config["rope_parameters"]["rope_theta"], []
        nope, rope, width = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        queries = self.norm(self.product(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm")
        queries = self.product(queries, "self_attn.q_b_proj")
        latent, shared = self.product(x, "self_attn.kv_a_proj_with_mqa").split((c["kv_lora_rank"], rope), -1)
        both = self.product(self.norm(latent, "self_attn.kv_a_layernorm"), "self_attn.kv_b_proj")
        turned_key = self.turned(shared, rope, base, pairs=True)
        for head in range(c["num_attention_heads"]):
            q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
            kv = both[:, head * (nope + width) : (head + 1) * (nope + width)]
            q = torch.cat((q[:, :nope], self.turned(q[:, nope:], rope, base, pairs=True)), -1)
            heads.append(self.attended(q, torch.cat((kv[:, :nope], turned_key), -1), kv[:, nope:]))
        return self.product(torch.cat(heads, -1), "self_attn.o_proj")

    def attention(self, x: Tensor) -> Tensor:
        c, heads = self.config, []
        dim, rope, window = c["head_dim"], c["rope_parameters"], None
        if self.kind == "mellum":
            rope, window = rope["sliding_attention"], c["sliding_window"]
        turn = int(dim * rope.get("partial_rotary_factor", 1.0))
        for head in range(c["num_attention_heads"]):
            group = head // (c["num_attention_heads"] // c["num_key_value_heads"])
            q = self.product(x, "self_attn.q_proj")[:, head * dim : (head + 1) * dim]
            k, v = (self.product(x, f"self_attn.{n}_proj")[:, group * dim : (group + 1) * dim] for n in "kv")
            q, k = self.norm(q, "self_attn.q_norm"), self.norm(k, "self_attn.k_norm")
            q, k = (self.turned(y, turn, rope["rope_theta"], pairs=False) for y in (q, k))
            heads.append(self.attended(q, k, v, window))
        return self.product(torch.cat(heads, -1), "self_attn.o_proj")

    def gated(self, x: Tensor, name: str) -> Tensor:
        gate = self.product(x, f"{name}.gate_proj")
        return self.product(gate * gate.sigmoid() * self.product(x, f"{name}.up_proj"), f"{name}.down_proj")

    def experts(self, x: Tensor) -> Tensor:
        """One row [H] through its experts."""
        c, scores = self.config, self.product(x, "mlp.gate")
        count = c["num_experts_per_tok"]
        if self.kind == "mellum":
            scores = scores.softmax(-1)
            chosen, factor = scores.topk(count).indices.tolist(), 1.0
        else:
            scores, factor = scores.sigmoid(), c["routed_scaling_factor"]
            wanted = scores + self.w["mlp.gate.e_score_correction_bias"]
            groups = wanted.view(c["n_group"], -1)
            best = groups.topk(2).values.sum(-1).topk(c["topk_group"]).indices.tolist()
            size = groups.shape[1]
            open_ = [e for e in range(len(wanted)) if e // size in best]
            chosen = sorted(open_, key=lambda e: -float(wanted[e]))[:count]
        total = sum(float(scores[e]) for e in chosen)
        if self.kind == "mellum" and not c["norm_topk_prob"]:
            total = 1.0
        out = torch.zeros_like(x)
        for expert in chosen:
            out = out + factor * scores[expert] / total * self.gated(x, f"mlp.experts.{expert}")
        return out if self.kind == "mellum" else out + self.gated(x, "mlp.shared_experts")

    def outputs(self, ids: list[int], states: Tensor) -> Tensor:
        """[rows, H] from the tokens and states of all rows of one path."""
        embedded = self.target.model.embed_tokens.weight.detach()[ids]
        x = torch.cat((self.norm(embedded, "enorm"), self.norm(states, "hnorm")), -1) @ self.w["eh_proj.weight"].T
        attend = self.latent_attention if self.kind == "deepseek_v3" else self.attention
        x = x + attend(self.norm(x, "input_layernorm"))
        x = x + torch.stack([self.experts(row) for row in self.norm(x, "post_attention_layernorm")])
        return self.norm(x, "shared_head.norm")

    def after(self, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The states of all rows of a drafted path (none: up to the root) [rows, H], and the output of the last."""
        if path not in self.known:
            states = self.states[:-1]
            if path:
                before, output = self.after(path[:-1])
                states = torch.cat((before, output[None]))
            self.known[path] = states, self.outputs([*self.text[1:], *path], states)[-1]
        return self.known[path]

    def log_probs(self, path: list[int]) -> Tensor:
        """[V]: the law after a drafted path."""
        return (self.after(tuple(path))[1] @ self.target.lm_head.weight.detach().T).log_softmax(-1)
