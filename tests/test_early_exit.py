from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from specdec.build import build_engine
from specdec.cost_model import BATCHES, CONTEXTS, TOKENS, CostModel, CostTable
from specdec.early_exit import EarlyExit, surviving_nodes
from specdec.errors import ConfigError, UnsupportedError
from specdec.toy import OracleDrafter, RandomTreeDrafter
from specdec.types import DraftTree, Request, SamplingParams

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=12),
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def run(
    model: Any, drafter: Any, budget: int, early: EarlyExit | None = None, temperature: float = 0.0
) -> tuple[dict[str, list[int]], int]:
    requests = [
        Request(
            f"r{i}",
            np.arange(2 + 9 * i, dtype=np.int32) % 90,
            SamplingParams(max_new_tokens=25, temperature=temperature, seed=i),
        )
        for i in range(4)
    ]
    texts: dict[str, list[int]] = {}
    with build_engine(model, drafter, budget=budget, max_prefill_tokens=16) as engine:
        if early is not None:
            engine.target.prune_with(early)  # type: ignore[attr-defined]
        accepted = 0
        for output in engine.generate(requests):
            texts.setdefault(output.request_id, []).extend(output.new_ids)
            accepted += output.state.num_accepted if output.finish_reason else 0
        assert engine.target.pool.num_used == 0  # type: ignore[attr-defined]
    return texts, accepted


@pytest.mark.parametrize("rank", [1, 30])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_pruning_changes_no_token(model: Any, rank: int, temperature: float) -> None:
    plain, _ = run(model, "none", 0, temperature=temperature)
    for drafter in (RandomTreeDrafter(97), OracleDrafter(plain, 97, num_wrong_siblings=2)):
        early = EarlyExit(model, layer=2, rank=rank)
        assert run(model, drafter, 9, early, temperature)[0] == plain
        assert early.num_dropped > 20


def test_what_the_probe_still_believes_in_is_accepted(model: Any) -> None:
    plain, _ = run(model, "none", 0)
    drafter = OracleDrafter(plain, 97, num_wrong_siblings=1)
    _, all_of_it = run(model, drafter, 8)
    _, some = run(model, drafter, 8, EarlyExit(model, layer=3, rank=20))
    _, none = run(model, drafter, 8, EarlyExit(model, layer=1, rank=1))
    assert none <= some <= all_of_it
    assert some > 0.3 * all_of_it


def test_a_beaten_node_takes_its_branch_with_it() -> None:
    tree = DraftTree(np.zeros(6, np.int32), np.array([-1, 0, 0, 1, 3, 2], np.int32))
    assert surviving_nodes(tree, np.array([True, True, False, False, False, False])).tolist() == [0, 2, 5]


def test_it_runs_only_where_it_pays(model: Any) -> None:
    def costs(slope: float) -> CostModel:
        row = 20 + slope * np.array(TOKENS, float)
        return CostModel({"target": CostTable(np.broadcast_to(row, (len(BATCHES), len(CONTEXTS), len(TOKENS))).copy())})

    trees = [DraftTree.chain(1, [2] * 8)] * 4
    for slope, pays in ((1e-6, False), (50.0, True)):
        early = EarlyExit(model, layer=2, costs=costs(slope))
        assert early.is_worth_it(trees, 36, 10.0)  # nothing is known yet: it is tried
        early._note(32, 16, 32, ms=3.2)
        assert early.is_worth_it(trees, 36, 10.0) is pays
        assert sum(early.is_worth_it(trees, 36, 10.0) for _ in range(128)) in ((2,) if not pays else (128,))
    assert not early.is_worth_it([DraftTree.root_only(1)], 1, 10.0)


def test_wrong_uses_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"layer must be in \[1, 3\], got 4"):
        EarlyExit(model, layer=4)
    with pytest.raises(ConfigError, match="rank must be >= 1"):
        EarlyExit(model, layer=1, rank=0)
    with build_engine(model, "none", budget=0) as engine:
        engine.target.is_strict = True  # type: ignore[attr-defined]
        with pytest.raises(UnsupportedError, match="numerics='default'"):
            engine.target.prune_with(EarlyExit(model, layer=1))  # type: ignore[attr-defined]
