"""EAGLE-3 heads: training-time test (Li et al. 2025, arXiv 2503.01840, section 3.2).

While drafting, a head reads its own outputs from the second level on. So it is trained on them: step 0 reads the
target's states at all tokens; in step i every row goes on from its own output of step i - 1, with the true token i
places further, and learns the target's law there. A row of step i attends to the step-0 rows up to its own and to its
own rows of steps 1..i, which is what it will find in the cache when it drafts.

Only rows that predict something with a weight are unrolled: a prompt costs one pass, not K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec.drafters.eagle_head import EagleConfig, EagleHead
from specdec.errors import ConfigError
from specdec.online_training.data import TrainBatch
from specdec.online_training.features import TargetFeatures
from specdec.online_training.losses import row_losses
from specdec.online_training.train_module import BatchSums, DraftModule, install_weights, prefix_lengths

__all__ = ["EagleModule", "EagleOptions", "UnrolledAttention"]


class UnrolledAttention:
    """Attention of the steps of a training-time test: one call per step, in order.

    Args:
        shape: (B, T) of the batch.
        rows: [N] int64, ascending: the flat indices b * T + t of the rows that are unrolled.
    """

    def __init__(self, shape: tuple[int, int], rows: Tensor) -> None:
        self._batch, self._length = shape
        self._rows = rows
        example, place = rows // self._length, rows % self._length
        counts = torch.bincount(example, minlength=self._batch)
        self._width = int(counts.max()) if len(rows) else 0
        starts = counts.cumsum(0) - counts
        # Rows of an example side by side, padded: products over all examples at once.
        self._slot = example * self._width + torch.arange(len(rows), device=rows.device) - starts[example]
        padded = torch.zeros(self._batch * self._width, dtype=torch.int64, device=rows.device)
        padded[self._slot] = place
        keys = torch.arange(self._length, device=rows.device)
        self._hidden = keys > padded.view(self._batch, 1, 1, self._width, 1)  # [B, 1, 1, W, T]
        self._context: tuple[Tensor, Tensor] | None = None  # of step 0, [B, H, T, D]
        self._own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, _: None, __: None, ___: None) -> Tensor:
        """[1, H, N, D] queries of the step -> [1, N, H, D]; step 0 brings all B * T rows, later ones those unrolled.

        In step 0 the rows that are not unrolled get zeros: nobody reads what becomes of them.
        """
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotary embedding leaves them in float32
        if self._context is not None:
            self._own.append((self._pad(k), self._pad(v)))
            return self._attend(q, *self._context)[None]
        whole = (x[0].unflatten(1, (self._batch, self._length)).transpose(0, 1) for x in (k, v))
        self._context = (next(whole), next(whole))
        found = self._attend(q[:, :, self._rows], *self._context)
        return found.new_zeros(q.shape[2], *found.shape[1:]).index_copy(0, self._rows, found)[None]

    def _attend(self, q: Tensor, context_k: Tensor, context_v: Tensor) -> Tensor:
        """[1, H, N, D] queries of the unrolled rows -> [N, H, D]."""
        num_kv, dim = context_k.shape[1], q.shape[-1]
        query = self._pad(q).unflatten(1, (num_kv, -1)) * dim**-0.5  # [B, Hkv, G, W, D]
        scores = torch.einsum("bhgwd,bhtd->bhgwt", query, context_k).masked_fill(self._hidden, -torch.inf)
        own = [(query * key[:, :, None]).sum(-1, keepdim=True) for key, _ in self._own]
        probs = torch.cat((scores, *own), dim=-1).softmax(-1, dtype=torch.float32).to(context_v.dtype)
        out = torch.einsum("bhgwt,bhtd->bhgwd", probs[..., : self._length], context_v)
        for step, (_, value) in enumerate(self._own):
            out = out + probs[..., self._length + step, None] * value[:, :, None]
        flat: Tensor = out.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [B * W, Hkv, G, D]
        return flat[self._slot].flatten(1, 2)

    def _pad(self, x: Tensor) -> Tensor:
        """[1, H, N, D] -> [B, H, W, D]."""
        padded: Tensor = x.new_zeros(self._batch * self._width, x.shape[1], x.shape[3])
        padded = padded.index_copy(0, self._slot, x[0].transpose(0, 1))
        by_example: Tensor = padded.unflatten(0, (self._batch, self._width)).transpose(1, 2)
        return by_example


@dataclass(frozen=True, slots=True)
class EagleOptions:
    """How a head is trained.

    Args:
        steps: K, of the training-time test; 7 in the published code.
        step_decay: weight of step i is this to the power of i.
        mix: names and factors of ``specdec.online_training.losses``.
    """

    steps: int = 7
    step_decay: float = 0.8
    mix: Mapping[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.step_decay <= 1:
            raise ConfigError(f"steps must be >= 1 and step_decay in (0, 1], got {self.steps} and {self.step_decay}")


class EagleModule(DraftModule):
    """An EAGLE-3 head in training.

    Args:
        config: its shape; version 3.
        weights: by the names of the ``speculators`` layout, ``lm_head.weight`` among them.
        features: of the target.
        target_ids: [D] int64, ascending: the target's id of every draft id; None: all of them.
        options: of the training.
    """

    def __init__(
        self,
        config: EagleConfig,
        weights: dict[str, Tensor],
        features: TargetFeatures,
        *,
        target_ids: Tensor | None = None,
        options: EagleOptions | None = None,
    ) -> None:
        super().__init__()
        if config.version != 3:
            raise ConfigError(f"only EAGLE-3 heads can be trained, got version {config.version}")
        self.config, self.options = config, options or EagleOptions()
        install_weights(self, weights)
        self.features = features
        embedding: Any = features.target.get_input_embeddings()
        self.head = EagleHead(
            config,
            dict(self.named_parameters()),
            embed=lambda ids: embedding(ids).float(),
            project=lambda outputs: linear(outputs, self.get_parameter("lm_head.weight")),
            target_ids=target_ids,
        )

    def forward(self, batch: TrainBatch) -> BatchSums:
        assert batch.states is not None, "states must be filled"
        # Whatever wraps this module may have put other tensors in the parameters' places.
        self.head.weights = dict(self.named_parameters())
        rows = (batch.weights[:, 2:] > 0).nonzero()  # row t predicts token t + 2
        shape, length = batch.token_ids.shape, batch.token_ids.shape[1]
        flat_rows = rows[:, 0] * length + rows[:, 1]
        attend = UnrolledAttention((shape[0], length), flat_rows)
        positions = torch.arange(length, device=rows.device).expand(shape)
        following = torch.cat((batch.token_ids[:, 1:], batch.token_ids[:, :1]), dim=1)
        outputs = self.head.forward(
            following.flatten(), self.head.fuse(batch.states.flatten(0, 1)), positions.flatten(), attend
        )[flat_rows]
        sums = _Sums(self, batch, rows)
        sums.add(0, outputs)
        for step in range(1, self.options.steps):
            token_ids = batch.token_ids[rows[:, 0], (rows[:, 1] + 1 + step).clamp_max(length - 1)]
            outputs = self.head.forward(token_ids, self.head.feedback(outputs), rows[:, 1] + step, attend)
            sums.add(step, outputs)
        return sums.total()

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        from specdec.online_training.train_export import write_eagle

        write_eagle(folder, self.config, weights, target=self.features.target.config, target_ids=self.head.target_ids)


class _Sums:
    """Gathers loss and metrics over the steps of one batch."""

    def __init__(self, module: EagleModule, batch: TrainBatch, rows: Tensor) -> None:
        self._module, self._batch, self._rows = module, batch, rows
        self._reach = torch.ones(len(rows), dtype=torch.bool, device=rows.device)  # every token up to here has a weight
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, weights [N], hits [N]
        self._ids = module.head.target_ids
        known = torch.ones(module.features.vocab_size, dtype=torch.bool, device=rows.device)
        if self._ids is not None:
            known = torch.zeros_like(known).index_fill_(0, self._ids, value=True)
        # The teacher's laws at all places that a step can ask for, once: the steps ask for the same ones, shifted.
        asked = torch.zeros_like(batch.weights, dtype=torch.bool)
        asked[:, 1:-1] = batch.weights[:, 2:] > 0
        assert batch.last is not None, "states must be filled"
        teacher = module.features.teacher_logits(batch.last[asked])
        self._wanted = teacher.argmax(-1)
        self._known = known[self._wanted]  # no head can say what is not in its vocabulary
        self._teacher = teacher if self._ids is None else teacher[:, self._ids]
        self._index = (asked.flatten().cumsum(0) - 1).clamp_min(0).view_as(asked)

    def add(self, step: int, outputs: Tensor) -> None:
        """Judge the outputs [N, H] of a step: row t predicts token t + 2 + step."""
        module, (example, place) = self._module, self._rows.unbind(1)
        length = self._batch.token_ids.shape[1]
        there = (place + 2 + step).clamp_max(length - 1)
        weights = self._batch.weights[example, there] * (place + 2 + step < length)
        self._reach = self._reach & (weights > 0)
        weights = weights * self._reach
        row = self._index[example, there - 1]
        student = module.head.logits(outputs).float()
        losses = row_losses(student, self._teacher[row], module.options.mix)
        guess = student.detach().argmax(-1)
        hits = (guess if self._ids is None else self._ids[guess]) == self._wanted[row]
        loss = module.options.step_decay**step * (losses * weights * self._known[row]).sum()
        self._parts.append((loss, weights, hits))

    def total(self) -> BatchSums:
        losses, weights, hits = zip(*self._parts, strict=True)
        table, hit = torch.stack(weights, dim=1), torch.stack(hits, dim=1)  # [N, K]
        judged = table[:, -1] > 0
        return BatchSums(
            loss=torch.stack(losses).sum(),
            weight=table[:, 0].sum(),
            hits=(table * hit).sum(0),
            tried=table.sum(0),
            accepted=prefix_lengths(hit[judged]).sum().float(),
            starts=judged.sum().float(),
        )
