"""``specdec demo``: the bundled model edits real source, plainly and with a drafter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import BudgetOption, JsonOption
from specdec.errors import InternalError

if TYPE_CHECKING:
    from specdec.demo import DemoResult

__all__ = ["demo"]


def demo(
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="How many edits.")] = 5,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each way; the median counts.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Picks the source and the edits.")] = 0,
    drafter: Annotated[str, typer.Option("--drafter", "-d", help="Who guesses.")] = "ngram",
    budget: BudgetOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="In place of the bundled model.")] = None,
    json: JsonOption = False,
) -> None:
    """Edit real Python source with the bundled model: the same tokens plainly and with a drafter, timed side by side.

    The source comes from this interpreter's standard library, from files that the model has not seen in training.
    """
    from specdec.bench.edit_tasks import heldout_tasks
    from specdec.demo import run_demo

    bundled = Path(__file__).parents[1] / "bench" / "tiny"
    loaded = load_model(model or str(bundled), dtype="float32")
    if loaded.tokenizer is None:
        raise InternalError("a model was loaded without the tokenizer that was asked for")
    work = heldout_tasks(tasks, seed=seed)
    with printing.progress() as bar:
        task_id = bar.add_task(f"editing with {loaded.name}", total=len(work))
        outcome = run_demo(
            loaded.model,
            loaded.tokenizer,
            work,
            drafter=drafter,
            budget=budget,
            repeats=repeats,
            on_progress=lambda: bar.advance(task_id),
        )
    if json:
        plain, drafted = outcome.tokens_per_s
        totals = {"speedup": outcome.speedup, "same_tokens": outcome.same_tokens}
        rates = {"plain_tokens_per_s": plain, "drafted_tokens_per_s": drafted}
        printing.result({"drafter": drafter, **totals, **rates, "edits": [asdict(edit) for edit in outcome.edits]})
    else:
        _show(outcome)
    if not outcome.same_tokens:
        raise typer.Exit(1)


def _show(outcome: DemoResult) -> None:
    shown = next((edit for edit in outcome.edits if edit.diff), outcome.edits[0])
    printing.text(f"{shown.instruction}\n\n{shown.diff or 'The model returned the source unchanged.'}\n\n")
    header = (
        f"{'edit':<18} {'tokens':>6} {'plain':>9} {outcome.drafter:>9} {'speed-up':>9} {'per step':>9}  same tokens"
    )
    printing.text(f"{header}\n")
    for edit in outcome.edits:
        plain, drafted = edit.num_new_tokens / edit.plain_s, edit.num_new_tokens / edit.drafted_s
        printing.text(
            f"{edit.kind:<18} {edit.num_new_tokens:>6} {plain:>7.0f}/s {drafted:>7.0f}/s {edit.speedup:>8.2f}x "
            f"{edit.acceptance_length:>9.2f}  {'yes' if edit.same_tokens else 'NO'}\n"
        )
    plain, drafted = outcome.tokens_per_s
    num_right = sum(edit.is_right for edit in outcome.edits)
    total = sum(edit.num_new_tokens for edit in outcome.edits)
    printing.text(
        f"{'all':<18} {total:>6} {plain:>7.0f}/s {drafted:>7.0f}/s {outcome.speedup:>8.2f}x\n\n"
        f"{num_right} of {len(outcome.edits)} edits are exactly right; tokens per second include the prompt; "
        f"per step = tokens per forward of the model.\n"
    )
