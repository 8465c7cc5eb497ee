"""``specdec simulate-load``: what a policy would do to a served load, before anything is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.commands import printing
from specdec.errors import ConfigError

__all__ = ["simulate_load"]


def simulate_load(
    arrivals: Annotated[
        list[Path], typer.Option("--arrivals", "-a", help="Arrival traces: Azure, BurstGPT, Mooncake, or our columns.")
    ],
    costs: Annotated[Path, typer.Option("--costs", help="A cost table, as engines keep it in the user's cache.")],
    acceptance: Annotated[
        Path | None, typer.Option("--acceptance", help="Recorded acceptance (.npz); with --traces it is made.")
    ] = None,
    traces: Annotated[
        list[Path] | None, typer.Option("--traces", "-t", help="Recorded answers to make the acceptance from.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Of the traces.")] = None,
    drafter: Annotated[str, typer.Option("--drafter", "-d", help="Recorded on the traces; it must read text only.")] = (
        "fused:suffix+lookahead+ngram"
    ),
    policies: Annotated[
        str,
        typer.Option("--policies", help="Of none, static-K, adaptive, each with +prune, +overlap, +chunks."),
    ] = "none,static-2,static-4,static-8,adaptive",
    loads: Annotated[str, typer.Option("--loads", help="Speeds of the trace; comma-separated.")] = "1",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Engines; arrivals go to them in turn.")] = 1,
    requests: Annotated[int, typer.Option("--requests", min=0, help="The first so many; 0: all.")] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Prompts and answers are cut to so many; 0: not.")
    ] = 0,
    max_batch_size: Annotated[int, typer.Option("--max-batch-size", min=1, help="Of one engine.")] = 16,
    max_prefill_tokens: Annotated[int, typer.Option("--max-prefill-tokens", min=1, help="Per step.")] = 512,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Recorded calls taken of each trace.")] = 20,
    draft_ms: Annotated[
        str | None,
        typer.Option("--draft-ms", help="FIXED,EACH: of a draft call and its requests; default: the table's."),
    ] = None,
    prune: Annotated[
        str, typer.Option("--prune", help="DEPTH,FOUND,MS: where the probe is, the share of rejects found, its time.")
    ] = "0.5,0.25,0.02",
    slo: Annotated[str, typer.Option("--slo", help="TTFT,TPOT in milliseconds, for goodput.")] = "5000,100",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which answer each request gives.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result here, as JSON.")] = None,
) -> None:
    """Replay arrivals against a cost table and recorded acceptance, under several policies.

    specdec simulate-load -a azure_conv.csv.gz --costs table.json --acceptance agents.npz --loads 1,4 --replicas 8
    """
    from specdec.bench.arrivals import read_arrivals
    from specdec.bench.load_policies import LoadLimits, Policy, PruneModel
    from specdec.bench.load_sim import compare_policies, prepare_arrivals
    from specdec.bench.load_steps import draft_table
    from specdec.bench.measure import write_json
    from specdec.commands.bench_show import numbers, slo_of
    from specdec.cost_model import CostModel

    table, goals = CostModel.load(costs), slo_of(slo) or (5000.0, 100.0)
    if draft_ms is not None:
        table.tables["draft"] = draft_table(*_floats("draft-ms", draft_ms, 2))
    pruning = PruneModel(*_floats("prune", prune, 3))
    record = _record(acceptance, traces or [], tokenizer, drafter, calls)
    result: dict[str, Any] = {"slo_ms": goals, "replicas": replicas, "runs": []}
    for path in arrivals:
        for load in numbers("loads", loads, float):
            given = prepare_arrivals(read_arrivals(path), load=load, max_requests=requests, max_tokens=max_tokens)
            with printing.status(f"{path.name} at {load:g} times its speed"):
                found = compare_policies(
                    given, table, record, [Policy(name) for name in policies.split(",")], slo_ms=goals, seed=seed,
                    limits=LoadLimits(max_batch_size, max_prefill_tokens), replicas=replicas,
                    pruning=pruning,
                )  # fmt: skip
            result["runs"].append({"arrivals": path.name, "load": load, "policies": found})
            printing.text(_table(path.name, load, found))
            if out is not None:
                write_json(out, result)  # after every run: whole traces take their time


def _floats(name: str, text: str, count: int) -> list[float]:
    """So many comma-separated numbers."""
    from specdec.commands.bench_show import numbers

    found = [float(number) for number in numbers(name, text, float)]
    if len(found) != count:
        raise ConfigError(f"--{name} needs {count} numbers, got {text!r}")
    return found


def _record(acceptance: Path | None, traces: list[Path], tokenizer: str | None, drafter: str, calls: int) -> Any:
    """The recorded acceptance: read, or made from traces and kept where a file was named."""
    from specdec.bench.load_record import record_acceptance
    from specdec.bench.recorded_acceptance import RecordedAcceptance
    from specdec.bench.workload import Limits, Workload

    if not traces:
        if acceptance is None:
            raise ConfigError("give recorded acceptance (--acceptance) or answers to record (--traces, --tokenizer)")
        return RecordedAcceptance.load(acceptance)
    if tokenizer is None:
        raise ConfigError("traces need their tokenizer: --tokenizer")
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    limits = Limits(calls=calls, prompt_tokens=1024, response_tokens=256)
    work = Workload.from_paths(traces, lambda text: words.encode(text, add_special_tokens=False), limits)
    record = record_acceptance(work.items, drafter)
    if acceptance is not None:
        record.save(acceptance)
    return record


def _table(name: str, load: float, found: dict[str, dict[str, float]]) -> str:
    rows = [f"{name} at {load:g} times its speed"]
    fixed = [figures["work_s"] for policy, figures in found.items() if "+" not in policy and policy != "adaptive"]
    for policy, figures in found.items():
        rows.append(
            f"  {policy:24} {figures['tokens_per_s']:9.1f} tokens/s  goodput {figures['goodput_tokens_per_s']:9.1f}  "
            f"TPOT p50 {figures['tpot_p50_ms']:7.1f} p99 {figures['tpot_p99_ms']:7.1f} ms  "
            f"TTFT p99 {figures['ttft_p99_ms']:9.0f} ms  busy {figures['busy_share']:.2f}  "
            f"tokens/step {figures['tokens_per_step']:.2f}"
            + (f"  work of the best fixed one / its own {min(fixed) / figures['work_s']:.3f}" if fixed else "")
        )
    return "\n".join(rows) + "\n"
