"""EAGLE heads against a plain reference, in every published layout; the text they draft for never changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_head import attend_causally
from specdec.drafters.eagle_probe import build_head
from specdec.errors import ConfigError, UnsupportedError
from specdec.kernel_runner import Captured
from specdec.step_buffers import Outputs
from specdec.types import Request, SamplingParams
from tests.drafters.drafting import Watch, run
from tests.drafters.eagle_checkpoints import LAYOUTS, VOCAB_SIZE, eagle_target, write
from tests.drafters.eagle_reference import Reference

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 250, size).astype(np.int32) for size in (7, 2, 23)]


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eagle")
    for layout in LAYOUTS:
        write(layout, root / layout)
    return root


def head_of(target: Any, path: Path) -> Any:
    files = read_files(path)
    return build_head(files, target, files.head_config(target.config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_heads_logits_are_those_of_the_plain_reference(target: Any, checkpoints: Path, layout: str) -> None:
    text = PROMPTS[2].tolist()
    reference = Reference(layout, checkpoints / layout, target, text)
    head = head_of(target, checkpoints / layout)
    states = torch.cat([reference.states[layer][0, :-1] for layer in head.config.hidden_layers], -1)
    with torch.no_grad():
        outputs = head.forward(torch.tensor(text[1:]), head.fuse(states), torch.arange(len(text) - 1), attend_causally)
        logits = head.target_logits(outputs, VOCAB_SIZE)
    law, ids = reference.log_probs(reference.after([]))
    assert torch.allclose(logits[-1].log_softmax(-1)[ids], law, atol=1e-5)
    unknown = sorted(set(range(VOCAB_SIZE)) - set(ids))
    assert bool((logits[:, unknown] == -torch.inf).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trees_are_those_of_the_plain_reference_step_after_step(target: Any, checkpoints: Path, layout: str) -> None:
    options = "?top_k=3&depth=3&probe=0"
    _, watch = run(target, f"eagle:{checkpoints / layout}{options}", PROMPTS, 6)
    compared = 0
    for text, tree in watch.seen:
        if len(tree) == 1:
            continue  # the prompt's own step, or the last token
        budget = tree.num_draft_tokens
        reference = Reference(layout, checkpoints / layout, target, text)
        paths = [tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))]
        assert paths == reference.tree(budget, 3, min(3, budget))
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 50}])
@pytest.mark.parametrize("layout", ["safeailab-1", "speculators"])
def test_the_text_is_that_of_plain_decoding(target: Any, checkpoints: Path, layout: str, law: dict[str, Any]) -> None:
    plain, _ = run(target, "none", PROMPTS, 24, **law)
    drafted, _ = run(target, f"eagle:{checkpoints / layout}", PROMPTS, 24, **law)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]
    assert all(state.num_drafted > 0 for state in drafted)


def test_preempted_requests_and_a_full_cache_keep_the_text(target: Any, checkpoints: Path) -> None:
    def texts(drafter: str, **options: Any) -> list[list[int]]:
        requests = [Request(f"r{i}", p, SamplingParams(max_new_tokens=30)) for i, p in enumerate(PROMPTS)]
        with build_engine(target, drafter, budget=6, **options) as engine:
            last = {output.request_id: output.state for output in engine.generate(requests)}
        assert options or sum(state.num_preemptions for state in last.values()) == 0
        if options:
            assert sum(state.num_preemptions for state in last.values()) > 0
        return [last[request.request_id].output_ids.tolist() for request in requests]

    plain = texts("none")
    name = f"eagle:{checkpoints / 'specforge'}?probe=0"
    assert texts(name, kv_tokens=64) == plain
    assert texts(f"{name}&kv_tokens=40") == plain


def test_a_head_that_knows_the_target_is_accepted(target: Any, checkpoints: Path, tmp_path: Path) -> None:
    """A version-1 head that copies the target's next state would be perfect; here the target ignores its layers."""
    model = eagle_target()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    head = head_of(model, checkpoints / "safeailab-1-llama3")
    width = head.config.hidden_size
    norm = model.model.norm.weight.detach()
    with torch.no_grad():
        # fc passes the embedding on; the layer adds nothing; the target's lm_head sees what its norm would give, up to
        # a factor per row that no argmax feels.
        head.weights["fc.weight"] = torch.cat((torch.diag(norm), torch.zeros(width, width)), 1)
        head.weights["embed_tokens.weight"] = model.model.embed_tokens.weight.detach()
        head._embed = model.model.embed_tokens
        head.weights["layers.0.self_attn.o_proj.weight"].zero_()
        head.weights["layers.0.mlp.down_proj.weight"].zero_()
    drafter = EagleDrafter(head, vocab_size=VOCAB_SIZE, top_k=1, depth=4)
    states, _ = run(model, drafter, PROMPTS, 21, budget=4)
    for state in states:
        # The first step of a prompt has no states yet; after it every chain of four is right.
        assert state.num_accepted == state.num_drafted
        assert state.num_output_tokens / state.num_steps > 3.5


def in_place(launch: Callable[[], Outputs]) -> Captured:
    """What a CUDA graph does to its outputs: every replay overwrites those of the one before."""
    kept: list[Any] = []

    def replay() -> Outputs:
        outputs = launch()
        if not kept:
            kept.extend(None if part is None else part.clone() for part in outputs)
        for old, new in zip(kept, outputs, strict=True):
            if new is not None:
                old.copy_(new)
        return Outputs(*kept)

    return Captured(replay, 0)


@pytest.mark.slow
def test_states_that_captured_steps_overwrite_are_read_in_time(target: Any, checkpoints: Path) -> None:
    """Kernels in the interpreter, in buckets as on a GPU: the drafter sees the target's states, and those alone."""
    seen: dict[str, list[Any]] = {}
    for kernels in ("torch", "triton"):
        watch = Watch()
        requests = [Request(f"r{i}", p, SamplingParams(max_new_tokens=7)) for i, p in enumerate(PROMPTS[:2])]
        with build_engine(
            target, f"eagle:{checkpoints / 'specforge'}?probe=0&top_k=2", budget=3, kernels=kernels, max_length=64,
            max_batch_size=2, kv_tokens=200, max_prefill_tokens=16, observers=[watch],
        ) as engine:  # fmt: skip
            runner = engine.target.runner  # type: ignore[attr-defined]
            if runner is not None:
                runner.capture(in_place)
            list(engine.generate(requests))
            assert runner is None or runner.num_replays > 3
        seen[kernels] = [(text, tree.token_ids.tolist(), tree.parents.tolist()) for text, tree in watch.seen]
    assert seen["triton"] == seen["torch"]
    assert any(len(ids) == 4 for _, ids, _ in seen["triton"])


def test_rejection_rules_and_targets_without_trees_are_refused(target: Any, checkpoints: Path) -> None:
    name = f"eagle:{checkpoints / 'safeailab-3'}"
    with pytest.raises(UnsupportedError, match="EAGLE trees need the match rule"):
        build_engine(target, name, verifier="traversal")
    for option, message in (("depth=0", "depth must be >= 1"), ("min_gain=-1", "min_gain must be auto or >= 0")):
        with pytest.raises(ConfigError, match=message):
            build_engine(target, f"{name}?{option}")
