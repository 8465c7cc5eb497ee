"""Layer-parallel drafting: the formula, exact reading after fuzzy drafts, and two ranks that do what one does."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.build import build_engine
from specdec.drafters import lm_loading
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.fuzzy_layers import FuzzyLayers, layer_groups
from specdec.drafters.growing import Growth
from specdec.drafters.layer_tuning import LayerTimes, same_logits, time_forms
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, SamplingParams
from tests.tiny_kinds import sliding_model

PROMPTS = [np.arange(3, 3 + size, dtype=np.int32) for size in (5, 18)]


def deep_model() -> LlamaForCausalLM:
    """Eight layers that all matter."""
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.08 * torch.randn_like(parameter)
    return model


def reference(model: LlamaForCausalLM, ids: list[int], groups: list[range]) -> torch.Tensor:
    """[T, V]: the whole row fuzzy, written down from the formula."""
    decoder = model.model
    with torch.no_grad():
        x = decoder.embed_tokens(torch.tensor([ids]))
        rotary = decoder.rotary_emb(x, torch.arange(len(ids))[None])
        first_of = {layer: group[0] for group in groups for layer in group}
        read = x
        for index, layer in enumerate(decoder.layers):
            if first_of.get(index, index) == index:
                read = x  # the input of the group, or of the layer alone
            attention, _ = layer.self_attn(layer.input_layernorm(read), position_embeddings=rotary, attention_mask=None)
            y = x + attention
            x = y + layer.mlp(layer.post_attention_layernorm(y))
        logits: torch.Tensor = model.lm_head(decoder.norm(x))[0]
    return logits


def test_groups_leave_out_the_first_and_the_last_layer() -> None:
    assert [list(group) for group in layer_groups(8, 4)] == [[1, 2, 3, 4], [5, 6]]
    assert [list(group) for group in layer_groups(6, 2)] == [[1, 2], [3, 4]]
    assert layer_groups(2, 4) == []
    with pytest.raises(ConfigError, match="n must be >= 1, got 0"):
        layer_groups(8, 0)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_fuzzy_forward_is_the_formula_and_another_one_is_untouched(size: int) -> None:
    model = deep_model()
    ids = PROMPTS[1].tolist()
    with torch.no_grad():
        fuzzy = FuzzyLayers(model, size)
        plain = model(torch.tensor([ids])).logits[0]
        with fuzzy.active():
            out = model(torch.tensor([ids])).logits[0]
        assert torch.equal(model(torch.tensor([ids])).logits[0], plain)
    assert torch.allclose(out, reference(model, ids, fuzzy.groups), atol=1e-4)
    assert not torch.allclose(out, plain, atol=1e-2)


def test_a_group_of_one_is_bit_equal_to_the_plain_forward() -> None:
    model = deep_model()
    ids = torch.tensor([PROMPTS[1].tolist()])
    with torch.no_grad():
        plain = model(ids).logits
        with FuzzyLayers(model, 1).active():
            assert torch.equal(model(ids).logits, plain)


def cached(scorer: DraftModel, request_id: str) -> list[torch.Tensor]:
    [group] = scorer._target.pool.groups.values()
    table = group.tables[request_id]
    slots = table.slots[: table.num_cached].astype(np.int64)
    return [rows[ordinal][slots] for rows in (group.keys, group.values) for ordinal in sorted(rows)]


def test_after_each_step_the_cache_is_that_of_a_fresh_prefill() -> None:
    model = deep_model()
    fuzzy = FuzzyLayers(model, 4)
    options: dict[str, Any] = {"kv_tokens": 200, "max_length": 128, "self_test": False}
    scorer = DraftModel(model, around_growth=fuzzy.active, **options)
    text = PROMPTS[1]
    for _ in range(3):
        scorer.read(["a"], [text])
        one = np.array([9], dtype=np.int32)
        grown = scorer.grow([Growth("a", one, one * 0 - 1)])
        assert grown is not None
        scorer.grow([Growth("a", one, one * 0)])
        scorer.drop(["a"])
        text = np.append(text, np.array([9, 31], dtype=np.int32))
    scorer.read(["a"], [text])
    fresh = DraftModel(model, **options)
    fresh.read(["a"], [text])
    for kept, new in zip(cached(scorer, "a"), cached(fresh, "a"), strict=True):
        assert torch.allclose(kept, new, atol=1e-5)
    exact = DraftModel(model, **options)
    exact.read(["a"], [text])
    a, b = scorer.grow([Growth("a", one, one * 0 - 1)]), exact.grow([Growth("a", one, one * 0 - 1)])
    assert a is not None
    assert b is not None
    assert not torch.allclose(a, b, atol=1e-2), "the draft was not fuzzy at all"


def requests(**law: Any) -> list[Request]:
    return [
        Request(f"r{i}", prompt, SamplingParams(max_new_tokens=14, seed=3, **law)) for i, prompt in enumerate(PROMPTS)
    ]


def decode(target: Any, drafter: Any, **law: Any) -> tuple[list[list[int]], int]:
    with build_engine(target, drafter, budget=4) as engine:
        last = {output.request_id: output.state for output in engine.generate(requests(**law))}
    return [last[f"r{i}"].output_ids.tolist() for i in range(len(PROMPTS))], sum(s.num_accepted for s in last.values())


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.9}])
def test_the_text_is_that_of_plain_decoding(tmp_path: Path, n: int, law: dict[str, float]) -> None:
    model = deep_model()
    model.save_pretrained(tmp_path)
    plain, _ = decode(model, "none", **law)
    texts, accepted = decode(model, f"layer-parallel:{tmp_path}?n={n}&force=1&top_k=1&width=1&min_gain=0", **law)
    assert texts == plain
    assert accepted > 0


@pytest.mark.parametrize(("groups_ms", "words"), [(1.0, "are used"), (1.9, "do not pay"), (3.0, "do not pay")])
def test_groups_are_used_only_where_they_were_seen_to_pay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, groups_ms: float, words: str
) -> None:
    model = deep_model()
    model.save_pretrained(tmp_path)
    times = LayerTimes(exact_ms=2.0, groups_ms=groups_ms)
    monkeypatch.setattr(lm_loading, "time_forms", lambda *_: times)
    _, accepted = decode(model, f"layer-parallel:{tmp_path}?n=4&top_k=1&width=1&min_gain=0")
    assert f"groups of 4 layers {words}" in caplog.text
    monkeypatch.undo()
    _, exact = decode(model, f"lm:{tmp_path}?top_k=1&width=1&min_gain=0")
    assert (accepted == exact) is (words == "do not pay")


def test_the_tuner_times_both_ways_and_leaves_nothing_behind() -> None:
    model = deep_model()
    seen: list[bool] = []
    scorer = DraftModel(model, kv_tokens=300, max_length=128, self_test=False)
    times = time_forms(scorer, seen.append)
    assert times.exact_ms > 0
    assert times.groups_ms > 0
    assert seen == [False, True] * (len(seen) // 2)
    assert scorer.num_used == 0
    assert LayerTimes(1.0, 1.0).gain(5) == 1.0
    assert LayerTimes(3.0, 1.0).gain(1) == 1.0  # the first level is exact in both
    assert LayerTimes(1.5, 1.0).gain(5) == pytest.approx(5 * 1.5 / 5.5)


def test_the_batched_form_is_the_layer_by_layer_one() -> None:
    model = deep_model()
    fuzzy = FuzzyLayers(model, 4, is_batched=True)
    scorer = DraftModel(model, kv_tokens=300, max_length=128, self_test=False, around_growth=fuzzy.active)

    def switch(is_batched: bool) -> None:
        fuzzy.is_batched = is_batched

    logits = {}
    for is_batched in (False, True):
        switch(is_batched)
        scorer.read(["a"], [PROMPTS[1]])
        level = np.array([9, 4, 31], dtype=np.int32)
        scorer.grow([Growth("a", level, np.full(3, -1, dtype=np.int32))])
        logits[is_batched] = scorer.grow([Growth("a", level, np.array([0, 0, 2], dtype=np.int32))])
        scorer.release(["a"])
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-5, atol=1e-5)
    assert same_logits(scorer, switch)
    fuzzy._batched[1]._weights["o_proj"] *= 1.5
    assert not same_logits(scorer, switch)


def test_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no plain pre-norm blocks"):
        FuzzyLayers(sliding_model(), 2)


RANK = """
import sys, torch.distributed as dist
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=int(sys.argv[1]), world_size=2)
from tests.drafters.test_fuzzy_layers import decode, deep_model
model = deep_model()
for law in ({{"temperature": 0.0}}, {{"temperature": 0.9}}):
    print(decode(model, "layer-parallel:{path}?n=3&top_k=2&width=2&force=1", **law))
dist.destroy_process_group()
"""


def test_two_ranks_do_what_one_does_token_for_token(tmp_path: Path) -> None:
    model = deep_model()
    model.save_pretrained(tmp_path)
    name = f"layer-parallel:{tmp_path}?n=3&top_k=2&width=2&force=1&min_gain=0.1"
    expected = [str(decode(model, name, temperature=t)) for t in (0.0, 0.9)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = RANK.format(root=str(Path(__file__).resolve().parents[2]), port=port, path=tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out.splitlines() == expected
