"""One optimizer over a drafter in training: steps, schedule, accumulation, checkpoints. It knows no files of data.

``Trainer.train_step`` is the seam between the offline command and the online daemon: both hand it batches of token ids
with weights, with or without the target's states.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from specdec.errors import ConfigError, LoadError
from specdec.online_training.data import TrainBatch
from specdec.online_training.features import TargetFeatures
from specdec.online_training.train_module import BatchSums, DraftModule

__all__ = ["StepReport", "TrainPlan", "Trainer"]


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How weights follow gradients.

    Args:
        total_steps: length of the schedule, in optimizer steps.
        learning_rate: peak rate of AdamW.
        schedule: after the warm-up: ``constant``, ``cosine`` or ``linear`` (to 0).
        warmup: share of ``total_steps`` in which the rate rises from 0.
        weight_decay: of AdamW and Muon.
        clip: largest norm of the gradient.
        muon_lr: above 0: hidden matrices learn by Muon at this peak rate, the rest by AdamW.
        precision: ``bf16``: products under autocast, weights stay float32; ``fp32``: everything.

    Raises:
        ConfigError: a field is outside its rule.
    """

    total_steps: int
    learning_rate: float = 6e-4
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: float = 0.04
    weight_decay: float = 0.0
    clip: float = 1.0
    muon_lr: float = 0.0
    precision: Literal["bf16", "fp32"] = "fp32"

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(f"total_steps must be >= 1, got {self.total_steps}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0 or self.muon_lr < 0:
            raise ConfigError(f"warmup must be in [0, 1), weight_decay and muon_lr >= 0, got {self}")
        if self.schedule not in ("constant", "cosine", "linear") or self.precision not in ("bf16", "fp32"):
            raise ConfigError(
                f"schedule must be constant, cosine or linear and precision bf16 or fp32, got {self.schedule!r} and "
                f"{self.precision!r}"
            )

    def rate(self, step: int) -> float:
        """The factor of the peak rate in a step, counted from 0."""
        warmup = self.warmup * self.total_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = 1 - (step - warmup) / max(1.0, self.total_steps - warmup)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (1 - max(0.0, left))))
        return max(0.0, left) if self.schedule == "linear" else 1.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step, or one evaluation, found.

    Args:
        step: optimizer steps taken so far.
        loss: weighted mean over the rows.
        acceptance_length: simulated, of greedy chains as deep as the training: accepted tokens + 1; NaN: no row was
            followed by enough answer to judge.
        agreement: by depth: how often the drafter names the target's likeliest token, given the true tokens before.
        gradient_norm: before clipping; 0 in an evaluation.
        rate: factor of the peak learning rate.
        num_tokens: rows with a weight.
    """

    step: int
    loss: float
    acceptance_length: float
    agreement: tuple[float, ...]
    gradient_norm: float = 0.0
    rate: float = 0.0
    num_tokens: float = 0.0


class Trainer:
    """Trains one module; in a ``torch.distributed`` group its parameters are sharded (FSDP2), one batch per rank.

    Args:
        module: on its device.
        features: of the target that it drafts for.
        plan: schedule and rates.
    """

    def __init__(self, module: DraftModule, features: TargetFeatures, plan: TrainPlan) -> None:
        self.module, self.features, self.plan = module, features, plan
        self.step = 0
        self.device = next(module.parameters()).device
        self.num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.num_ranks > 1:
            from torch.distributed.fsdp import fully_shard

            if plan.muon_lr:
                raise ConfigError("muon_lr must be 0 on several devices: Muon needs whole matrices")
            fully_shard(module)
        self._optimizers = _optimizers(module, plan)

    def train_step(self, batches: Sequence[TrainBatch]) -> StepReport:
        """One optimizer step on the mean over all rows of some micro-batches (on every rank its own).

        A step without any row that counts changes nothing but the step number.
        """
        self.module.train()
        sums = [self._forward(batch, is_training=True) for batch in batches]
        total = self._reduced(sums)
        scale = self.num_ranks / float(total["weight"]) if total["weight"] > 0 else 0.0
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        norm = _full(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.clip)).item()
        rate = self.plan.rate(self.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            if scale:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return self._report(total, norm, rate)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TrainBatch]) -> StepReport:
        """The same figures without learning."""
        self.module.eval()
        return self._report(self._reduced([self._forward(batch, is_training=False) for batch in batches]), 0.0, 0.0)

    def _forward(self, batch: TrainBatch, *, is_training: bool) -> BatchSums:
        precision: AbstractContextManager[Any] = (
            torch.autocast(self.device.type, torch.bfloat16) if self.plan.precision == "bf16" else nullcontext()
        )
        with precision:
            sums: BatchSums = self.module(self.features.fill(batch.to(self.device)))
        if is_training:
            torch.autograd.backward(sums.loss)
        return sums

    def _reduced(self, sums: Sequence[BatchSums]) -> dict[str, Tensor]:
        total = {
            field.name: torch.stack([getattr(part, field.name).detach().double() for part in sums]).sum(0)
            for field in fields(BatchSums)
        }
        if self.num_ranks > 1:
            for value in total.values():
                dist.all_reduce(value)
        return total

    def _report(self, total: dict[str, Tensor], norm: float, rate: float) -> StepReport:
        starts, weight = float(total["starts"]), float(total["weight"])
        return StepReport(
            step=self.step,
            loss=float(total["loss"]) / weight if weight else math.nan,
            acceptance_length=1 + float(total["accepted"]) / starts if starts else math.nan,
            agreement=tuple((total["hits"] / total["tried"].clamp_min(1e-9)).tolist()),
            gradient_norm=norm,
            rate=rate,
            num_tokens=weight,
        )

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, whole, float32, on the CPU. On several devices every rank must call it."""
        return {name: _full(parameter.detach()).cpu().clone() for name, parameter in self.module.named_parameters()}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and numbers; whole also when sharded."""
        return {"step": self.step, "weights": self.weights(), "optimizers": [_state_of(o) for o in self._optimizers]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave for the same module and plan; the next step is then the same one.

        Raises:
            LoadError: it belongs to another module.
        """
        own = dict(self.module.named_parameters())
        shapes = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in own.items()}:
            raise LoadError("the checkpoint is of another drafter: names or shapes of its weights differ")
        with torch.no_grad():
            for name, weight in state["weights"].items():
                own[name].copy_(_like(weight, own[name]))
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            _load_into(optimizer, saved)
        self.step = int(state["step"])

    def save(self, file: Path) -> None:
        """Write ``state`` to a file, whole or not at all; rank 0 writes, every rank must call."""
        state = self.state()
        if self.num_ranks == 1 or dist.get_rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".tmp")
            torch.save(state, draft)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.replace(file)
        if self.num_ranks > 1:
            dist.barrier()  # nobody goes on before the file is there

    def resume(self, file: Path) -> None:
        """``load_state`` from a file.

        Raises:
            LoadError: it cannot be read, or belongs to another module.
        """
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise LoadError(f"cannot read the checkpoint {file}: {str(error).splitlines()[0]}") from error
        self.load_state(state)


def _optimizers(module: DraftModule, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_hidden = parameter.ndim == 2 and not any(part in name for part in ("lm_head", "embed", "markov"))
        (matrices if plan.muon_lr and is_hidden else rest).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        groups: list[dict[str, Any]] = [{"params": matrices, "peak": plan.muon_lr}]
        found.append(torch.optim.Muon(groups, weight_decay=plan.weight_decay, momentum=0.95))
    groups = [{"params": rest, "peak": plan.learning_rate}]
    found.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=plan.weight_decay))
    return found


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    whole = {
        index: {key: _full(value).cpu().clone() if isinstance(value, Tensor) else value for key, value in one.items()}
        for index, one in state["state"].items()
    }
    return {**state, "state": whole}


def _load_into(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: _like(value, parameters[index]) if isinstance(value, Tensor) and value.ndim else value
            for key, value in one.items()
        }
        for index, one in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _full(value: Any) -> Tensor:
    """A tensor as a whole: sharded ones are gathered."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _like(value: Tensor, parameter: Any) -> Tensor:
    """``value`` on the parameter's device, cut up as it is."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
