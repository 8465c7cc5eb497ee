"""Train the bundled code model on the CPU: tokenizer, model, checkpoints, export.

    python -m specdec.bench.tiny_train --out bench/tiny --steps 3000 [--prose peps.txt.gz] [--max-minutes 60]

Hidden matrices learn by Muon, the rest by AdamW, in bfloat16 autocast over float32 weights. The schedule counts
steps; with ``--max-minutes`` the final decay starts early when the time would not last, and pauses do not count.
Killed runs go on from the last checkpoint in ``--work``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from specdec.bench import tiny_attention
from specdec.bench.edit_tasks import stdlib_root
from specdec.bench.tiny_data import SPECIAL_TOKENS, Corpus, Mixture, RowStream, load_corpus, train_tokenizer
from specdec.bench.tiny_init import init_induction
from specdec.bench.tiny_loops import DURING_DECAY, FINISH, Lesson, answer_rows, loop_loss, loop_rows
from specdec.errors import ConfigError

__all__ = ["TrainPlan", "Trainer", "export_model", "main", "new_model"]

_DECAY_SHARE = 0.35  # of all steps; the rest runs at full rate after the warm-up
_PAUSE_SECONDS = 60.0  # a step that took longer was paused from outside; the excess does not count as training


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What one run does; everything that decides the weights except the corpus."""

    steps: int = 3000
    tokens_per_step: int = 4096
    warmup: int = 20
    muon_lr: float = 0.015  # times sqrt(max(1, rows / columns))
    adam_lr: float = 2e-4
    circuit_rate: float = 0.01  # factor of muon_lr for what the induction circuit runs through
    seed: int = 0
    lengths: tuple[tuple[int, float], ...] = ((512, 0.5), (1024, 0.35), (2048, 0.15))  # row length, share of steps
    loop_every: int = 3  # steps between two lessons against the model's own loops, once the decay has begun
    finish_steps: int = 90  # after the decay: every step with lessons on plain code and on answers
    finish_rate: float = 0.5  # factor of all rates at the start of the finish; falls to 0
    # The exported weights are a mean of three: of the start, which copies; after the decay, which knows code; after the
    # finish, which does not loop. The mean does each nearly as well as the one that does it best.
    average: tuple[float, float, float] = (0.3, 0.28, 0.42)
    mimetic: bool = True
    mixture: Mixture = Mixture()
    decay_mixture: Mixture = Mixture(edit=0.85, plain=0.1, prose=0.0, drill=0.05, prompt_weight=0.2)
    finish_mixture: Mixture = Mixture(edit=0.75, plain=0.2, prose=0.0, drill=0.05, prompt_weight=0.2)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens_per_step < max(length for length, _ in self.lengths):
            raise ConfigError(f"steps must be >= 1 and tokens_per_step hold the longest row, got {self}")


