"""A target's own MTP layers against a plain reference, in every published layout; the text never changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.build import build_engine, drafter_names, load_drafter, name_drafter
from specdec.drafters.eagle_head import attend_causally
from specdec.errors import ConfigError, LoadError, UnsupportedError
from tests.drafters.drafting import run
from tests.drafters.mtp_checkpoints import LAYOUTS, load_target, write
from tests.drafters.mtp_reference import Reference
from tests.tiny_models import tiny_llama

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 250, size).astype(np.int32) for size in (9, 2, 13)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mtp")
    return {layout: write(layout, root / layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def targets(paths: dict[str, Path]) -> dict[str, Any]:
    return {layout: load_target(path) for layout, path in paths.items()}


@pytest.mark.parametrize("layout", ["deepseek-v3", "glm-4.5"])
def test_a_layers_logits_are_those_of_the_plain_reference(
    paths: dict[str, Path], targets: dict[str, Any], layout: str
) -> None:
    text, target = PROMPTS[2].tolist(), targets[layout]
    reference, drafter = Reference(paths[layout], target, text), load_drafter("mtp", target)
    head = drafter.head  # type: ignore[attr-defined]
    with torch.no_grad():
        states = head.fuse(reference.states[:-1])
        outputs = head.forward(torch.tensor(text[1:]), states, torch.arange(len(text) - 1), attend_causally)
        law = head.logits(outputs)[-1].log_softmax(-1)
    torch.testing.assert_close(law, reference.log_probs([]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trees_are_those_of_the_plain_reference_step_after_step(
    paths: dict[str, Path], targets: dict[str, Any], layout: str
) -> None:
    """Path by path: every node has the value that the reference gives it, and a chain is the reference's best."""
    _, watch = run(targets[layout], "mtp?top_k=2&depth=3", PROMPTS[1:], 6, budget=6)
    _, chains = run(targets[layout], "mtp", PROMPTS[2:], 5)
    compared = 0
    for text, tree in watch.seen:
        reference = Reference(paths[layout], targets[layout], text)
        for node in range(1, len(tree)):
            path = tree.token_ids[tree.path(node)[1:]].tolist()
            value = sum(float(reference.log_probs(path[:i])[token]) for i, token in enumerate(path))
            assert np.log(tree.values[node]) == pytest.approx(value, abs=1e-5 * len(path))
            compared += 1
    assert compared >= 15
    for text, tree in chains.seen:
        reference = Reference(paths[layout], targets[layout], text)
        ids = tree.token_ids[1:].tolist()
        assert ids == [int(reference.log_probs(ids[:i]).argmax()) for i in range(len(ids))]
    assert max(tree.num_draft_tokens for _, tree in chains.seen) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 50}])
def test_the_text_is_that_of_plain_decoding(targets: dict[str, Any], layout: str, law: dict[str, Any]) -> None:
    plain, _ = run(targets[layout], "none", PROMPTS, 16, **law)
    drafted, _ = run(targets[layout], "mtp?top_k=2", PROMPTS, 16, **law)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]
    assert all(state.num_drafted > 0 for state in drafted)


def test_a_layer_that_passes_the_embedding_on_is_always_right(paths: dict[str, Path], tmp_path: Path) -> None:
    """Where the target's own layers add nothing, too, the two agree on every token."""
    path = write("glm-4.5", tmp_path / "m")
    _edit(path, 1, _silence)
    _edit(path, 2, _silence)
    norm = load_file(path / "model-00001-of-00002.safetensors")["model.norm.weight"]

    def pass_on(w: dict[str, Any]) -> None:
        w["model.layers.2.enorm.weight"].fill_(1)
        w["model.layers.2.eh_proj.weight"] = torch.cat((torch.eye(32), torch.zeros(32, 32)), 1)
        w["model.layers.2.shared_head.norm.weight"] = norm

    _edit(path, 2, pass_on)
    states, _ = run(load_target(path), "mtp", PROMPTS, 13)
    for state in states:
        assert state.num_accepted == state.num_drafted > 6


