"""A draft model's rows are those of an ordinary forward over the same path, whatever grew and was dropped before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from specdec.drafters.draft_model import DraftModel
from specdec.drafters.growing import Growth
from specdec.errors import UnsupportedError
from tests.test_tree_target import CONFIGS, VOCAB_SIZE, logits_of, make_model
from tests.tiny_kinds import hybrid_model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def scorer_of(model: PreTrainedModel, kv_tokens: int = 300) -> DraftModel:
    return DraftModel(model, kv_tokens=kv_tokens, max_length=128, max_requests=4, self_test=False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=2e-4, rtol=1e-4))


def test_growing_trees_of_several_requests_equal_their_paths_alone(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(5)
    scorer = scorer_of(model)
    texts = {name: rng.integers(2, VOCAB_SIZE, size).astype(np.int32) for name, size in (("a", 3), ("b", 21))}
    for _ in range(3):
        served, logits = scorer.read(list(texts), list(texts.values()))
        assert served == [0, 1]
        for row, text in zip(logits, texts.values(), strict=True):
            assert close(row, logits_of(model, text.tolist()))
        paths: dict[str, list[list[int]]] = {name: [] for name in texts}
        for _level in range(4):
            growths = []
            for name in texts:
                width = int(rng.integers(1, 4))
                ids = rng.integers(2, VOCAB_SIZE, width).astype(np.int32)
                parents = rng.integers(-1, len(paths[name]), width).astype(np.int32)
                paths[name] += [
                    [*(paths[name][p] if p >= 0 else []), int(token)] for p, token in zip(parents, ids, strict=True)
                ]
                growths.append(Growth(name, ids, parents))
            rows = scorer.grow(growths)
            assert rows is not None
            new = [(name, path) for growth, name in zip(growths, texts, strict=True)
                   for path in paths[name][-len(growth.token_ids):]]  # fmt: skip
            for row, (name, path) in zip(rows, new, strict=True):
                assert close(row, logits_of(model, [*texts[name].tolist(), *path]))
        scorer.drop(list(texts))
        texts = {name: np.append(text, rng.integers(2, VOCAB_SIZE, 4)).astype(np.int32) for name, text in texts.items()}
    scorer.release(["a", "b", "nobody"])
    assert scorer.num_used == 0


def test_a_long_text_is_read_in_pieces_and_one_that_has_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.drafters.draft_model._PIECE", 16)
    model = make_model("llama")
    scorer = scorer_of(model, kv_tokens=100)
    rng = np.random.default_rng(1)
    texts = [rng.integers(2, VOCAB_SIZE, size).astype(np.int32) for size in (50, 129, 20, 90)]
    served, logits = scorer.read(["a", "too long", "b", "no room"], texts)
    assert served == [0, 2]
    assert close(logits[0], logits_of(model, texts[0].tolist()))
    assert close(logits[1], logits_of(model, texts[2].tolist()))
    assert scorer.num_read("a") == 50
    wide = np.arange(60, dtype=np.int32)
    before = scorer.num_used
    assert scorer.grow([Growth("a", wide[:2], wide[:2] * 0 - 1), Growth("b", wide, wide * 0 - 1)]) is None
    assert scorer.num_used == before
    scorer.release(["a", "b", "no room"])
    assert scorer.num_used == 0


def test_a_recurrent_model_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedError, match="cannot be a draft model: tree: "):
        DraftModel(hybrid_model(), kv_tokens=100, max_length=64)
