"""What rejected draft tokens teach: the same data, steps and seeds with and without the terms that learn from them.

    python -m specdec.bench.rejected_tokens --json bench/results/rejected_tokens.json

A head that starts out copying (``traind --start copying``) drafts for the bundled model: edits of a small project and
continuations of held-out files, in turn. Its rounds are captured with the target's laws at rejected draft tokens. Then
the same head learns from the first requests, once per arm and seed, in the same batches; what it would have accepted on
the last requests, which no arm sees, is judged request by request (greedy chains, simulated). Differences are paired
over seeds and requests; their 95 % interval is a bootstrap over requests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.bench.day_zero import Traffic
from specdec.bench.measure import write_json
from specdec.bench.tiny_eval import load_model
from specdec.build import build_engine
from specdec.online_training.capture import CaptureOptions, TraceCapture
from specdec.online_training.day_zero import OnlinePlan, build_learner
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.module_learner import LearnerOptions
from specdec.online_training.privacy import Consent, KeyedHash
from specdec.online_training.records import TraceRecord
from specdec.online_training.spool import Spool
from specdec.types import Request, SamplingParams

__all__ = ["main"]

_TINY = Path(__file__).parent / "tiny"
_MAX_PROMPT = 320  # tokens
_ARMS: Mapping[str, Mapping[str, Any]] = {
    "off": {"rejected_weight": 0.0},
    "first rejections twice": {"rejected_weight": 1.0},
    "and those behind, 0.1": {"rejected_weight": 1.0, "counterfactual": 0.1},
}
_RESAMPLES = 4000


def _capture(args: argparse.Namespace, model: Any, tokenizer: Any, head: Path, folder: Path) -> list[TraceRecord]:
    """Serve requests with the head; their records in the order of asking."""
    traffic = Traffic(tokenizer, seed=args.seed)
    sources = traffic.project(args.project), traffic.continuations()
    fitting = [(ids for ids in source if len(ids) <= _MAX_PROMPT) for source in sources]
    law = SamplingParams(max_new_tokens=args.new_tokens)
    asked = [
        Request(f"r{i}", np.array(next(fitting[i % 2]), dtype=np.int32), law, "bench") for i in range(args.requests)
    ]
    spool, target, hashes = Spool(folder), fingerprint(model), KeyedHash(bytes(32))
    capture = TraceCapture(
        spool, consent=Consent(frozenset({"bench"})), hashes=hashes, target=target,
        options=CaptureOptions(mode="features+rejected", shard_s=1e6),
    )  # fmt: skip
    with build_engine(
        model, f"eagle:{head}?probe=0&top_k=2&depth=4", budget=8, max_batch_size=4, observers=[capture]
    ) as engine:
        list(engine.generate(asked))
    capture.close()
    found: dict[str, TraceRecord] = {}
    while (lease := spool.lease("bench")) is not None:
        found |= {record.prompt_hash: record for record in lease.records}
        spool.ack("bench", lease.shard_id)
    order = [hashes.ids(request.prompt_ids) for request in asked]
    return [found[name] for name in dict.fromkeys(order) if name in found]


def _batches(args: argparse.Namespace, taught: Sequence[TraceRecord], seed: int) -> list[list[TraceRecord]]:
    rng = np.random.default_rng((args.seed, seed))
    batches: list[list[TraceRecord]] = []
    for _ in range(args.steps):
        batch: list[TraceRecord] = []
        while sum(len(record.token_ids) for record in batch) < args.tokens_per_step:
            batch.append(taught[int(rng.integers(len(taught)))])
        batches.append(batch)
    return batches


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Capture, learn once per arm and seed, judge; acceptance lengths [seeds, requests] by arm."""
    model, tokenizer = load_model(_TINY)
    options = LearnerOptions(learning_rate=1e-3, muon_lr=args.muon_lr, clip=1.0, ema=0.8)
    plan = OnlinePlan(start="copying", depth=args.depth, learner=options)
    first = build_learner(plan, model, tokenizer)
    first.export(folder / "head")
    records = _capture(args, model, tokenizer, folder / "head", folder / "spool")
    taught, held = records[: -args.heldout], records[-args.heldout :]
    lengths: dict[str, list[list[float]]] = {"before": [[first.judge([record]) for record in held]]}
    for arm, terms in _ARMS.items():
        lengths[arm] = []
        for seed in range(args.seeds):
            learner = build_learner(replace(plan, learner=replace(options, **terms)), model, tokenizer)
            for batch in _batches(args, taught, seed):
                learner.learn(batch)
            lengths[arm].append([learner.judge([record]) for record in held])
            print(f"{arm}, seed {seed}: {np.mean(lengths[arm][-1]):.3f} tokens per round", flush=True)
    rounds = [record.rounds for record in taught]
    return {
        "requests_taught": len(taught), "requests_judged": len(held), "rounds": sum(len(one) for one in rounds),
        "first_rejections": int(sum(len(one.first_rejected) for one in rounds)),
        "lengths": {arm: np.round(rows, 4).tolist() for arm, rows in lengths.items()},
    }  # fmt: skip


def compare(rows: Sequence[Sequence[float]], without: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean difference of two tables [seeds, requests], its interval over requests, and that of every seed."""
    difference = np.array(rows) - np.array(without)
    by_request = difference.mean(axis=0)
    rng = np.random.default_rng(0)
    means = rng.choice(by_request, (_RESAMPLES, len(by_request))).mean(axis=1)
    return {
        "mean": round(float(difference.mean()), 4),
        "interval_95": [round(float(bound), 4) for bound in np.quantile(means, (0.025, 0.975))],
        "by_seed": np.round(difference.mean(axis=1), 4).tolist(),
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--project", type=int, default=32, help="functions of the project")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens-per-step", type=int, default=500)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the traffic")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    table = found["lengths"]
    summary = {
        "acceptance_length": {arm: round(float(np.mean(rows)), 4) for arm, rows in table.items()},
        "against_off": {arm: compare(table[arm], table["off"]) for arm in list(_ARMS)[1:]},
    }
    what = "acceptance length after learning with and without rejected draft tokens, bundled model, simulated"
    write_json(args.json, {"what": what, "settings": vars(args) | {"json": None}, **summary, **found})
    print(summary)


if __name__ == "__main__":
    main()
