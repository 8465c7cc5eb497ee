from __future__ import annotations

import pytest
import torch

from specdec.bench.tiny_loops import Lesson, _surplus, loop_loss, repeats

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], [False] * 7 + [True]),
        ([7] * 6, [False] * 4 + [True] * 2),
        ([1, 2, 3], [False] * 3),
        ([], []),
    ],
)
def test_repeats_marks_the_token_that_completes_a_seen_4gram(ids, expected):
    assert repeats(ids) == expected


def lesson(ids, repeated):
    return Lesson(torch.tensor(ids), torch.ones(1, len(ids[0])), torch.tensor(repeated), len(ids[0]) - 1)


def test_an_answer_may_repeat_what_its_reference_repeats():
    line = [1, 2, 3, 4]
    assert _surplus(line * 3, line * 3) == [False] * 12
    assert _surplus(line * 3, line) == [False] * 7 + [True] * 5
    assert _surplus([9, 8, 7, 6, 5], line) == [False] * 5


def test_descending_the_loss_lowers_the_repeated_token_only():
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    loss = loop_loss(logits, lesson([[0, 1, 2]], [[0.0, 0.0, 1.0]]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() > 0
    assert grad[0, 1, 2] > 0
    assert (grad[0, 1, [0, 1, 3, 4]] < 0).all()
    assert grad[0, 0].abs().sum() == grad[0, 2].abs().sum() == 0


def test_no_repeats_no_loss():
    assert loop_loss(torch.randn(1, 4, 5), lesson([[0, 1, 2, 3]], [[0.0] * 4])).item() == 0.0


def test_a_certain_repeat_has_a_finite_loss():
    logits = torch.full((1, 2, 3), -1e4)
    logits[0, 0, 1] = 1e4
    assert loop_loss(logits, lesson([[0, 1]], [[0.0, 1.0]])).isfinite()
