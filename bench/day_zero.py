"""Day 0: a head of random weights learns from live traffic while it serves; acceptance length over time.

    python -m specdec.bench.day_zero --json bench/results/day_zero.json --minutes 30

This process serves the bundled model: requests come one after the other from held-out tasks, several at a time, and are
captured to a spool. `specdec traind` runs beside it and publishes versions to a registry, where the guardian of the
serving process tries them on a share of the requests and promotes them. Nothing else is known to the head: its weights
are random but for the target's own `lm_head`. Every figure is of served requests, none of them simulated.

Traffic A is `--project N`: an agent at work on one small project, edit after edit, each of a kind and a place drawn at
random, on N held-out functions that fit a prompt. With `--project 0` no function comes twice on purpose, and
`--pool N` serves the same N prompts again and again, as automated clients do. Requests arrive at `--per-minute`, at
most; what the two processes had of the CPU is written beside the curve.

`--shift-after N` changes to traffic B after N requests, and back to A after as many again. B is completion at a cursor
(or, with `--project 0`, continuation of held-out files): as many places in held-out files as A has functions, one drawn
at random for each request, the cursor up to 31 tokens further on as text is typed. `--static` serves the first version
to the end, and nothing learns.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from specdec.bench.edit_tasks import heldout_files, heldout_snippets, heldout_tasks, make_task
from specdec.bench.measure import write_json
from specdec.bench.tiny_eval import edit_prompt, load_model
from specdec.build import build_engine, load_drafter
from specdec.online_training.capture import CaptureOptions, TraceCapture
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.guard import GuardOptions
from specdec.online_training.guardian import Guardian
from specdec.online_training.privacy import Consent, KeyedHash
from specdec.online_training.registry import Registry
from specdec.online_training.spool import Spool
from specdec.online_training.swap import VersionedDrafter
from specdec.types import Request, RequestState, SamplingParams

__all__ = ["Traffic", "main", "run"]

_TINY = Path(__file__).parent / "tiny"
_MAX_PROMPT = 320  # tokens
_TRAIND = (
    "--depth", "3", "--lr", "1e-3", "--muon-lr", "0.03", "--clip", "1.0", "--ema", "0.9", "--prompt-weight", "1.0",
    "--tokens-per-step", "1000", "--publish-steps", "15", "--heldout", "10", "--threads", "1", "--always",
    "--rehearse",
)  # fmt: skip
GUARD = GuardOptions(canary_share=0.5, min_requests=8, max_requests=40, shadow_share=0.1, min_seconds=0.0)


class Traffic:
    """An endless stream of different prompts, the same for the same seed.

    Args:
        tokenizer: the bundled model's.
        seed: which.
    """

    def __init__(self, tokenizer: Any, *, seed: int = 0) -> None:
        self._tokenizer, self._seed = tokenizer, seed

    def edits(self) -> Iterator[list[int]]:
        """Edit tasks on held-out code, as chat messages."""
        for part in itertools.count():
            for task in heldout_tasks(100, seed=1000 * self._seed + part + 1, min_lines=8, max_lines=25):
                yield edit_prompt(self._tokenizer, task.user)

    def project(self, num_functions: int) -> Iterator[list[int]]:
        """Edit after edit, each of a kind and a place drawn at random, on the functions of one small project.

        The functions are held-out ones; the same prompt comes twice only where the same edit is drawn again.
        """
        rng = random.Random(f"project-{self._seed}")
        found = heldout_snippets(min_lines=8, max_lines=25)
        functions = rng.sample(found, min(num_functions, len(found)))
        while True:
            task = make_task(rng, *rng.choice(functions))
            if task is not None:
                yield edit_prompt(self._tokenizer, task.user)

    def completions(self, num_places: int) -> Iterator[list[int]]:
        """The text before a cursor: one of some places in held-out files, up to 31 tokens further on."""
        rng = np.random.default_rng((self._seed, 8))
        texts = [self._tokenizer(file.text)["input_ids"] for file in heldout_files()[:200]]
        texts = [text for text in texts if len(text) > 300]
        places = [
            (int(i), int(rng.integers(192, len(texts[i]) - 32))) for i in rng.integers(len(texts), size=num_places)
        ]
        while True:
            file, place = places[int(rng.integers(num_places))]
            end = place + int(rng.integers(32))
            yield texts[file][end - 192 : end]

    def continuations(self) -> Iterator[list[int]]:
        """Stretches of held-out files, to be continued."""
        rng = np.random.default_rng((self._seed, 7))
        texts = [self._tokenizer(file.text)["input_ids"] for file in heldout_files()[:200]]
        texts = [text for text in texts if len(text) > 300]
        while True:
            text = texts[int(rng.integers(len(texts)))]
            start = int(rng.integers(len(text) - 250))
            yield text[start : start + 192]


@dataclass(slots=True)
class _Point:
    """One finished request."""

    seconds: float
    tokens: int
    steps: int
    version: int
    traffic: str
    is_repeated: bool
    server_cpu: float
    trainer_cpu: float


def _stream(traffic: Traffic, shift_after: int, pool: int, project: int) -> Iterator[tuple[str, list[int]]]:
    sources = {"A": traffic.edits(), "B": traffic.continuations()}
    if project:
        sources = {"A": traffic.project(project), "B": traffic.completions(project)}
    fitting = {name: (ids for ids in source if len(ids) <= _MAX_PROMPT) for name, source in sources.items()}
    pools = {name: [next(source) for _ in range(pool)] for name, source in fitting.items()} if pool else {}
    for count in itertools.count():
        name = "B" if shift_after and shift_after <= count < 2 * shift_after else "A"
        yield name, pools[name][count % pool] if pool else next(fitting[name])


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Serve and learn for so many minutes or requests; every finished request, and what was decided."""
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(_TINY)
    target = fingerprint(model)
    command = [sys.executable, "-m", "specdec", "traind", str(_TINY), "--spool", str(folder / "spool")]
    command += ["--registry", str(folder / "registry"), "--device", "cpu", *_TRAIND, *args.traind.split()]
    if args.init is not None:
        command += ["--init", str(args.init)]
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "traind.log").open("w"))
    try:
        registry = Registry(folder / "registry")
        while not registry.state().current:
            if daemon.poll() is not None:
                raise RuntimeError((folder / "traind.log").read_text()[-2000:])
            time.sleep(0.2)
        if args.static:
            daemon.terminate()
        drafter = load_drafter(f"registry:{folder / 'registry'}?top_k=3&depth=5", model, tokenizer)
        assert isinstance(drafter, VersionedDrafter)
        guardian = Guardian(registry, drafter, options=GUARD, is_automatic=not args.static)
        guardian.start(0.5)
        capture = TraceCapture(
            Spool(folder / "spool"), consent=Consent(frozenset({"bench"})), hashes=KeyedHash(bytes(32)), target=target,
            options=CaptureOptions(shard_s=5.0), drafter_of=lambda name: ("registry", drafter.version_of(name)),
        )  # fmt: skip
        points = _serve(args, model, tokenizer, drafter, capture, psutil.Process(daemon.pid))
        guardian.stop()
        capture.close()
    finally:
        daemon.terminate()
        daemon.wait(60)
    events = [dict(event) for event in registry.state().events]
    return {
        "columns": ["seconds", "tokens", "steps", "version", "traffic", "is_repeated", "server_cpu_s", "trainer_cpu_s"],
        "requests": [
            [round(p.seconds, 1), p.tokens, p.steps, p.version, p.traffic, p.is_repeated, round(p.server_cpu, 1),
             round(p.trainer_cpu, 1)] for p in points
        ],
        "events": [{"what": event["what"], "version": event["version"], "why": event["why"]} for event in events],
    }  # fmt: skip


