"""Drafters on the Triton kernels, interpreted: the drafts of torch's operations, eagerly and in padded buckets.

A captured graph is stood in for by a function that launches anew on the same buffers and spoils what was handed out
before, by any bucket, for graphs share their memory: whoever keeps such outputs over a later forward gets rubbish.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters import levels, state_reader
from specdec.drafters.diffusion import DiffusionDrafter
from specdec.drafters.diffusion_files import read_diffusion_files
from specdec.drafters.diffusion_loading import build_diffusion_head
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_probe import build_head
from specdec.drafters.lm import LmDrafter
from specdec.errors import InternalError
from specdec.kernel_runner import Captured, KernelRunner
from specdec.step_buffers import Step
from tests.drafters import diffusion_checkpoints, eagle_checkpoints
from tests.drafters.drafting import run
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target
from tests.tiny_models import tiny_llama

PROMPTS = [np.random.default_rng(11).integers(0, 250, size).astype(np.int32) for size in (7, 2)]


def capture(runner: KernelRunner | None) -> KernelRunner:
    assert runner is not None
    handed_out: list[torch.Tensor] = []

    def like_a_graph(launch: Any) -> Captured:
        def replay() -> Any:
            outputs = launch()
            for old in handed_out:
                old.fill_(-1)
            handed_out[:] = [part for part in outputs if part is not None]
            return outputs

        return Captured(replay, 0)

    with torch.inference_mode():
        runner.capture(like_a_graph)
    return runner


def eagle(target: Any, path: Any, **options: Any) -> tuple[EagleDrafter, Any]:
    eagle_checkpoints.write("specforge", path)
    files = read_files(path)
    head = build_head(files, target, files.head_config(target.config))
    drafter = EagleDrafter(head, vocab_size=VOCAB_SIZE, top_k=2, depth=3, kv_tokens=200, max_requests=2, **options)
    return drafter, drafter._runner


def diffusion(target: Any, path: Any, **options: Any) -> tuple[DiffusionDrafter, Any]:
    dialect = next(iter(diffusion_checkpoints.DIALECTS))
    diffusion_checkpoints.write(dialect, path)
    files = read_diffusion_files(path)
    head = build_diffusion_head(files, target, files.head_config(target.config))
    drafter = DiffusionDrafter(head, vocab_size=VOCAB_SIZE, kv_tokens=200, max_requests=2, **options)
    return drafter, drafter._scorer._runner


def draft_model(target: Any, path: Any, **options: Any) -> tuple[LmDrafter, Any]:
    model = DraftModel(tiny_llama(), kv_tokens=200, max_length=100, max_requests=2, self_test=False, **options)
    drafter = LmDrafter(model, vocab_size=VOCAB_SIZE, depth=3, min_gain=0.0)
    return drafter, model._target.runner


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (eagle, {}), (diffusion, {}), pytest.param(eagle, {"temperature": 0.8}, marks=pytest.mark.slow),
        pytest.param(draft_model, {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_kernels_draft_what_torch_drafts_also_in_padded_buckets(make, law, tmp_path):
    target = eagle_target()
    drafter, runner = make(target, tmp_path, kernels="torch")
    assert runner is None
    num_new = 3 if make is draft_model else 5  # the interpreter takes its time with a whole model
    wanted, watch = run(target, drafter, PROMPTS, num_new, **law)
    drafter, runner = make(target, tmp_path, kernels="triton")
    capture(runner)
    found, seen = run(target, drafter, PROMPTS, num_new, **law)
    assert [state.output_ids.tolist() for state in found] == [state.output_ids.tolist() for state in wanted]
    for (text, tree), (other_text, other) in zip(seen.seen, watch.seen, strict=True):
        assert text == other_text
        assert tree.token_ids.tolist() == other.token_ids.tolist()
        assert tree.parents.tolist() == other.parents.tolist()
    assert max(len(tree) for _, tree in seen.seen) > 2
    assert runner.num_replays > 0
    assert runner.num_eager == 0


def test_a_captured_pass_of_a_head_finds_the_likeliest_words_itself(tmp_path, monkeypatch):
    """All that is left to the host is one copy: greedy drafting never looks at the logits.

    Read in short pieces, a prompt is done while another still overwrites the pass's outputs.
    """
    monkeypatch.setattr(state_reader, "PIECE", 3)
    target = eagle_target()
    _, watch = run(target, eagle(target, tmp_path, kernels="torch")[0], PROMPTS, 4)
    wanted = [tree.token_ids.tolist() for _, tree in watch.seen]
    drafter, runner = eagle(target, tmp_path, kernels="triton")
    capture(runner)
    monkeypatch.setattr(levels, "_largest", lambda *_: pytest.fail("looked for among the logits"))
    _, watch = run(target, drafter, PROMPTS, 4)
    assert [tree.token_ids.tolist() for _, tree in watch.seen] == wanted
    assert max(map(len, wanted)) > 2


def test_states_without_buffers_for_them_are_refused(tmp_path):
    _, runner = eagle(eagle_target(), tmp_path, kernels="triton", graphs=False)
    empty = np.empty(0, dtype=np.int64)
    buffers = runner._buffers(runner._bucket_sizes(2, 1, 0))
    with pytest.raises(InternalError, match="states must come with buffers"):
        buffers.put(Step([], empty, empty, empty), (empty, empty.astype(np.int32)))
