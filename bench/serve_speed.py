"""What serving costs and what speculation brings behind the API: the bundled model, 1, 4 and 16 streams at a time.

    python -m specdec.bench.serve_speed --json bench/results/serve_speed.json

``specdec serve`` runs in a process of its own; this one streams from it. Arms alternate round by round: speculation
switched off per request, and each drafter. Two kinds of traffic, both of held-out standard library code: edits (an
agent's) and continuations (what a chat is to this model); stores start cold in every round. The overhead of HTTP is the
time of one plain stream against the same request through an engine in this process, over the tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import numpy as np
import torch
import transformers

from specdec.bench.edit_tasks import heldout_files, heldout_tasks
from specdec.bench.measure import write_json
from specdec.build import build_engine
from specdec.types import Request, SamplingParams

_TINY = Path(__file__).parent / "tiny"
_ARMS: Mapping[str, dict[str, Any]] = {
    "plain": {"enabled": False},
    "ngram": {"drafter": "ngram"},
    "suffix": {"drafter": "suffix"},
}


@dataclass(frozen=True, slots=True)
class _Stream:
    """One streamed answer: seconds until the first token and until the end, and its token ids."""

    first_s: float
    total_s: float
    token_ids: tuple[int, ...]


async def _stream(client: httpx.AsyncClient, body: Mapping[str, Any]) -> _Stream:
    start, first, ids = perf_counter(), None, list[int]()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if choice["token_ids"]:
                    first = first or perf_counter() - start
                    ids += choice["token_ids"]
    total = perf_counter() - start
    return _Stream(first or total, total, tuple(ids))


async def _round(url: str, bodies: Sequence[Mapping[str, Any]], num_streams: int) -> tuple[float, list[_Stream]]:
    """Wall seconds, and every stream, with at most ``num_streams`` open at a time."""
    gate = asyncio.Semaphore(num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def one(body: Mapping[str, Any]) -> _Stream:
            async with gate:
                return await _stream(client, body)

        start = perf_counter()
        streams = await asyncio.gather(*map(one, bodies))
        return perf_counter() - start, streams


def _prompts(tokenizer: Any, count: int) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of both kinds of traffic."""
    edits = []
    for task in heldout_tasks(count):
        message = [{"role": "user", "content": task.user}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        edits.append(list(ids)[:1500])
    dice, files = random.Random(0), heldout_files()
    texts = []
    for _ in range(count):
        text = dice.choice(files).text
        start = dice.randrange(max(1, len(text) - 1200))
        texts.append(tokenizer(text[start : start + 1200], add_special_tokens=False)["input_ids"])
    return {"edits": edits, "continuations": texts}


def _bodies(
    prompts: Sequence[Sequence[int]], num_new: int, speculative: Mapping[str, Any], *, user: str
) -> list[dict[str, Any]]:
    shared = {"max_tokens": num_new, "temperature": 0, "stream": True, "return_token_ids": True, "ignore_eos": True}
    return [shared | {"prompt": list(prompt), "speculative": speculative, "user": user} for prompt in prompts]


def _measure(url: str, prompts: Sequence[Sequence[int]], num_streams: int, args: Any) -> dict[str, Any]:
    rounds: dict[str, list[tuple[float, list[_Stream]]]] = {name: [] for name in _ARMS}
    for index in range(args.repeats + 1):
        for name, speculative in _ARMS.items():
            # A user of its own for every round: what the suffix store learned from the same prompts is not reused.
            bodies = _bodies(prompts, args.new_tokens, speculative, user=f"{num_streams}-{index}-{len(prompts[0])}")
            outcome = asyncio.run(_round(url, bodies, num_streams))
            if index:
                rounds[name].append(outcome)
    texts = {name: [stream.token_ids for stream in done[0][1]] for name, done in rounds.items()}
    figures: dict[str, Any] = {"same_tokens": all(ids == texts["plain"] for ids in texts.values())}
    for name, done in rounds.items():
        rates = [sum(len(stream.token_ids) for stream in streams) / wall for wall, streams in done]
        every = [stream for _, streams in done for stream in streams]
        gaps = [(one.total_s - one.first_s) / max(1, len(one.token_ids) - 1) for one in every]
        figures[name] = {
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_range": [min(rates), max(rates)],
            "ttft_ms_p50": 1e3 * statistics.median(one.first_s for one in every),
            "tpot_ms_p50": 1e3 * statistics.median(gaps),
            "tpot_ms_p99": 1e3 * float(np.quantile(gaps, 0.99)),
        }
    plain = [wall for wall, _ in rounds["plain"]]
    for name in _ARMS:
        ratios = [wall / own for wall, (own, _) in zip(plain, rounds[name], strict=True)]
        figures[name]["speedup"] = statistics.median(ratios)
        figures[name]["speedup_range"] = [min(ratios), max(ratios)]
    return figures


def _overhead(url: str, model: Any, prompts: Sequence[Sequence[int]], args: Any) -> dict[str, float]:
    """Microseconds that HTTP adds to one plain stream: per request (nearly no tokens) and per token."""
    off = {"enabled": False}
    law = SamplingParams(max_new_tokens=args.new_tokens)
    per_token, per_request = [], []
    with build_engine(model, "none", max_batch_size=16) as engine:

        def alone(prompt: Sequence[int], sampling: SamplingParams) -> float:
            start = perf_counter()
            for _ in engine.generate([Request("r", np.asarray(prompt), sampling)]):
                pass
            return perf_counter() - start

        def served(prompt: Sequence[int], num_new: int) -> float:
            _, streams = asyncio.run(_round(url, _bodies([prompt], num_new, off, user="overhead"), 1))
            return streams[0].total_s

        for index, prompt in enumerate([*prompts[:1], *prompts]):
            http_one, own_one = served(prompt, 1), alone(prompt, SamplingParams(max_new_tokens=1))
            http_many, own_many = served(prompt, args.new_tokens), alone(prompt, law)
            if index:
                per_request.append(1e6 * (http_one - own_one))
                per_token.append(1e6 * ((http_many - http_one) - (own_many - own_one)) / (args.new_tokens - 1))
    return {"per_request_us": statistics.median(per_request), "per_token_us": statistics.median(per_token)}


def _start_server() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "specdec", "serve", str(_TINY), "--port", "0", "--dtype", "float32"]
    command += ["--drafter", "ngram", "--drafter", "suffix"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving "):
            url = line.split(" on ")[1].split("/v1")[0]
            break
    else:
        raise SystemExit("the server did not start")
    while True:
        try:
            httpx.get(url + "/ready").raise_for_status()
            return process, url
        except httpx.TransportError:
            continue


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=16, help="of each kind of traffic")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(_TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(_TINY, dtype=torch.float32).eval()
    process, url = _start_server()
    try:
        prompts = _prompts(tokenizer, args.requests)
        traffic = {
            name: {str(count): _measure(url, some, count, args) for count in args.streams}
            for name, some in prompts.items()
        }
        overhead = _overhead(url, model, prompts["continuations"], args)
    finally:
        process.terminate()
        process.wait()
    what = "the bundled model behind specdec serve, float32, greedy, streamed; speedup = plain wall time over own"
    write_json(
        args.json,
        {"what": what, "new_tokens": args.new_tokens, "requests": args.requests, "traffic": traffic}
        | {"http": overhead},
    )


if __name__ == "__main__":
    main()