def _serve(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    drafter: VersionedDrafter,
    capture: TraceCapture,
    trainer: psutil.Process,
) -> list[_Point]:
    """Let requests come in until time or requests are used up, and finish them."""
    points: list[_Point] = []
    live: dict[str, tuple[str, int, bool]] = {}
    stream = _stream(Traffic(tokenizer, seed=args.seed), args.shift_after, args.pool, args.project)
    seen: set[tuple[int, ...]] = set()
    started, own, count = time.monotonic(), time.process_time(), 0
    with build_engine(
        model, drafter, budget=args.budget, tokenizer=tokenizer, max_batch_size=args.batch, observers=[capture]
    ) as engine:
        while True:
            now = time.monotonic() - started
            is_open = count < args.requests and now < 60 * args.minutes
            if not is_open and not live:
                return points
            while is_open and len(live) < args.batch and count < min(args.requests, now * args.per_minute / 60 + 1):
                traffic, ids = next(stream)
                sampling = SamplingParams(max_new_tokens=args.new_tokens, temperature=args.temperature, seed=count)
                request = Request(f"r{args.seed}-{count}", np.array(ids, dtype=np.int32), sampling, "bench")
                engine.submit(request)
                live[request.request_id] = traffic, drafter.version_of(request.request_id), tuple(ids) in seen
                seen.add(tuple(ids))
                count += 1
            if not live:
                time.sleep(0.05)
                continue
            for output in engine.step():
                if output.finish_reason is not None:
                    state: RequestState = output.state
                    traffic, version, is_repeated = live.pop(output.request_id)
                    points.append(_Point(
                        time.monotonic() - started, state.num_output_tokens, state.num_steps, version, traffic,
                        is_repeated, time.process_time() - own, _cpu_seconds(trainer),
                    ))  # fmt: skip
            if args.pause_ms:
                time.sleep(args.pause_ms / 1e3)  # a server that is not busy all the time leaves room to learn


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        user, system = process.cpu_times()[:2]
    except psutil.NoSuchProcess:
        return 0.0
    return float(user) + float(system)