def new_model(vocab_size: int, *, seed: int, mimetic: bool = True) -> Any:
    """Return an untrained 5.9 M parameter Qwen3-shaped model in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index("<|bos|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|eos|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
    )
    model = Qwen3ForCausalLM(config)
    if mimetic:
        init_induction(model, seed=seed)
    return model


def export_model(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bfloat16 safetensors), config, generation config and tokenizer files to ``out``."""
    config = Qwen3Config(**{**model.config.to_dict(), "dtype": "bfloat16"})  # without the training attention's name
    copy = Qwen3ForCausalLM(config).to(torch.bfloat16)
    copy.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    copy.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _optimizers(model: Any, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices (the circuit's at a rate of their own) and AdamW for the rest."""
    circuit, hidden, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name:
            rest.append(parameter)
        elif plan.mimetic and name.startswith(("model.layers.0.", "model.layers.1.self_attn")):
            circuit.append(parameter)
        else:
            hidden.append(parameter)
    groups = [{"params": hidden, "peak": plan.muon_lr}]
    if circuit:
        groups.append({"params": circuit, "peak": plan.muon_lr * plan.circuit_rate, "weight_decay": 0.0})
    rest_groups = [{"params": rest, "peak": plan.adam_lr}]
    return [
        torch.optim.Muon(groups, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest_groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Trainer:
    """Model, optimizers and position in the schedule of one run; ``save`` and ``resume`` carry all three."""

    def __init__(self, plan: TrainPlan, corpus: Corpus, heldout: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        self.plan = plan
        self.model = new_model(len(tokenizer), seed=plan.seed, mimetic=plan.mimetic)
        tiny_attention.register()
        self.model.set_attn_implementation(tiny_attention.NAME)
        self.step = 0
        self.seconds = 0.0
        self.decay_from = round(plan.steps * (1 - _DECAY_SHARE))
        self.stop_at = plan.steps
        self._rows = RowStream(corpus, tokenizer, seed=plan.seed)
        self._loop_prompts = RowStream(corpus, tokenizer, seed=plan.seed + 1)
        self._heldout_rows = RowStream(heldout, tokenizer, seed=plan.seed)
        self.optimizers = _optimizers(self.model, plan)
        self.decayed: dict[str, torch.Tensor] | None = None  # the weights at the end of the decay

    def _loss(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted mean loss and, per position, whether the next token was predicted."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        hit = logits.argmax(-1).flatten() == ids[:, 1:].flatten()
        return (losses * wanted).sum() / wanted.sum(), hit

    @property
    def last_step(self) -> int:
        """Steps of the whole schedule, the finish included."""
        return self.stop_at + self.plan.finish_steps

    def _rate(self) -> float:
        if self.step >= self.stop_at:
            return self.plan.finish_rate * (self.last_step - self.step) / max(1, self.plan.finish_steps)
        if self.step < self.plan.warmup:
            return (self.step + 1) / self.plan.warmup
        left = (self.stop_at - self.step) / max(1, self.stop_at - self.decay_from)
        return min(1.0, max(0.0, left))

    def _length(self) -> int:
        """Return this step's row length: a fixed interleaving with the planned shares, short rows first."""
        lengths, shares = zip(*self.plan.lengths, strict=True)
        if self.step < self.plan.steps // 20:
            return int(lengths[0])
        place = (self.step * 0.6180339887) % 1.0 * sum(shares)  # golden-ratio steps cover [0, 1) evenly
        for length, share in zip(lengths, shares, strict=True):
            if place < share:
                return int(length)
            place -= share
        return int(lengths[-1])

    def train_step(self) -> float:
        """Take one optimizer step and return its loss."""
        started = time.monotonic()
        length = self._length()
        rows = self._rows.rows(self.step, self.plan.tokens_per_step // length, length, self._mixture())
        ids, weights = torch.from_numpy(rows[0]).long(), torch.from_numpy(rows[1])
        total = 0.0
        parts = max(1, self.plan.tokens_per_step // 4096)  # micro-batches keep activations in a few hundred MB
        for some, some_weights in zip(ids.chunk(parts), weights.chunk(parts), strict=True):
            loss, _ = self._loss(some, some_weights)
            torch.autograd.backward(loss / parts)
            total += loss.item() / parts
        if self.step >= self.stop_at or (self.step >= self.decay_from and self.step % self.plan.loop_every == 0):
            self._unlearn_loops()
        rate = self._rate()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step == self.stop_at:
            self.decayed = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.seconds += min(_PAUSE_SECONDS, time.monotonic() - started)
        return total

    def _mixture(self) -> Mixture:
        if self.step >= self.stop_at:
            return self.plan.finish_mixture
        return self.plan.decay_mixture if self.step >= self.decay_from else self.plan.mixture

    def _unlearn_loops(self) -> None:
        """Add the gradient of the unlikelihood of this step's own loops."""
        self.model.set_attn_implementation("sdpa")  # the training attention has no cache and no padding
        is_finish = self.step >= self.stop_at
        shape = FINISH if is_finish else DURING_DECAY
        lessons: list[Lesson] = [loop_rows(self.model, self._loop_prompts, self.step, shape)]
        if is_finish:
            lessons.append(answer_rows(self.model, self._loop_prompts, self.step))
        for lesson in lessons:
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(input_ids=lesson.ids, attention_mask=lesson.attention, use_cache=False).logits
            torch.autograd.backward(loop_loss(logits, lesson))
        self.model.set_attn_implementation(tiny_attention.NAME)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return losses and next-token accuracies on held-out plain code and on held-out edit answers."""
        out = {}
        for name, mixture in (
            ("code", Mixture(edit=0, plain=1, prose=0, drill=0)),
            ("edit", Mixture(edit=1, plain=0, prose=0, drill=0, prompt_weight=0.0)),
        ):
            rows = self._heldout_rows.rows(-1, 8, 1024, mixture)
            ids, weights = torch.from_numpy(rows[0]).long(), torch.from_numpy(rows[1])
            loss, hit = self._loss(ids, weights)
            wanted = weights[:, 1:].flatten() > 0
            out[f"{name}_loss"] = round(loss.item(), 4)
            out[f"{name}_accuracy"] = round(hit[wanted].float().mean().item(), 4)
        return out

    def limit(self, minutes: float) -> None:
        """Start the decay now if the time left only suffices for it, and stop when it is done."""
        planned = round(self.plan.steps * (1 - _DECAY_SHARE))
        if self.step < self.decay_from == planned and self.seconds > minutes * 60 * (1 - _DECAY_SHARE):
            self.decay_from = self.step
            self.stop_at = min(self.plan.steps, round(self.step / (1 - _DECAY_SHARE)))

    def averaged(self) -> Any:
        """The model to export: the weighted mean of start, end of the decay, and present weights."""
        model = new_model(self.model.config.vocab_size, seed=self.plan.seed, mimetic=self.plan.mimetic)
        now = self.model.state_dict()
        sources = (model.state_dict(), self.decayed or now, now)
        weights = self.plan.average
        mean = {name: sum(w * source[name] for w, source in zip(weights, sources, strict=True)) for name in now}
        model.load_state_dict(mean)
        return model

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs, at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "decayed": self.decayed,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "clock": (self.step, self.seconds, self.decay_from, self.stop_at),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        """Take over a state that ``save`` wrote for the same plan."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.decayed = state["decayed"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.decay_from, self.stop_at = state["clock"]


def _run(trainer: Trainer, work: Path, max_minutes: float, save_minutes: float, report: Callable[[str], None]) -> None:
    """Train to the end of the schedule; ``work`` receives the loss curve and the checkpoints."""
    curve, checkpoint = work / "curve.jsonl", work / "checkpoint.pt"
    saved = trainer.seconds
    while trainer.step < trainer.last_step:
        loss = trainer.train_step()
        trainer.limit(max_minutes)
        last = trainer.step == trainer.last_step
        if trainer.step % 10 == 0 or last:
            row: dict[str, float] = {"step": trainer.step, "seconds": round(trainer.seconds), "loss": round(loss, 4)}
            if trainer.step % 100 == 0 or trainer.step == 10 or last:
                row |= trainer.validate()
            with curve.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            report(json.dumps(row))
        if last or trainer.seconds - saved > save_minutes * 60:
            trainer.save(checkpoint)
            saved = trainer.seconds


def _tokenizer(corpus: Corpus, work: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this work folder, trained there on first use."""
    folder = work / "tokenizer"
    if not folder.exists():
        texts = [*dict.fromkeys(corpus.files), *corpus.prose[::4]]  # prose is there for its words, not to dominate
        train_tokenizer(iter(texts), vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _write_curve(work: Path, out: Path, plan: TrainPlan) -> None:
    """Put the plan and the loss curve beside the weights; a resumed run's repeated steps count once."""
    rows = {row["step"]: row for row in map(json.loads, (work / "curve.jsonl").read_text().splitlines())}
    document = {"plan": asdict(plan), "torch": torch.__version__, "curve": [rows[step] for step in sorted(rows)]}
    (out / "loss_curve.json").write_text(json.dumps(document, indent=1) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Where to export the model.")] = Path("bench/tiny"),
    work: Annotated[Path, typer.Option(help="Checkpoints, tokenizer and loss curve.")] = Path(".cache/tiny"),
    root: Annotated[Path | None, typer.Option(help="Python sources; this interpreter's library if omitted.")] = None,
    prose: Annotated[Path | None, typer.Option(help="More text, a gzip file (the PEPs).")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the full schedule.", min=1)] = 3000,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data order.")] = 0,
    muon_lr: Annotated[float, typer.Option(help="Peak rate of the hidden matrices.")] = 0.015,
    adam_lr: Annotated[float, typer.Option(help="Peak rate of the embedding and the norms.")] = 2e-4,
    plain_init: Annotated[bool, typer.Option(help="Start without the induction circuit, to compare.")] = False,
    max_minutes: Annotated[float, typer.Option(help="Decay in time to end about here.")] = 1e9,
    save_minutes: Annotated[float, typer.Option(help="Time between checkpoints.")] = 4.0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    pid_file: Annotated[Path | None, typer.Option(help="Where to write the process id, for SIGSTOP.")] = None,
    only_export: Annotated[bool, typer.Option(help="Export the last checkpoint as it is.")] = False,
) -> None:
    """Train the bundled code model, or go on with a killed run, and export it."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if pid_file:
        pid_file.write_text(f"{os.getpid()}\n")
    plan = TrainPlan(steps=steps, seed=seed, muon_lr=muon_lr, adam_lr=adam_lr, mimetic=not plain_init)
    corpus = load_corpus(root or stdlib_root(), prose)
    heldout = load_corpus(root or stdlib_root(), None, heldout=True)
    trainer = Trainer(plan, corpus, heldout, _tokenizer(corpus, work, 4096))
    if (work / "checkpoint.pt").exists():
        trainer.resume(work / "checkpoint.pt")
        typer.echo(f"resumed at step {trainer.step}")
    if not only_export:
        _run(trainer, work, max_minutes, save_minutes, typer.echo)
    export_model(trainer.averaged(), _tokenizer(corpus, work, 4096), out)
    _write_curve(work, out, plan)


if __name__ == "__main__":
    typer.run(main)
