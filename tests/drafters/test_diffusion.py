"""Block-diffusion heads against a plain reference, in every published dialect; the text never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.drafters.block_training import block_labels, forward_blocks, teacher_forced
from specdec.drafters.diffusion import DiffusionDrafter
from specdec.drafters.diffusion_files import read_diffusion_files
from specdec.drafters.diffusion_loading import build_diffusion_head
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, SamplingParams
from tests.drafters.diffusion_checkpoints import DIALECTS, write
from tests.drafters.diffusion_reference import MEANINGS, Reference
from tests.drafters.drafting import run
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 250, size).astype(np.int32) for size in (7, 2, 23)]


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusion")
    for dialect in DIALECTS:
        write(dialect, root / dialect)
    return root


def head_of(target: Any, path: Path) -> Any:
    files = read_diffusion_files(path)
    return build_diffusion_head(files, target, files.head_config(target.config))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_many_blocks_at_once_are_those_of_the_plain_reference(target: Any, checkpoints: Path, dialect: str) -> None:
    text = RNG.integers(0, 250, 20).tolist()
    head = head_of(target, checkpoints / dialect)
    ids, anchors = torch.tensor(text), torch.tensor([1, 6, 13])
    with torch.no_grad():
        hidden = target(ids[None], output_hidden_states=True).hidden_states
        states = torch.cat([hidden[layer][0] for layer in head.config.hidden_layers], -1)
        rows = head.guessing_rows(forward_blocks(head, states[None], ids[None], anchors[None]))
        found, chances_of = teacher_forced(head, rows, ids[None], anchors[None])
        logits, confidences = found[0], None if chances_of is None else chances_of[0]
    for place, anchor in enumerate(anchors.tolist()):
        reference = Reference(dialect, checkpoints / dialect, target, text[: anchor + 1])
        path = text[anchor + 1 : anchor + head.config.num_guesses]
        laws, chances = reference.laws(path)
        mine = head.over_target(logits[place], VOCAB_SIZE).log_softmax(-1)
        assert torch.allclose(mine, laws, atol=1e-5)
        if confidences is not None:
            assert torch.allclose(confidences[place].sigmoid(), torch.tensor(chances), atol=1e-5)
        assert bool(chances) == (confidences is not None)
        labels = block_labels(head.config, ids[None], anchors[None])[0, place].tolist()
        assert labels == text[anchor + 1 : anchor + 1 + head.config.num_guesses]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_chains_are_those_of_the_plain_reference_step_after_step(target: Any, checkpoints: Path, dialect: str) -> None:
    _, watch = run(target, f"diffusion:{checkpoints / dialect}?probe=0", PROMPTS, 6)
    compared = 0
    for text, tree in watch.seen:
        if len(tree) == 1:
            continue  # the prompt's own step, or the last token
        assert tree.is_chain
        reference = Reference(dialect, checkpoints / dialect, target, text)
        assert tree.token_ids[1:].tolist() == reference.chain(tree.num_draft_tokens)
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("dialect", DIALECTS)
def test_trees_are_the_best_paths_step_after_step(target: Any, checkpoints: Path, dialect: str) -> None:
    _, watch = run(target, f"diffusion:{checkpoints / dialect}?probe=0&top_k=9", PROMPTS, 6, budget=9)
    compared = 0
    for text, tree in watch.seen:
        if tree.num_draft_tokens < 3:
            continue
        reference = Reference(dialect, checkpoints / dialect, target, text)
        paths = {tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))}
        depth = min(tree.num_draft_tokens, MEANINGS[dialect].block)
        assert max(map(len, paths)) <= depth
        assert paths == set(reference.tree(tree.num_draft_tokens))
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 50}])
@pytest.mark.parametrize("options", ["", "?top_k=3"])
@pytest.mark.parametrize("dialect", ["zlab", "deepspec-rnn"])
def test_the_text_is_that_of_plain_decoding(
    target: Any, checkpoints: Path, dialect: str, options: str, law: dict[str, Any]
) -> None:
    plain, _ = run(target, "none", PROMPTS, 20, **law)
    drafted, _ = run(target, f"diffusion:{checkpoints / dialect}{options}", PROMPTS, 20, **law)
    assert [s.output_ids.tolist() for s in drafted] == [s.output_ids.tolist() for s in plain]
    assert all(state.num_drafted > 0 for state in drafted)


@pytest.mark.parametrize("dialect", ["zlab", "zlab-later", "deepspec-dspark"])
def test_the_cache_after_many_rounds_is_the_one_built_from_the_states_at_once(
    target: Any, checkpoints: Path, dialect: str
) -> None:
    """Rows of blocks never stay; rows of the target's states stay as the final text has them."""
    head = head_of(target, checkpoints / dialect)
    drafter = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, top_k=3)
    cache = drafter._scorer._cache
    with build_engine(target, drafter, budget=6, max_prefill_tokens=16) as engine:
        state = engine.submit(Request("r", PROMPTS[2], SamplingParams(max_new_tokens=40)))
        for _ in range(14):
            engine.step()
        num_read = cache.num_read("r")
        assert num_read > len(PROMPTS[2]) + 8
        text = torch.from_numpy(state.token_ids[: num_read + 1].astype(np.int64))
        with torch.no_grad():
            hidden = target(text[None], output_hidden_states=True).hidden_states
            states = torch.cat([hidden[layer][0, :num_read] for layer in head.config.hidden_layers], -1)
            keys, values = head.context(head.fuse(states), torch.arange(num_read))
        for group in cache.pool.groups.values():
            table = group.tables["r"]
            assert len(table) == table.num_cached == num_read - table.first
            slots = table.slots[: len(table)].astype(np.int64)
            for layer in group.keys:
                assert torch.allclose(group.keys[layer][slots], keys[layer][table.first :], atol=1e-5)
                assert torch.allclose(group.values[layer][slots], values[layer][table.first :], atol=1e-5)


