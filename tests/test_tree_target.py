"""Over tiny models of transformers: a tree's rows are those of its paths alone, and the cache is that of a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from specdec.errors import ConfigError, InternalError
from specdec.probe import probe
from specdec.tree_target import TreeTarget, group_key, kv_bytes_by_device
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams
from tests.oracles import random_tree

VOCAB_SIZE = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WINDOW = 8
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "gemma3": lambda: tf.Gemma3TextConfig(head_dim=16, sliding_window=WINDOW, sliding_window_pattern=2, **COMMON),
    "gpt_oss": lambda: tf.GptOssConfig(
        head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2, **COMMON
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        head_dim=16, attention_chunk_size=WINDOW, intermediate_size_mlp=64, num_local_experts=4,
        **{**COMMON, "num_hidden_layers": 4},
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None
    ),
}  # fmt: skip
FORGETS = ("gemma3", "gpt_oss", "llama4")


def make_model(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
        for parameter in model.parameters():  # flat initial weights would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def make_target(model: PreTrainedModel, *, kv_tokens: int = 400) -> TreeTarget:
    return TreeTarget(
        model, probe(model, limit=128), kv_tokens=kv_tokens, max_length=128, max_batch_size=4, max_step_tokens=64
    )


def make_state(rng: np.random.Generator, request_id: str, length: int) -> RequestState:
    prompt = rng.integers(2, VOCAB_SIZE, length).astype(np.int32)
    return RequestState(Request(request_id, prompt, SamplingParams(max_new_tokens=60)))


def logits_of(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """[V]: what follows a text, by a plain forward without any cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0, -1]


def run(
    target: TreeTarget, parts: Sequence[tuple[RequestState, int, DraftTree | None]]
) -> tuple[list[Chunk], list[torch.Tensor]]:
    """Reserve and forward (state, prefix tokens, tree) triples; chunks, and the logits of each tree."""
    chunks = []
    for state, num_prefix, tree in parts:
        chunk = Chunk(state, state.token_ids[state.num_cached : state.num_cached + num_prefix], tree)
        assert target.reserve(state, chunk.num_tokens)
        chunks.append(chunk)
    output = target.forward(chunks)
    rows = [output.logits[a:b] for a, b in zip(output.cu_nodes, output.cu_nodes[1:], strict=False)]
    return chunks, rows