def test_it_is_named_without_a_path_and_fused_like_any_other(targets: dict[str, Any]) -> None:
    assert "mtp" in drafter_names()
    plain, _ = run(targets["mellum"], "none", PROMPTS[:1], 8)
    fused, _ = run(targets["mellum"], "fused:mtp?depth=2+recycling", PROMPTS[:1], 8)
    assert fused[0].output_ids.tolist() == plain[0].output_ids.tolist()
    with pytest.raises(ConfigError, match="mtp takes no path"):
        name_drafter("mtp:somewhere")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'deep'"):
        build_engine(targets["mellum"], "mtp?deep=2")
    with pytest.raises(ConfigError, match="depth must be >= 1"):
        build_engine(targets["mellum"], "mtp?depth=0")
    with pytest.raises(UnsupportedError, match="MTP layers need the match rule"):
        build_engine(targets["mellum"], "mtp", verifier="block")


def test_the_first_of_several_layers_drafts_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write("deepseek-v3", tmp_path / "m")

    def double(w: dict[str, Any]) -> None:
        w |= {name.replace("layers.2.", "layers.3."): weight.clone() for name, weight in list(w.items())}

    _edit(path, 2, double)
    _config(path, num_nextn_predict_layers=2)
    with caplog.at_level(logging.WARNING):
        run(load_target(path), "mtp", PROMPTS[:1], 5)
    assert "has 2 MTP layers: the first one drafts all tokens" in caplog.text


# --- checkpoints that cannot be used --------------------------------------------------------------------------------


def _edit(path: Path, shard: int, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / f"model-0000{shard}-of-00002.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name}
    index["weight_map"] |= dict.fromkeys(weights, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def _silence(w: dict[str, Any]) -> None:
    for name in w:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w[name].zero_()


def _cut(path: Path) -> None:
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:400])


_L = "model.layers.2."
_PROJECTION = f"{_L}eh_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "none": (
        lambda p: _edit(p, 2, dict.clear),
        LoadError,
        r"no multi-token-prediction layers: looked for model.layers.2.\* and mtp.\*",
    ),
    "missing": (lambda p: _edit(p, 2, lambda w: w.pop(_PROJECTION)), LoadError, "cannot load the layers of"),
    "nan": (
        lambda p: _edit(p, 2, lambda w: w[f"{_L}hnorm.weight"].fill_(float("nan"))),
        LoadError,
        "hnorm.weight is not finite",
    ),
    "shape": (
        lambda p: _edit(p, 2, lambda w: w.update({_PROJECTION: torch.ones(32, 32)})),
        LoadError,
        "has another shape than",
    ),
    "quantised": (
        lambda p: _edit(p, 2, lambda w: w.update({_PROJECTION: w[_PROJECTION].to(torch.float8_e4m3fn)})),
        UnsupportedError,
        r"eh_proj.weight of .* is quantised \(F8_E4M3\)",
    ),
    "cut": (_cut, LoadError, "cannot read .*model-00002"),
    "gone": (lambda p: (p / "config.json").unlink(), LoadError, "looked for config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_checkpoint_gets_one_clear_error(tmp_path: Path, name: str) -> None:
    path = write("deepseek-v3", tmp_path / "m")
    target = load_target(path)
    damage, error, message = BROKEN[name]
    damage(path)
    before = target.config.name_or_path, target._keys_to_ignore_on_load_unexpected
    with pytest.raises(error, match=message):
        build_engine(target, "mtp")
    assert (target.config.name_or_path, target._keys_to_ignore_on_load_unexpected) == before


def test_targets_without_such_layers_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="LlamaForCausalLM states no multi-token-prediction layers"):
        build_engine(tiny_llama(), "mtp")
    _config(write("glm-4.5", tmp_path / "m"), num_nextn_predict_layers=0)
    with pytest.raises(LoadError, match="states no multi-token-prediction layers"):
        build_engine(load_target(tmp_path / "m"), "mtp")
    target = load_target(paths["glm-4.5"])
    target.config.name_or_path = ""
    with pytest.raises(LoadError, match="was not loaded from a checkpoint"):
        build_engine(target, "mtp")
