"""Checkpoints that lie about themselves are read as they were trained; those of no use are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.build import build_engine
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_head import EagleConfig
from specdec.drafters.eagle_loading import load_eagle
from specdec.drafters.eagle_probe import Lesson, probe_readings
from specdec.drafters.probing import PROBE_TEXT
from specdec.errors import LoadError
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target, write
from tests.drafters.eagle_training import edit_config, edit_weights, train
from tests.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def truth(target: Any, tmp_path_factory: pytest.TempPathFactory) -> EagleConfig:
    """How the trained checkpoint below really has to be read."""
    stated = read_files(write("specforge", tmp_path_factory.mktemp("stated"))).head_config(target.config)
    return replace(
        stated, hidden_layers=(1, 3, 4), norm_before_residual=True, rope={**stated.rope, "rope_theta": 500_000.0}
    )


@pytest.fixture(scope="module")
def trained(target: Any, truth: EagleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained on the probe's text under ``truth``, and states something else."""
    path = write("specforge", tmp_path_factory.mktemp("trained"))
    return train(path, target, truth, Lesson.of(target, byte_tokenizer()(PROBE_TEXT)["input_ids"][:200]))


def test_the_probe_finds_the_reading_of_the_training(
    target: Any, truth: EagleConfig, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = byte_tokenizer()(PROBE_TEXT)["input_ids"][:200]
    readings = probe_readings(read_files(trained), target, Lesson.of(target, ids))
    best = max(readings, key=lambda reading: reading.agreement)
    assert best.config == truth
    assert best.agreement > readings[0].agreement + 0.1
    drafter: Any = load_eagle(trained, target, byte_tokenizer(), None)
    assert drafter.head.config == truth
    assert drafter.needs.hidden_layers == (1, 3, 4)
    assert "hidden_layers (1, 3, 4) in place of (2, 4, 5)" in caplog.text
    assert "norm_before_residual True in place of False" in caplog.text


def test_without_a_probe_the_configuration_counts_and_a_base_can_be_given(target: Any, trained: Path) -> None:
    trusting: Any = load_eagle(trained, target, byte_tokenizer(), None, probe=0)
    assert trusting.head.config.hidden_layers == (2, 4, 5)
    assert trusting.head.config.rope["rope_theta"] == 10_000
    given: Any = load_eagle(trained, target, byte_tokenizer(), None, rope_theta=500_000)
    assert given.head.config.rope["rope_theta"] == 500_000


def test_a_reading_that_is_no_better_is_not_taken(
    target: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("speculators", tmp_path)  # random weights: no reading is any good
    drafter: Any = load_eagle(path, target, byte_tokenizer(), None)
    assert drafter.head.config.hidden_layers == (1, 4, 6)
    assert not caplog.records


def test_ids_in_place_of_offsets_are_recognised(target: Any, tmp_path: Path) -> None:
    path = write("speculators", tmp_path)
    offsets = read_files(path).target_ids(VOCAB_SIZE)
    assert offsets is not None
    edit_weights(path, lambda w: w.update(d2t=w["d2t"] + torch.arange(len(w["d2t"]))))
    ids = read_files(path).target_ids(VOCAB_SIZE)
    assert ids is not None
    assert torch.equal(ids, offsets)


# --- checkpoints that cannot be used --------------------------------------------------------------------------------


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"looked for \*.safetensors and pytorch_model"),
    "cut": (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 40), r"cannot read .*model.safetensors"),
    "config is no json": (lambda p: (p / "config.json").write_text("{"), "cannot read .*config.json"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "must hold an object, got list"),
    "nan": (
        lambda p: edit_weights(p, lambda w: w["norm.weight"].fill_(float("nan"))),
        "norm.weight holds a value that is not finite",
    ),
    "no d2t": (
        lambda p: edit_weights(p, lambda w: w.pop("d2t")),
        "257 tokens and has no d2t",
    ),
    "short d2t": (
        lambda p: edit_weights(p, lambda w: w.update(d2t=w["d2t"][:9])),
        r"d2t has shape \(9,\), but",
    ),
    "mad d2t": (lambda p: edit_weights(p, lambda w: w["d2t"].fill_(-3)), "d2t does not map 120 draft tokens"),
    "t2d of another target": (lambda p: edit_weights(p, lambda w: w.update(t2d=w["t2d"][:9])), "t2d tells of 9 tokens"),
    "draft vocabulary": (lambda p: edit_config(p, draft_vocab_size=64), "draft_vocab_size is 64, but lm_head has 120"),
    "missing": (lambda p: edit_weights(p, lambda w: w.pop("layers.0.mlp.up_proj.weight")), "up_proj.weight missing"),
    "no fc": (lambda p: edit_weights(p, lambda w: w.pop("fc.weight")), "fc.weight missing"),
    "unknown": (lambda p: edit_weights(p, lambda w: w.update(odd=torch.ones(1))), "it holds odd, which no EAGLE head"),
    "shape": (
        lambda p: edit_weights(p, lambda w: w.update({"layers.0.mlp.up_proj.weight": torch.ones(3, 32)})),
        r"up_proj.weight has shape \(3, 32\), expected \(48, 32\)",
    ),
    "wide": (lambda p: edit_weights(p, lambda w: w.update({"fc.weight": torch.ones(32, 64)})), "fc reads 64 numbers"),
    "layers": (
        lambda p: edit_config(p, eagle_aux_hidden_state_layer_ids=[1, 4, 60]),
        r"reads states \(1, 4, 60\), the target has 0 to 8",
    ),
    "heads": (lambda p: edit_config(p, transformer_layer_config={}), "config.json does not say num_attention_heads"),
    "no head": (lambda p: edit_weights(p, lambda w: w.pop("lm_head.weight")), "lm_head.weight missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_checkpoint_gets_one_clear_error(target: Any, tmp_path: Path, name: str) -> None:
    path = write("speculators", tmp_path / "x")
    damage, message = BROKEN[name]
    damage(path)
    with pytest.raises(LoadError, match=message):
        build_engine(target, f"eagle:{path}", tokenizer=byte_tokenizer())


def test_a_head_for_another_target_is_refused(tmp_path: Path) -> None:
    from tests.tiny_models import tiny_llama

    with pytest.raises(LoadError, match="reads states"):
        build_engine(tiny_llama(), f"eagle:{write('speculators', tmp_path / 'a')}")
    with pytest.raises(LoadError, match=r"the target has 0 to 2"):
        build_engine(tiny_llama(), f"eagle:{write('safeailab-3', tmp_path / 'b')}")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_pickle_with_code_is_refused_and_nothing_runs(target: Any, tmp_path: Path) -> None:
    path = write("safeailab-1", tmp_path / "x")
    torch.save({"fc.weight": Bomb(str(tmp_path / "ran"))}, path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot read .*pytorch_model.bin"):
        build_engine(target, f"eagle:{path}")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="must hold tensors by name"):
        build_engine(target, f"eagle:{path}")
