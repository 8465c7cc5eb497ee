"""``specdec check``: does speculation change the output of this model on this machine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import DeviceOption, DTypeOption, JsonOption

if TYPE_CHECKING:
    from specdec.check import CheckReport, Comparison, Difference, TwoSample

__all__ = ["check"]

EXIT_BUG = 1


def check(
    model: Annotated[str, typer.Argument(help="A directory with a Hugging Face model, or owner/name on the hub.")],
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter", "-d", help="none, ngram, random-tree (hostile), ...; may be repeated. [default: all]"
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="A file of prompts to continue: .jsonl with a string or a 'prompt' per line, or text with lines of "
            "--- between prompts. Without it, built-in ones of several kinds.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens per output.")] = 48,
    budget: Annotated[int, typer.Option("--budget", help="Draft tokens per step.")] = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests at a time, of different lengths.")] = 5,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per prompt when sampling; 0 leaves sampling out.")] = 2,
    samples: Annotated[
        int, typer.Option("--samples", help="Size of each sample of the two-sample tests; 0 leaves them out.")
    ] = 500,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Also run broken engines, which must be caught.")
    ] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Run with strict numerics: a difference from plain decoding is then never a tie."
        ),
    ] = False,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find out whether speculation changes the output of a model, here and now.

    Greedy outputs are compared with plain decoding and with transformers' generate, sampled ones with plain decoding
    under the same seed, token for token; then two samples are compared, law against law. The first difference of an
    output is either a numeric tie of the precision, which a re-run in a wider one decides, or a bug.

    Exit status: 0 no bug was found, 1 one was, 2 the check could not be made.
    """
    from specdec.check import BUILTIN_PROMPTS, CheckOptions, check_model, read_prompts

    # Whatever can be wrong without the model is said before the minutes that loading may take.
    asked = CheckOptions(
        drafters=tuple(drafter) if drafter else CheckOptions().drafters,
        max_new_tokens=max_new_tokens,
        budget=budget,
        batch_size=batch_size,
        num_seeds=seeds,
        num_samples=samples,
        has_controls=self_test,
        is_strict=strict,
    )
    texts = BUILTIN_PROMPTS if prompts is None else read_prompts(prompts)
    loaded = load_model(model, dtype=dtype, device=device)
    assert loaded.tokenizer is not None  # load_model requires one
    with printing.progress() as bar:
        task = bar.add_task("starting", total=None)
        report = check_model(
            loaded.model,
            loaded.tokenizer,
            name=model,
            texts=texts,
            options=asked,
            on_progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if as_json:
        printing.result(report.as_json())
    else:
        printing.text(_as_text(report))
    if not report.is_lossless:
        raise typer.Exit(EXIT_BUG)


def _as_text(report: CheckReport) -> str:
    lines = [f"{report.model}: {report.dtype} on {report.device}, {report.path} path", "", "Token for token"]
    for comparison in report.comparisons:
        lines += _comparison_lines(comparison)
    if report.two_samples:
        lines += ["", "Law against law"]
        lines += [_two_sample_line(test) for test in report.two_samples]
    if report.controls:
        lines += ["", "Broken engines, which must be caught"]
        lines += [f"  {'caught' if control.is_caught else 'MISSED'}  {control.name}" for control in report.controls]
    lines += ["", *(f"note: {note}" for note in report.notes)]
    num_tokens = sum(comparison.num_tokens for comparison in report.comparisons)
    num_ties = sum(comparison.num_ties for comparison in report.comparisons)
    ties = f"{num_ties} numeric ties ({1000 * num_ties / max(num_tokens, 1):.2f} per 1000 tokens)"
    if num_ties or report.num_bugs:
        lines.append(f"rule: {report.tie_rule}")
    verdict = "lossless: no bug" if report.is_lossless else f"NOT LOSSLESS: {report.num_bugs} bugs"
    lines.append(f"{verdict} in {num_tokens} compared tokens, {ties}; {report.seconds:.0f} s")
    return "\n".join(lines) + "\n"


def _comparison_lines(comparison: Comparison) -> list[str]:
    num_equal = comparison.num_requests - len(comparison.differences)
    against = "model.generate" if comparison.against == "generate" else "plain decoding"
    length = "" if comparison.acceptance_length is None else f", acceptance length {comparison.acceptance_length:.2f}"
    mark = "BUG" if comparison.num_bugs else "tie" if comparison.num_ties else "ok "
    line = (
        f"  {mark}  {comparison.setting}: {comparison.decoder} = {against} in {num_equal} of {comparison.num_requests} "
        f"outputs, {comparison.num_tokens} tokens{length}"
    )
    return [line, *(line for difference in comparison.differences for line in _difference_lines(difference))]


def _difference_lines(difference: Difference) -> list[str]:
    expected, got = difference.expected, difference.got
    lines = [
        f"       {difference.verdict} in {difference.request_id!r} at output token {difference.position}: "
        f"{expected.token_id} {expected.text!r} became {got.token_id} {got.text!r}",
    ]
    if difference.contested_margin is not None:
        wide = "" if difference.wide_margin is None else f", {difference.wide_margin:.3g} in {difference.wide_dtype}"
        lines.append(
            f"           margin of the best two {difference.top2_margin:.3g}, of these two "
            f"{difference.contested_margin:.3g}{wide}; resolution of a logit {difference.resolution:.3g}"
        )
    return [*lines, f"           {difference.reason}"]


def _two_sample_line(test: TwoSample) -> str:
    power = (
        "this sees nothing: the law is too flat"
        if test.detectable_tv is None
        else f"a law that is off by {test.detectable_tv:.3f} is found with probability {test.power}"
    )
    mark = "BUG" if test.is_bug else "-- " if test.detectable_tv is None else "ok "
    return (
        f"  {mark}  {test.setting}: p = {test.p_value:.2g} (bug below "
        f"{test.significance:g}), distance of the samples {test.total_variation:.3f} in {test.num_cells} cells, "
        f"{test.num_samples} x {test.length} tokens each; {power}"
    )
