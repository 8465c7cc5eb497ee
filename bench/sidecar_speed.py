"""What the sidecar adds and what it saves, on loopback: overhead of relaying, and agents' answers by protocol.

    python -m specdec.bench.sidecar_speed --json bench/results/sidecar_overhead.json
    python -m specdec.bench.sidecar_speed traces/*.jsonl.gz --json bench/results/sidecar_speed.json

Overhead, without traces: a server of canned answers in a process of its own, asked directly and through sidecars, in
turns. Speed: ``specdec serve`` reciting recorded answers at a time per step that large models have, asked directly,
through a sidecar that races, through one that opens a grid, through one that has drafts verified by prompt scores, and,
for comparison, with the suffix drafter inside the server. The calls of an episode come in order, so the sidecar knows
what earlier calls brought. The model's prediction is the same rule computed on the same answers, from the median step
and the sidecar's own measure of the time to open a continuation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np
import transformers

from specdec.bench.measure import write_json
from specdec.bench.reciting_server import TINY, recorded
from specdec.bench.traces import TokenCall
from specdec.bench.workload import source_name
from specdec.server.sidecar.drafting import Shop
from specdec.server.sidecar.gates import Budget, BudgetOptions, LoadGate
from specdec.server.sidecar.learner import simulate
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.plan import PlanOptions, Timing
from specdec.suffix_tree.cache import SuffixCache

_BRANCHES = {"race": 1, "grid": 4, "rounds": 1}
_WHOLE = b'{"id":"x","choices":[{"index":0,"text":"fine","finish_reason":"stop"}]}'
_EVENT = b'data: {"id":"x","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'


def _start(*command: str) -> tuple[subprocess.Popen[str], str]:
    """A server of ours and its address."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        for word in line.split():
            if word.startswith("http://"):
                return process, word.removesuffix("/v1")
    raise SystemExit(f"{' '.join(command)} did not start")