def shifts(requests: list[list[Any]], after: int, *, window: int = 12) -> dict[str, Any]:
    """What two changes of traffic did: acceptance length (tokens per step) of the phases A, B and A again.

    ``regained_after``: requests of the last phase until the mean of ``window`` of them reached 95 % of what A had ended
    with (its last third); None: they never did.
    """
    rows = sorted(requests, key=lambda row: row[0])
    of_a, of_b = ([row for row in rows if row[4] == name] for name in "AB")

    def length(some: list[list[Any]]) -> float:
        tokens, steps = float(sum(row[1] for row in some)), float(sum(row[2] for row in some))
        return round(tokens / max(1.0, steps), 3)

    found: dict[str, Any] = {}
    for name, phase in (("A", of_a[:after]), ("B", of_b), ("A again", of_a[after:])):
        third = max(1, len(phase) // 3)
        found[name] = {"first_third": length(phase[:third]), "last_third": length(phase[-third:])}
    end, again = found["A"]["last_third"], of_a[after:]
    means = [length(again[i : i + window]) for i in range(max(0, len(again) - window + 1))]
    found["drop"] = round(end - found["B"]["first_third"], 3)
    found["learned"] = round(found["B"]["last_third"] - found["B"]["first_third"], 3)
    found["forgotten"] = round(end - found["A again"]["first_third"], 3)
    found["regained_after"] = next((i for i, mean in enumerate(means) if mean >= 0.95 * end), None)
    return found


def summarize(requests: list[list[Any]], *, bins: int = 30) -> list[dict[str, Any]]:
    """Acceptance length (tokens per step) over the run, in equal stretches of requests."""
    rows = []
    for part in np.array_split(np.arange(len(requests)), min(bins, max(1, len(requests)))):
        some = [requests[i] for i in part]
        rows.append(
            {
                "minutes": round(some[-1][0] / 60, 2),
                "requests": int(part[-1]) + 1,
                "acceptance_length": round(sum(r[1] for r in some) / sum(r[2] for r in some), 3),
                "version": max(r[3] for r in some),
                "traffic": some[-1][4],
                "repeated_prompts": sum(r[5] for r in some),
                "server_cpu_s": some[-1][6],
                "trainer_cpu_s": some[-1][7],
            }
        )
    return rows


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budget", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--shift-after", type=int, default=0)
    parser.add_argument("--pool", type=int, default=0, help="so many different prompts, again and again; 0: all differ")
    parser.add_argument("--project", type=int, default=32, help="functions of the project; 0: no project")
    parser.add_argument("--per-minute", type=float, default=12.0, help="requests that arrive, evenly")
    parser.add_argument("--traind", default="", help="more options of `specdec traind`, in one word")
    parser.add_argument("--init", type=Path, help="a head to begin from")
    parser.add_argument("--static", action="store_true", help="never swap: the first version serves to the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="spool and registry stay here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        done = run(args, folder)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "keep", "init")}
    settings |= {
        "traind": " ".join((*_TRAIND, args.traind)).strip(),
        "begins_from": "random" if args.init is None else args.init.name,
    }
    curve = summarize(done["requests"])
    write_json(
        args.json,
        {"what": "acceptance length of a head that learns from live traffic, bundled model, float32",
         "settings": settings,
         **({"shift": shifts(done["requests"], args.shift_after)} if args.shift_after else {}),
         "curve": curve, **done},
    )  # fmt: skip
    for row in curve:
        print(row)


if __name__ == "__main__":
    main()
