"""``specdec bench serve``: load on servers that speak the OpenAI protocol, ours or anybody's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import printing
from specdec.commands.bench_show import finish, numbers, slo_of
from specdec.commands.options import MaxNewTokensOption, SeedOption, TemperatureOption
from specdec.errors import ConfigError

__all__ = ["serve"]


def serve(
    out: Annotated[Path, typer.Option("--out", "-o", help="The result file.")],
    url: Annotated[list[str], typer.Option("--url", help="URL or NAME=URL of a server; may be repeated.")],
    model: Annotated[str, typer.Option("--model", "-m", help="As the servers know it.")] = "default",
    api: Annotated[str, typer.Option("--api", help="completions or chat.")] = "completions",
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="Environment variable that holds the key; never written down.")
    ] = None,
    traces: Annotated[
        list[Path] | None, typer.Option("--traces", help="What is asked; may be repeated. None: built-in edits.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests per second, such as 0.5,1,2: Poisson arrivals.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", help="Clients, such as 1,4,16, each with one request at a time.")
    ] = None,
    arrivals: Annotated[
        Path | None, typer.Option("--arrivals", help="When requests came: Azure, Mooncake, BurstGPT or our columns.")
    ] = None,
    time_scale: Annotated[float, typer.Option("--time-scale", help="Of the arrivals; 0.1: ten times as fast.")] = 1.0,
    requests: Annotated[int, typer.Option("--requests", min=0, help="How many; 0: as many as arrivals, or 32.")] = 0,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often every load is run.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", help="Of one request, in seconds.")] = 600.0,
    slo: Annotated[str | None, typer.Option("--slo", help="TTFT,TPOT in milliseconds, for goodput.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the result file has.")] = False,
) -> None:
    """Measure servers under load: latency percentiles, throughput, goodput, failures."""
    from specdec.bench.http_client import Endpoint
    from specdec.bench.serve_run import ServeOptions, make_loads, make_questions, read_some_arrivals, run_serve

    options = ServeOptions(
        rates=numbers("rate", rate, float), concurrency=numbers("concurrency", concurrency, int),
        time_scale=time_scale, requests=requests, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        rounds=rounds, timeout_s=timeout, slo_ms=slo_of(slo),
    )  # fmt: skip
    key = None if key_env is None else os.environ.get(key_env)
    if key_env is not None and not key:
        raise ConfigError(f"the environment variable {key_env!r} must hold the key, but it is empty")
    pairs = [one.split("=", 1) if "=" in one.split("://")[0] else [one.split("://")[-1], one] for one in url]
    endpoints = [Endpoint(name, address, model, api, key) for name, address in pairs]  # type: ignore[arg-type]
    with printing.status("reading the traces"):
        times = read_some_arrivals(arrivals, requests) if arrivals is not None else []
        questions, workload = make_questions(traces or [], options, arrivals=times)
        loads = make_loads(options, len(questions), arrivals=times)
    with printing.progress() as bar:
        task = bar.add_task(f"{len(questions)} requests under {len(loads)} loads", total=None)
        result = run_serve(
            endpoints, questions, workload, loads, options, output=out, resume=resume,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    finish(result, out)
