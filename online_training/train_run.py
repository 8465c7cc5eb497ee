"""A training run from files: epochs over examples, checkpoints, curves, and the drafter at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from specdec.errors import ConfigError, LoadError
from specdec.online_training.data import BatchOrder, Example, TrainBatch, collate
from specdec.online_training.features import TargetFeatures
from specdec.online_training.train_loop import StepReport, Trainer, TrainPlan
from specdec.online_training.train_module import DraftModule

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunOptions", "TrainRun", "split"]

_HELDOUT_TOKENS = 40_000  # most tokens of an evaluation: a minute of a small target on a CPU, no more


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How long a run goes and what it leaves behind.

    Args:
        epochs: passes over the examples.
        tokens_per_batch: of a micro-batch, padding included.
        accumulate: micro-batches of one optimizer step (on every device).
        heldout: share of the examples that are evaluated and never trained on.
        evaluate_every: steps between evaluations and curve points; 0: at the end only.
        save_every: steps between checkpoints.
        stop_after: take at most this many steps now; the run can be gone on with. 0: to the end.
        seed: of the order and of the weights.

    Raises:
        ConfigError: a field is outside its rule.
    """

    epochs: float = 3.0
    tokens_per_batch: int = 4096
    accumulate: int = 1
    heldout: float = 0.02
    evaluate_every: int = 200
    save_every: int = 100
    stop_after: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epochs > 0 or min(self.tokens_per_batch, self.accumulate, self.save_every) < 1:
            raise ConfigError(f"epochs must be > 0, tokens_per_batch, accumulate and save_every >= 1, got {self}")
        if not 0 <= self.heldout < 1 or min(self.evaluate_every, self.stop_after) < 0:
            raise ConfigError(f"heldout must be in [0, 1), evaluate_every and stop_after >= 0, got {self}")


def split(examples: Sequence[Example], share: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """(trained on, held out): a random share, the same for the same seed; at least one of each if asked for.

    Raises:
        LoadError: a single example cannot be split.
    """
    if share and len(examples) < 2:
        raise LoadError(f"holding out a share of {share} needs at least two examples, got {len(examples)}")
    count = max(1, round(share * len(examples))) if share else 0
    order = np.random.default_rng((seed, 1)).permutation(len(examples)).tolist()
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


class TrainRun:
    """Trains a module on examples and exports it.

    Every step's data follow from the options and the step number, so a run that was killed goes on from its last
    checkpoint to the same weights (bit for bit on one CPU with the same number of threads).

    Args:
        module: on its device, its states described by ``features``.
        features: of the target.
        examples: all of them.
        plan: rates; its ``total_steps`` is replaced by what the epochs make.
        options: of the run.
        work: a directory for checkpoint, TensorBoard events and the curve.
        is_resumed: go on from the checkpoint in ``work``; False: begin anew.

    Raises:
        LoadError: the checkpoint is of another run.
    """

    def __init__(
        self,
        module: DraftModule,
        features: TargetFeatures,
        examples: Sequence[Example],
        *,
        plan: TrainPlan,
        options: RunOptions,
        work: Path,
        is_resumed: bool = True,
    ) -> None:
        self.options, self.work = options, work
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.examples, heldout = split(examples, options.heldout, seed=options.seed)
        lengths = [len(example.token_ids) for example in self.examples]
        self._order = BatchOrder(lengths, tokens_per_batch=options.tokens_per_batch, seed=options.seed)
        self._ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        total = max(1, self._order.count(options.epochs) // (options.accumulate * self._ranks))
        self.trainer = Trainer(module, features, replace(plan, total_steps=total))
        self._heldout = _batches_of(heldout, options.tokens_per_batch)
        self.checkpoint = work / "checkpoint.pt"
        if is_resumed and self.checkpoint.exists():
            self.trainer.resume(self.checkpoint)
        elif self._rank == 0:
            work.mkdir(parents=True, exist_ok=True)
            (work / "curve.jsonl").write_text("")

    @property
    def total_steps(self) -> int:
        """Of the whole schedule."""
        return self.trainer.plan.total_steps

    def batches(self, step: int) -> list[TrainBatch]:
        """The micro-batches of a step on this rank."""
        first = (step * self._ranks + self._rank) * self.options.accumulate
        indices = range(first, first + self.options.accumulate)
        return [collate([self.examples[i] for i in self._order.at(index)], seed=index) for index in indices]

    def evaluate(self) -> StepReport:
        """The figures on the held-out examples."""
        if not self._heldout:
            raise ConfigError("an evaluation needs heldout > 0")
        mine = self._heldout[self._rank :: self._ranks] or self._heldout[:1]
        return self.trainer.evaluate(mine)

    def run(self, report: Callable[[StepReport], None] = lambda _: None) -> StepReport:
        """Train to the end of the schedule, or for ``stop_after`` steps; the last step's figures.

        Effects: checkpoints, TensorBoard events and ``curve.jsonl`` in ``work``.
        """
        trainer, options = self.trainer, self.options
        last = self.total_steps
        if options.stop_after:
            last = min(last, trainer.step + options.stop_after)
        writer = self._writer()
        done = StepReport(trainer.step, math.nan, math.nan, ())
        try:
            while trainer.step < last:
                done = trainer.train_step(self.batches(trainer.step))
                report(done)
                _write_scalars(writer, "train", done)
                is_end = trainer.step == last
                if is_end or (options.evaluate_every and trainer.step % options.evaluate_every == 0):
                    self._note(done, writer)
                if is_end or trainer.step % options.save_every == 0:
                    trainer.save(self.checkpoint)
        finally:
            if writer is not None:
                writer.close()
        return done

    def export(self, folder: Path) -> None:
        """Write the drafter as a checkpoint; every rank must call."""
        weights = self.trainer.weights()
        if self._rank == 0:
            self.trainer.module.export(weights, folder)

    def _note(self, done: StepReport, writer: SummaryWriter | None) -> None:
        """A point of the curve, with the held-out figures where there are held-out examples."""
        row: dict[str, Any] = {"train": asdict(done)}
        if self._heldout:
            found = self.evaluate()
            _write_scalars(writer, "heldout", found)
            row["heldout"] = asdict(found)
        if self._rank == 0:
            with (self.work / "curve.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def _writer(self) -> SummaryWriter | None:
        if self._rank:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # Points of steps that a killed run took after its last checkpoint are replaced.
        return SummaryWriter(str(self.work / "tensorboard"), purge_step=self.trainer.step + 1)


def _write_scalars(writer: SummaryWriter | None, side: str, report: StepReport) -> None:
    if writer is None:
        return
    figures = {"loss": report.loss, "acceptance_length": report.acceptance_length}
    if side == "train":
        figures |= {"gradient_norm": report.gradient_norm, "rate": report.rate, "rows": report.num_tokens}
    for name, value in figures.items():
        writer.add_scalar(f"{name}/{side}", value, report.step)
    for depth, value in enumerate(report.agreement, start=1):
        writer.add_scalar(f"agreement_{depth}/{side}", value, report.step)


def _batches_of(examples: Sequence[Example], tokens_per_batch: int) -> list[TrainBatch]:
    """Fixed batches, up to a bound on the tokens."""
    ends = np.cumsum([len(example.token_ids) for example in examples])
    kept = examples[: max(1, int(np.searchsorted(ends, _HELDOUT_TOKENS)))]
    found: list[list[Example]] = []
    for example in sorted(kept, key=lambda one: len(one.token_ids)):
        if found and len(example.token_ids) * (len(found[-1]) + 1) <= tokens_per_batch:
            found[-1].append(example)
        else:
            found.append([example])
    return [collate(some) for some in found]
