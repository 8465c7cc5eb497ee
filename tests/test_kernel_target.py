"""The engine with the Triton kernels, interpreted on the CPU: the same logits and tokens as by torch's operations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf

from specdec import strict
from specdec.build import build_engine
from specdec.device_tables import DeviceTables
from specdec.errors import ConfigError, InternalError, UnsupportedError
from specdec.kernel_runner import Captured
from specdec.kv_cache import CallShape, Keep, KVPool
from specdec.probe import probe
from specdec.query_layout import QueryLayout
from specdec.routes import Route, choose_route
from specdec.sampling import Sampler
from specdec.step_buffers import Step, StepBuffers
from specdec.tree_target import TreeTarget
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams, TargetOutput
from tests.oracles import random_tree
from tests.test_tree_target import COMMON, VOCAB_SIZE, make_model
from tests.tiny_kinds import hybrid_model
from tests.tiny_models import tiny_llama


def make(kind: str):
    if kind != "gemma2":
        return make_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.Gemma2Config(head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, **COMMON)
        return tf.Gemma2ForCausalLM(config).eval()


def target_of(model, **options) -> TreeTarget:
    sizes = {"kv_tokens": 200, "max_length": 120, "max_batch_size": 2, "max_step_tokens": 64}
    return TreeTarget(model, probe(model, limit=120), **{**sizes, **options})


def script(target: TreeTarget) -> list[torch.Tensor]:
    """Logits of a fixed course: prompts in pieces, two trees each, a branch and a root kept, one request leaves."""
    rng = np.random.default_rng(0)
    states = [
        RequestState(Request(name, rng.integers(2, VOCAB_SIZE, length).astype(np.int32)))
        for name, length in (("a", 21), ("b", 5))
    ]
    found = []
    for prefixes, kept in (((11, 4), (None, [])), ((9, 0), ([0, 2], [0])), ((0, 0), ([0], [0, 1]))):
        chunks = []
        for state, num_prefix, nodes in zip(states, prefixes, kept, strict=True):
            prefix = state.token_ids[state.num_cached : state.num_cached + num_prefix].copy()
            tree = None
            if nodes is not None:
                first, second, third = rng.integers(2, VOCAB_SIZE, 3).tolist()
                tokens = np.array([state.token_ids[-1], first, second, third], dtype=np.int32)
                tree = DraftTree(tokens, np.array([-1, 0, 0, 2], dtype=np.int32))
            chunks.append(Chunk(state, prefix, tree))
            assert target.reserve(state, chunks[-1].num_tokens)
        output = target.forward(chunks)
        found.append(output.logits.clone())
        target.commit(chunks, [nodes or [] for nodes in kept])
        for chunk, nodes in zip(chunks, kept, strict=True):
            chunk.state.num_cached += len(chunk.prefix_ids) + len(nodes or [])
            if nodes:
                chunk.state.append([*chunk.tree.token_ids[nodes[1:]].tolist(), 7])
    for state in states:
        target.release(state)
    assert target.pool.num_used == 0
    return found


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "gemma3", "llama4")]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", *_SLOW])
def test_the_kernels_give_the_logits_of_torch(kind):
    model = make(kind)
    for have, want in zip(script(target_of(model, kernels="triton")), script(target_of(model)), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "strict"])
def test_a_step_in_a_larger_bucket_is_the_step(is_strict):
    model = make("llama")
    eager = target_of(model, kernels="triton", is_strict=is_strict)
    padded = target_of(model, kernels="triton", is_strict=is_strict, buckets=(4, 10))
    with torch.inference_mode():
        done = []
        padded.runner.capture(lambda launch: Captured(launch, 3), lambda *progress: done.append(progress))
        assert done == [(1, 2), (2, 2)]
        assert padded.runner.graph_bytes == 6
        for have, want in zip(script(padded), script(eager), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    assert (padded.runner.num_replays, padded.runner.num_eager) == (1, 2), "8 tokens fit, 19 and 17 do not"
    assert eager.runner.num_replays == 0


PARAMS = [
    SamplingParams(max_new_tokens=4),
    SamplingParams(max_new_tokens=4, temperature=0.7, seed=2**63 + 5),
    SamplingParams(max_new_tokens=4, temperature=1.0, seed=1, top_p=0.9, repetition_penalty=1.3),
]


def test_the_engine_s_tokens_are_those_of_torch():
    model = tiny_llama()
    route = choose_route(model, max_length=96)
    rng = np.random.default_rng(0)
    prompts = [np.tile(rng.integers(0, 256, 4).astype(np.int32), 2) for _ in PARAMS]
    texts = []
    for kernels in ("torch", "triton"):
        outputs: dict[str, list[int]] = {}
        with build_engine(
            model, "ngram", budget=3, max_length=96, max_batch_size=3, max_prefill_tokens=20, kv_tokens=300,
            route=route, kernels=kernels,
        ) as engine:  # fmt: skip
            for output in engine.generate([Request(str(i), *pair) for i, pair in enumerate(zip(prompts, PARAMS))]):  # noqa: B905
                outputs.setdefault(output.request_id, []).extend(output.new_ids)
        texts.append(outputs)
    assert texts[0] == texts[1]


def test_fused_or_not_a_request_draws_the_same_tokens_in_any_company():
    rng = np.random.default_rng(3)
    kinds = [*PARAMS, SamplingParams(temperature=0.5, top_k=5, seed=9), SamplingParams(suppress_tokens=(3,))]
    states = [
        RequestState(Request(str(i), rng.integers(0, 50, 4).astype(np.int32), kind)) for i, kind in enumerate(kinds)
    ]
    trees = [random_tree(rng, 50, 2) for _ in kinds]
    cu_nodes = np.cumsum([0, *map(len, trees)], dtype=np.int32)
    logits = torch.from_numpy(rng.standard_normal((cu_nodes[-1], 50)).astype(np.float32)) * 3
    found = {}
    for kernels in ("torch", "triton"):
        sampler = Sampler(50, kernels=kernels)
        for state in states:
            sampler.start(state)
        found[kernels] = sampler.target_ids(states, trees, TargetOutput(logits, cu_nodes))
    assert np.array_equal(found["torch"], found["triton"])
    assert [sampler._live[state.request_id].law is None for state in states] == [False, False, False, False, True]
    wide = TargetOutput(logits.double(), cu_nodes)  # not for the kernel
    assert np.array_equal(sampler.target_ids(states, trees, wide), found["torch"])
    for row, (state, tree) in enumerate(zip(states, trees, strict=True)):
        own = slice(cu_nodes[row], cu_nodes[row + 1])
        alone = TargetOutput(logits[own], np.array([0, len(tree)], dtype=np.int32))
        assert np.array_equal(sampler.target_ids([state], [tree], alone), found["triton"][own])


def make_pool() -> KVPool:
    shapes = [(("full", 0), CallShape(1, 2, 2)), (("sliding", 4), CallShape(1, 2, 2))]
    return KVPool(
        shapes, 200, num_live_requests=9, num_step_tokens=12, dtype=torch.float32, device=torch.device("cpu"),
        keep_runs=False,
    )  # fmt: skip


def test_the_device_s_tables_follow_the_host_s_whatever_happens_to_them():
    pool, rng = make_pool(), np.random.default_rng(1)
    tables = DeviceTables(pool, 2, 64, torch.device("cpu"))  # rows for two of three requests
    length = dict.fromkeys("abc", 0)
    for _ in range(90):
        names = rng.permutation(list("abc"))[: rng.integers(1, 3)].tolist()
        for name in names:
            if length[name] > 8 and rng.random() < 0.5:  # its K/V outlives it, and serves the next of that name
                pool.rename(name, "kept")
                length[name] = int(rng.integers(length[name] - 2, length[name]))
                if rng.random() < 0.5:
                    pool.rename("kept", name)
                    pool.cut(name, length[name])
                else:
                    assert pool.copy_prefix("kept", name, length[name], 8)
                    pool.release("kept")
            if length[name] > 30:
                pool.release(name)
                length[name] = 0
            assert pool.reserve(name, 4, 8)
        places, slots = tables.edits(names)
        tables.write(torch.from_numpy(places.astype(np.int32)), torch.from_numpy(slots))
        for name in names:
            for key, group in pool.groups.items():
                table = group.tables[name]
                row = tables.of(key)[tables.row_of(name), table.first : table.first + len(table)]
                assert row.tolist() == table.slots[: len(table)].tolist()
            kept = np.sort(rng.permutation(4)[: rng.integers(0, 3)]).astype(np.int32)
            pool.commit([Keep(name, 0, kept)])
            length[name] += len(kept)
    for name in "abc":
        assert pool.reserve(name, 1, 8)
    with pytest.raises(InternalError, match="3 requests needs more slot tables than the device has"):
        tables.edits(list("abc"))


def test_what_does_not_fit_is_refused():
    pool = make_pool()
    tables = DeviceTables(pool, 2, 16, torch.device("cpu"))
    assert pool.reserve("long", 12, 12)
    layout = QueryLayout("long", 0, 12, 0, np.arange(12), np.tri(12, dtype=np.bool_))
    step = Step([layout], np.arange(12), np.arange(12), np.arange(12))
    edits = tables.edits(["long"])
    needed = step.sizes(len(edits[0]), has_paths=False)
    StepBuffers(needed, pool, tables).put(step, edits)
    small = StepBuffers(replace(needed, num_logits=11), pool, tables)
    with pytest.raises(InternalError, match="buffers that are too small"):
        small.put(step, edits)
    assert pool.reserve("long", 5, 12)
    with pytest.raises(InternalError, match="'long' has 17 tokens, the device's tables 16"):
        tables.edits(["long"])


def test_triton_by_name_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(UnsupportedError, match='kernels="triton" needs the tree path, but this model takes the chain'):
        build_engine(hybrid_model(), "none", max_length=32, route=Route("chain"), kernels="triton")
    with pytest.raises(ConfigError, match='kernels="triton" needs float32, bfloat16 or float16, the model is in .*64'):
        target_of(make("llama").double(), kernels="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="asked for by name, but it cannot run on cpu"):
        build_engine(model, "none", max_length=32, kv_tokens=300, route=choose_route(model, max_length=32),
                     kernels="triton")  # fmt: skip


def test_strict_logits_have_the_bits_of_decoding_one_by_one(fixed_order_products, monkeypatch):
    monkeypatch.setattr(strict, "_CUT", 5)
    prompt, path, other = np.split(np.arange(28, dtype=np.int32) * 37 % VOCAB_SIZE, [12, 18])
    for is_strict in (True, False):
        target = target_of(make("llama"), kernels="triton", is_strict=is_strict)
        alone = strict._one_by_one(target, prompt, path)
        assert torch.equal(strict._in_a_tree(target, prompt, path, other), alone) == is_strict