def test_preempted_requests_and_a_full_cache_keep_the_text(target: Any, checkpoints: Path) -> None:
    def texts(drafter: str, **options: Any) -> list[list[int]]:
        requests = [Request(f"r{i}", p, SamplingParams(max_new_tokens=30)) for i, p in enumerate(PROMPTS)]
        with build_engine(target, drafter, budget=6, **options) as engine:
            last = {output.request_id: output.state for output in engine.generate(requests)}
        assert (sum(state.num_preemptions for state in last.values()) > 0) == bool(options)
        return [last[request.request_id].output_ids.tolist() for request in requests]

    plain = texts("none")
    name = f"diffusion:{checkpoints / 'deepspec-dspark'}?probe=0"
    assert texts(name, kv_tokens=64) == plain
    assert texts(f"{name}&kv_tokens=40", kv_tokens=64) == plain


def test_a_head_that_knows_the_target_is_accepted(target: Any, checkpoints: Path) -> None:
    """A Markov head alone can hold a target whose next token depends on the last one only."""
    model = eagle_target()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        every = torch.arange(VOCAB_SIZE)
        laws = model(every[:, None]).logits[:, 0]  # [V, V]
    head = head_of(model, checkpoints / "deepspec-dspark")
    head.weights["markov_head.markov_w1.weight"] = torch.eye(VOCAB_SIZE)
    head.weights["markov_head.markov_w2.weight"] = laws.T.contiguous()
    head.weights["lm_head.weight"].zero_()
    head.weights["confidence_head.proj.weight"] = torch.zeros(1, head.config.hidden_size + VOCAB_SIZE)
    for law in ({"temperature": 0.0}, {"temperature": 1.0}):
        states, _ = run(model, DiffusionDrafter(head, vocab_size=VOCAB_SIZE), PROMPTS, 26, **law)
        for state in states:
            assert state.num_accepted == state.num_drafted > 0
            assert state.num_output_tokens / state.num_steps > 4


@pytest.mark.parametrize("verifier", ["chain", "block", "specinfer", "traversal"])
def test_honest_chains_state_the_laws_that_they_were_drawn_from(target: Any, checkpoints: Path, verifier: str) -> None:
    name = f"diffusion:{checkpoints / 'deepspec-gated'}?probe=0"
    states, watch = run(target, name, PROMPTS, 12, verifier=verifier, temperature=0.9)
    assert all(state.num_drafted > 0 for state in states)
    for text, tree in watch.seen:
        if len(tree) == 1:
            continue
        path = tree.token_ids[1:].tolist()
        reference = Reference("deepspec-gated", checkpoints / "deepspec-gated", target, text)
        laws = (reference.laws(path[:-1])[0] / 0.9).softmax(-1)
        assert torch.allclose(tree.draft_probs[:-1].float(), laws, atol=1e-5)


def test_what_cannot_be_judged_or_makes_no_sense_is_refused(target: Any, checkpoints: Path) -> None:
    name = f"diffusion:{checkpoints / 'zlab'}?probe=0"
    with pytest.raises(UnsupportedError, match="they need the match rule"):
        build_engine(target, f"{name}&top_k=2", verifier="traversal")
    for option, message in (("top_k=0", "top_k must be >= 1"), ("length=-1", "length must be >= 0")):
        with pytest.raises(ConfigError, match=message):
            build_engine(target, f"{name}&{option}")