def commit(target: TreeTarget, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
    """As the engine does it: kept draft tokens join the text, and one bonus token after them."""
    target.commit(chunks, keep)
    for chunk, nodes in zip(chunks, keep, strict=True):
        chunk.state.num_cached += len(chunk.prefix_ids) + len(nodes)
        if chunk.tree is not None:
            chunk.state.append([*chunk.tree.token_ids[list(nodes[1:])].tolist(), 5])


def cached_rows(target: TreeTarget, state: RequestState) -> dict[int, tuple[int, torch.Tensor, torch.Tensor]]:
    """Attention call -> (position of the first cached row, keys, values), in order of position."""
    rows = {}
    for key, group in target.pool.groups.items():
        table = group.tables[state.request_id]
        assert table.first + table.num_cached == state.num_cached, key
        slots = table.slots[: table.num_cached].astype(np.int64)
        for ordinal in group.keys:
            rows[ordinal] = (table.first, group.keys[ordinal][slots], group.values[ordinal][slots])
    return rows


def assert_cache_is_that_of_a_prefill(model: PreTrainedModel, target: TreeTarget, state: RequestState) -> None:
    fresh = make_target(model)
    copy = RequestState(Request("copy", state.token_ids.copy()))
    chunks, _ = run(fresh, [(copy, state.num_cached, None)])
    commit(fresh, chunks, [[]])
    for ordinal, (first, keys, values) in cached_rows(fresh, copy).items():
        own_first, own_keys, own_values = cached_rows(target, state)[ordinal]
        assert own_first == first
        # The same numbers from matrix products of other shapes: a few roundings of values near 1.
        torch.testing.assert_close(own_keys, keys, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(own_values, values, rtol=1e-4, atol=2e-5)


def test_rows_of_a_ragged_batch_of_trees_are_those_of_each_path_alone(model: PreTrainedModel) -> None:
    """Several steps of prefill, decode and both at once, committing random paths in between."""
    rng = np.random.default_rng(3)
    target = make_target(model)
    states = [make_state(rng, str(i), length) for i, length in enumerate((21, 3, 1))]
    late = make_state(rng, "late", 30)
    for step in range(4):
        parts: list[tuple[RequestState, int, DraftTree | None]] = []
        for state in states:
            tree = random_tree(rng, VOCAB_SIZE, 9, root=int(state.token_ids[-1]))
            parts.append((state, state.num_tokens - 1 - state.num_cached, tree))
        if step in (1, 2):  # a prompt in two chunks, beside the trees
            parts.insert(1, (late, 13, None))
        chunks, logits = run(target, parts)
        keep = []
        for chunk in chunks:
            if chunk.tree is None:
                keep.append([])
                continue
            rows = logits.pop(0)
            for node in range(len(chunk.tree)):
                text = [*chunk.state.token_ids[:-1], *chunk.tree.token_ids[chunk.tree.path(node)]]
                torch.testing.assert_close(rows[node], logits_of(model, text), rtol=1e-4, atol=1e-4)
            keep.append(chunk.tree.path(int(rng.integers(len(chunk.tree)))))
        commit(target, chunks, keep)
    for state in (*states, late):
        assert_cache_is_that_of_a_prefill(model, target, state)
        target.release(state)
    assert target.pool.num_used == 0


def test_after_a_commit_nothing_of_the_rejected_nodes_is_held(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(4)
    target = make_target(model)
    state = make_state(rng, "r", 5)
    #  root -> 1 -> 2
    #       -> 3 -> 4 -> 5
    root = int(state.token_ids[-1])
    tree = DraftTree(np.array([root, 11, 12, 13, 14, 15], np.int32), np.array([-1, 0, 1, 0, 3, 4], np.int32))
    chunks, _ = run(target, [(state, 4, tree)])
    commit(target, chunks, [[0, 3, 4]])
    assert state.num_cached == 7
    for group in target.pool.groups.values():
        assert group.allocator.num_taken == len(group.tables["r"])
        assert len(group.tables["r"]) <= 7
    assert_cache_is_that_of_a_prefill(model, target, state)


def test_the_model_is_as_before_between_steps(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(5)
    target = make_target(model)
    state = make_state(rng, "r", 6)
    before = {name: id(value) for name, value in vars(model.config).items() if "attn" in name}
    implementation = model.config._attn_implementation
    prompt = torch.from_numpy(state.token_ids.astype(np.int64))[None]

    def generate() -> list[int]:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8)[0].tolist()

    expected = generate()
    chunks, _ = run(target, [(state, 5, DraftTree.chain(int(state.token_ids[-1]), [7, 8]))])
    assert generate() == expected
    commit(target, chunks, [[0, 1]])
    assert generate() == expected
    assert model.config._attn_implementation == implementation
    assert {name: id(value) for name, value in vars(model.config).items() if "attn" in name} == before


def test_an_exception_inside_the_forward_leaves_model_and_target_usable(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(6)
    target = make_target(model)
    state = make_state(rng, "r", 6)
    implementation = model.config._attn_implementation
    tree = DraftTree.root_only(int(state.token_ids[-1]))

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    hook = model.get_output_embeddings().register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        run(target, [(state, 5, tree)])
    hook.remove()
    assert model.config._attn_implementation == implementation
    target.release(state)  # what the engine does: the request starts over
    assert target.pool.num_used == 0
    _, [rows] = run(target, [(state, 5, tree)])
    torch.testing.assert_close(rows[0], logits_of(model, state.token_ids), rtol=1e-4, atol=1e-4)


def test_a_step_without_trees_gives_no_rows(model: PreTrainedModel) -> None:
    target = make_target(model)
    state = make_state(np.random.default_rng(7), "r", 12)
    chunk = Chunk(state, state.token_ids[:5], None)
    assert target.reserve(state, 5)
    output = target.forward([chunk])
    assert output.logits.shape == (0, VOCAB_SIZE)
    assert output.cu_nodes.tolist() == [0]


@pytest.mark.parametrize("kind", FORGETS)
def test_layers_that_forget_keep_their_window_in_memory_only(kind: str) -> None:
    model = make_model(kind)
    target = make_target(model)
    state = make_state(np.random.default_rng(8), "r", 100)
    for num_prefix in (64, 34):
        chunks, _ = run(target, [(state, num_prefix, None)])
        commit(target, chunks, [[]])
    held = {key: len(group.tables["r"]) for key, group in target.pool.groups.items()}
    assert held[("full", 0)] == 98
    [forgetting] = [key for key in held if key[0] != "full"]
    assert forgetting[1] == WINDOW
    assert held[forgetting] <= WINDOW
    # Made for the live requests' windows and one step, not for all contexts.
    assert TreeTarget(
        model, probe(model), kv_tokens=10**5, max_length=128, max_batch_size=1, max_step_tokens=16
    ).pool.groups[forgetting].allocator.num_slots < 400  # fmt: skip


def test_room_is_counted() -> None:
    target = make_target(make_model("llama"), kv_tokens=20)
    state = make_state(np.random.default_rng(9), "r", 16)
    assert target.fits(20)
    assert not target.fits(21)
    assert target.has_room(20)
    assert target.reserve(state, 15)
    assert target.reserve(state, 4)  # adds up
    assert target.has_room(1)
    assert not target.has_room(2)
    assert not target.reserve(state, 2)
    target.release(state)
    target.release(state)  # unknown by now: no error
    assert target.has_room(20)


@pytest.mark.parametrize("name", ["kv_tokens", "max_length", "max_batch_size", "max_step_tokens"])
def test_a_size_below_one_is_refused(name: str) -> None:
    model = make_model("llama")
    sizes = {"kv_tokens": 9, "max_length": 9, "max_batch_size": 9, "max_step_tokens": 9, name: 0}
    with pytest.raises(ConfigError, match=f"^{name} must be >= 1, got 0$"):
        TreeTarget(model, probe(model), **sizes)


def test_a_model_in_training_mode_is_refused() -> None:
    model = make_model("llama").train()
    with pytest.raises(ConfigError, match=r"must be in evaluation mode: call model.eval\(\) first"):
        make_target(model)


@pytest.mark.parametrize("parents", [[0, 0], [-1, -1], [-1, 1], [-1, 0, 5]])
def test_malformed_parents_are_named(parents: list[int]) -> None:
    target = make_target(make_model("llama"))
    state = make_state(np.random.default_rng(9), "r", 1)
    tree = DraftTree(np.arange(len(parents), dtype=np.int32), np.array(parents, dtype=np.int32))
    assert target.reserve(state, len(tree))
    with pytest.raises(InternalError, match=r"must have parents\[0\] = -1 and 0 <= parents\[i\] < i, but node"):
        target.forward([Chunk(state, state.token_ids[:0], tree)])


def test_a_model_that_makes_fewer_calls_than_the_probe_saw_is_an_error() -> None:
    model = make_model("llama")
    calls = probe(model)
    target = TreeTarget(model, [*calls, calls[0]], kv_tokens=9, max_length=9, max_batch_size=1, max_step_tokens=9)
    state = make_state(np.random.default_rng(9), "r", 1)
    assert target.reserve(state, 1)
    with pytest.raises(InternalError, match="made 2 attention calls, the probe saw 3"):
        target.forward([Chunk(state, state.token_ids[:0], DraftTree.root_only(3))])


def test_bytes_per_token_count_keys_and_values_of_all_calls() -> None:
    model = make_model("llama")
    calls = probe(model)
    assert kv_bytes_by_device(calls, torch.float32) == {torch.device("cpu"): 2 * 2 * (8 + 8) * 4}
    assert kv_bytes_by_device(calls, torch.bfloat16) == {torch.device("cpu"): 2 * 2 * (8 + 8) * 2}
    assert {group_key(call) for call in calls} == {("full", 0)}
