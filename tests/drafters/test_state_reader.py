"""The target's states reach a head in order and once, whatever a preemption shows again or leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.growing import Growth
from specdec.drafters.state_reader import PIECE, StateReader
from specdec.readings import HiddenStates
from specdec.types import Request, RequestState, SamplingParams


class CountingCache:
    """Has room for everything."""

    def __init__(self) -> None:
        self.num = 0

    def num_read(self, request_id: str) -> int:
        return self.num

    def reserve(self, growths: Sequence[Growth]) -> bool:
        return True

    def keep(self, counts: Mapping[str, int]) -> None:
        self.num += sum(counts.values())

    def release(self, request_ids: Sequence[str]) -> None:
        self.num = 0


class Shown:
    """A text of some tokens; the state at token t is t itself."""

    def __init__(self, num_tokens: int) -> None:
        self.reader = StateReader(CountingCache(), (1,))  # type: ignore[arg-type]
        self.state = RequestState(Request("r", np.arange(num_tokens, dtype=np.int32), SamplingParams()))
        self.read_states: list[float] = []

    def show(self, start: int, end: int) -> bool:
        """The target caches tokens up to ``end`` and shows the states from ``start`` on; can the head guess now?"""
        both = torch.arange(start, end, dtype=torch.float32)[:, None].repeat(1, 2) + torch.tensor([100.0, 0.0])
        self.state.hidden, self.state.num_cached = HiddenStates((0, 1), both), end
        return self.reader.take([self.state]) == [0]

    def read(self) -> None:
        def rows(growths: Sequence[Growth], states: Tensor) -> Tensor:
            ids = np.concatenate([growth.token_ids for growth in growths])
            assert ids.tolist() == (states[:, 0] + 1).tolist()  # the token of a row is the one after its state
            self.read_states += states[:, 0].tolist()
            return states

        assert self.reader.read([self.state], rows).keys() == {0}


def test_pieces_of_many_steps_are_read_in_order() -> None:
    text = Shown(PIECE + 20)
    assert not text.show(0, 7)
    assert not text.show(7, 8)
    assert text.show(8, PIECE + 19)
    text.read()
    assert text.read_states == list(range(PIECE + 19))


def test_states_that_are_shown_again_are_read_once() -> None:
    text = Shown(12)
    assert not text.show(0, 5)
    assert not text.show(0, 4)  # after a preemption, in other pieces
    assert not text.show(4, 9)
    assert text.show(9, 11)
    text.read()
    assert text.read_states == list(range(11))
    text.state.append([12])
    assert not text.show(0, 11)  # again after they were read
    assert text.show(9, 12)
    text.read()
    assert text.read_states == list(range(12))


def test_a_text_with_a_gap_is_begun_anew() -> None:
    text = Shown(12)
    assert not text.show(0, 5)
    assert not text.show(6, 11)
    assert text.show(0, 11)
    text.read()
    assert text.read_states == list(range(11))