def _sidecar(url: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    words = ["specdec", "sidecar", "--upstream", url, "--port", "0", *options]
    process, own = _start(*words)
    return process, own


async def _ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url + "/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


# --- overhead -------------------------------------------------------------------------------------------------------


async def _canned() -> None:
    """A server that answers at once: whole, or in events of 2 ms each."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if b"content-length" in x), 0)
                body = await reader.readexactly(length)
                if b'"stream": true' in body:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                 b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
                    for _ in range(20):
                        writer.write(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))
                        await asyncio.sleep(0.002)
                    writer.write(b"0\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                                 % len(_WHOLE) + _WHOLE)  # fmt: skip
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(f"serving http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


async def _latencies(urls: Mapping[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds at the median: whole answers, first events, and time per event; arms alternate."""
    kept: dict[str, dict[str, list[float]]] = {name: {"whole": [], "first": [], "event": []} for name in urls}
    shared = {"model": "m", "prompt": "word " * 200, "max_tokens": 20, "temperature": 0}
    async with aiohttp.ClientSession() as session:
        for index in range(rounds + 20):
            for name, url in urls.items():
                await asyncio.sleep(0.02)  # what the arm before left to do is done by now
                start = perf_counter()
                async with session.post(url + "/v1/completions", json=shared) as answer:
                    await answer.read()
                whole = perf_counter() - start
                start = perf_counter()
                async with session.post(url + "/v1/completions", json={**shared, "stream": True}) as answer:
                    await answer.content.readany()
                    first = perf_counter() - start
                    await answer.read()
                    last = perf_counter() - start
                if index >= 20:
                    for key, value in (("whole", whole), ("first", first), ("event", (last - first) / 19)):
                        kept[name][key].append(1e3 * value)
    return {
        name: {f"{key}_ms_p50": statistics.median(values) for key, values in lists.items()}
        | {f"{key}_ms_p99": float(np.quantile(values, 0.99)) for key, values in lists.items()}
        for name, lists in kept.items()
    }


def _overhead(rounds: int) -> dict[str, Any]:
    canned, url = _start("specdec.bench.sidecar_speed", "--serve-canned")
    off, off_url = _sidecar(url, "--mode", "off")
    observe, observe_url = _sidecar(url, "--mode", "observe", "--single-tenant", "--tokenizer", str(TINY))
    try:
        urls = {"direct": url, "off": off_url, "observe": observe_url}
        for one in (off_url, observe_url):
            asyncio.run(_ready(one))
        found = asyncio.run(_latencies(urls, rounds))
    finally:
        for process in (off, observe, canned):
            process.terminate()
            process.wait()
    added = {
        name: {key: found[name][key] - found["direct"][key] for key in found[name] if key.endswith("p50")}
        for name in ("off", "observe")
    }
    return {"latencies": found, "added": added, "rounds": rounds}


# --- speed ----------------------------------------------------------------------------------------------------------


async def _answer(session: aiohttp.ClientSession, url: str, call: TokenCall, source: str) -> tuple[float, float, str]:
    """Seconds of one streamed answer, seconds to its first event, and its text."""
    body = {"model": "recited", "prompt": call.prompt_ids.tolist(), "max_tokens": len(call.response_ids),
            "temperature": 0, "stream": True}  # fmt: skip
    text, first, start = "", 0.0, perf_counter()
    async with session.post(
        url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {source}"}
    ) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first = first or perf_counter() - start
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["text"]
    return perf_counter() - start, first, text


async def _replay(url: str, calls: Mapping[str, Sequence[TokenCall]]) -> dict[str, list[tuple[float, float, str]]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        return {source: [await _answer(session, url, call, source) for call in some] for source, some in calls.items()}


async def _health(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url + "/health") as answer:
        return dict((await answer.json())["speed"])


def _predicted(
    calls: Sequence[TokenCall], plan: PlanOptions, timing: Timing, overhead_s: float, *, is_rounds: bool
) -> float:
    """Speed-up by the segment rule, or by rounds, on the same answers, in order."""
    shop = Shop(SuffixCache(), plan, timing, LoadGate(timing), Budget(BudgetOptions()), SidecarMetrics())
    plain = saved = 0.0
    for number, call in enumerate(calls):
        own, _ = simulate(shop, "x", call.prompt_ids.tolist(), call.response_ids.tolist(), tenant="", plan=plan,
                          timing=timing, is_rounds=is_rounds)  # fmt: skip
        plain += len(call.response_ids) * (timing.step_s or 0.0) + overhead_s
        saved += own
        shop.cache.insert(number, call.response_ids)
    return plain / (plain - saved)


def _speed(args: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    calls = {
        source_name(path): recorded(path, tokenizer, calls=args.calls, new_tokens=args.new_tokens)
        for path in args.traces
    }
    command = ["specdec.bench.reciting_server", *map(str, args.traces), "--tokenizer", args.tokenizer, "--calls",
               str(args.calls), "--step-ms", str(step_ms)]  # fmt: skip
    server, url = _start(*command, "--drafter", "none")
    inside, inside_url = _start(*command, "--drafter", "suffix")
    sidecars = {}
    try:
        for one in (url, inside_url):
            asyncio.run(_ready(one))
        common = ("--min-gain-ms", "0", "--extra-tokens", str(args.extra_tokens))
        sidecars = {
            "race": _sidecar(url, "--mode", "race", *common),
            "grid": _sidecar(url, "--mode", "grid", "--branches", str(_BRANCHES["grid"]), *common),
            "rounds": _sidecar(url, "--mode", "rounds", "--tokenizer", args.tokenizer, *common),
        }
        urls = {"plain": url, **{name: own for name, (_, own) in sidecars.items()}, "inside": inside_url}
        for _, own in sidecars.values():
            asyncio.run(_ready(own))
        done = {name: asyncio.run(_replay(own, calls)) for name, own in urls.items()}
        health = {name: asyncio.run(_health(own)) for name, (_, own) in sidecars.items()}
    finally:
        for process in (server, inside, *(process for process, _ in sidecars.values())):
            process.terminate()
            process.wait()
    return {"step_ms": step_ms, "sources": {s: _figures(s, calls[s], done, health) for s in calls}, "sidecars": health}


def _figures(source: str, calls: Sequence[TokenCall], done: Mapping[str, Any], health: Mapping[str, Any]) -> Any:
    plain = done["plain"][source]
    steps = [(t - f) / max(1, len(c.response_ids) - 1) for (t, f, _), c in zip(plain, calls, strict=True)]
    figures: dict[str, Any] = {
        "calls": len(calls), "tokens": sum(len(call.response_ids) for call in calls),
        "plain_s": sum(one[0] for one in plain),
    }  # fmt: skip
    for name, answers in done.items():
        if name == "plain":
            continue
        mine = answers[source]
        figures[name] = {
            "seconds": sum(one[0] for one in mine),
            "speedup": figures["plain_s"] / sum(one[0] for one in mine),
            "same_text": all(a[2] == b[2] for a, b in zip(plain, mine, strict=True)),
        }
        if name in _BRANCHES:
            timing = Timing(statistics.median(steps), health[name]["open_ms"] / 1e3)
            plan = replace(PlanOptions(min_gain_s=0.0), max_branches=_BRANCHES[name])
            first = statistics.median(one[1] for one in plain) - statistics.median(steps)
            figures[name]["predicted"] = _predicted(calls, plan, timing, max(0.0, first), is_rounds=name == "rounds")
    return figures


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", type=Path, nargs="*", help="trace files; none: overhead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokenizer", default=str(TINY))
    parser.add_argument("--calls", type=int, default=4, help="of each source")
    parser.add_argument("--new-tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0])
    parser.add_argument("--extra-tokens", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=300, help="of the overhead's measurement")
    parser.add_argument("--serve-canned", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_canned:
        asyncio.run(_canned())
        return
    transformers.utils.logging.set_verbosity_error()
    result: dict[str, Any] = {"tokenizer": Path(args.tokenizer).name, "extra_tokens": args.extra_tokens}
    if args.traces:
        result |= {"new_tokens": args.new_tokens, "speed": [_speed(args, step_ms) for step_ms in args.step_ms]}
    else:
        result = {"overhead": _overhead(args.rounds)}
    if args.json is None:
        print(json.dumps(result, indent=1))
    else:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
