"""Streams at a steady pace: in virtual time nothing tells what was foreseen; over HTTP no byte changes."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest
from typer.testing import CliRunner

from specdec.cli import app as command
from specdec.errors import ConfigError
from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.pace import Pace, PaceOptions
from specdec.server.sidecar.service import SpeedOptions
from specdec.server.sidecar.splice import Guess, Splicer, StreamBroken
from tests.server.sidecar.recital import ANSWER, Reciter, Words, accelerated, asking, both, counts
from tests.server.sidecar.rig import exchange, request, until
from tests.server.sidecar.test_rounds import Scorer
from tests.server.sidecar.test_saturation import VirtualLoop

STEP_S, LENGTH = 0.02, 60


def pace(tick_s, num_tokens=1):
    metrics = SidecarMetrics()
    return Pace(PaceOptions(tick_s, num_tokens), metrics.releases, metrics.starved)


class Steps:
    """A stream of one token per step, each of another size; then an event without tokens, as ``[DONE]`` is."""

    def __init__(self, at=0):
        self.at = at

    async def next(self):
        self.at += 1
        if self.at > LENGTH + 1:
            return None
        if self.at == LENGTH + 1:
            return Piece(raw=b"[DONE]")
        await asyncio.sleep(STEP_S)
        raw = b"<%d>" % self.at + b"." * (self.at % 7)
        return Piece(raw, (self.at,), "x", "length" if self.at == LENGTH else None)

    async def close(self):
        pass

    async def open(self, output_ids):
        return Steps(len(output_ids))


class Foreseeing:
    """Drafts the text wherever it is told to, rightly or wrongly, and counts what is adopted."""

    def __init__(self, places, offsets=(8, 16), *, is_right=True):
        self.places, self.offsets, self.shift = set(places), offsets, 0 if is_right else 500
        self.num_output = self.num_adopted = 0

    def extend(self, token_ids):
        self.num_output += len(token_ids)

    def guess(self):
        if self.num_output not in self.places:
            return Guess()
        first = self.num_output + 1
        return Guess(tuple(range(first + self.shift, first + self.shift + self.offsets[-1])), self.offsets)

    def ended(self, result, *, num_ready, num_wasted):
        self.num_adopted += result == "adopted"


def released(guesser, shaped):
    """(time, bytes) of each release of one stream, in virtual time."""

    async def main():
        loop, base = asyncio.get_running_loop(), Steps()

        async def events():
            async with aclosing(Splicer(base, base, guesser, split=lambda *_: None).pieces()) as pieces:
                async for spliced in pieces:
                    yield spliced.piece.raw, len(spliced.piece.token_ids)

        async def alone():
            async for data, _ in events():
                yield data

        stream = shaped.paced(events()) if shaped is not None else alone()
        return [(round(loop.time(), 6), data) async for data in stream]

    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


CASES = [
    ((), True), ((1,), True), ((3, 30), True), ((1, 18, 35), True), ((5, 14, 40), False),
]  # fmt: skip


@pytest.mark.parametrize(("tick_s", "num_tokens"), [(0.025, 1), (0.07, 3), (0.2, 7)])
def test_what_was_foreseen_shows_in_no_time_and_no_size(tick_s, num_tokens):
    shaped, bare, adopted = [], [], []
    for places, is_right in CASES:
        guesser = Foreseeing(places, is_right=is_right)
        shaped.append(released(guesser, pace(tick_s, num_tokens)))
        adopted.append(guesser.num_adopted)
        bare.append(released(Foreseeing(places, is_right=is_right), None))
    assert all(one == shaped[0] for one in shaped)
    # Without shaping the same streams differ wherever something was adopted: what is hidden above was there.
    assert adopted[0] == adopted[4] == 0
    assert min(adopted[1:4]) > 0
    assert [one == bare[0] for one in bare] == [True, False, False, False, True]
    assert b"".join(data for _, data in shaped[0]) == b"".join(data for _, data in bare[0])


def test_every_release_is_on_a_tick_and_of_one_size():
    first, *others = released(Foreseeing((1, 18)), pace(0.05, 2))
    assert [round((at - first[0]) / 0.05, 6) for at, _ in others] == list(range(1, len(others) + 1))
    assert [data.count(b"<") for _, data in (first, *others)] == [1, *[2] * 29, 1]
    assert others[-1][1].endswith(b"[DONE]")


def test_a_tick_for_which_too_few_are_there_passes_unused():
    first, *others = released(Foreseeing(()), pace(0.05, 3))  # two or three come in that time
    assert [data.count(b"<") for _, data in others] == [*[3] * 19, 2]
    assert all(round((at - first[0]) / 0.05, 6).is_integer() for at, _ in others)


def test_a_pace_above_the_plain_streams_shows_as_ticks_that_are_counted():
    plain, ahead = pace(0.012), pace(0.012)
    times = [[at for at, _ in released(guesser, shaped)] for guesser, shaped in
             ((Foreseeing(()), plain), (Foreseeing((1, 18)), ahead))]  # fmt: skip
    assert times[1][-1] < times[0][-1]  # it pays, and it can be seen
    assert plain.table()["starved_ticks"] > ahead.table()["starved_ticks"] > 0
    assert plain.starved.collect()[0].samples[0].value == plain.num_starved
    assert plain.table()["releases"] == LENGTH


def run(main):
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def test_a_stream_that_breaks_says_so_behind_all_that_it_brought():
    async def main():
        async def events():
            for at in range(9):
                yield b"%d" % at, 1
            raise StreamBroken("broke")

        try:
            async for data in pace(0.01, 4).paced(events()):
                got.append(data)
        except StreamBroken:
            got.append("broken")

    got: list[object] = []
    run(main())
    assert got == [b"0", b"1234", b"5678", "broken"]


@pytest.mark.parametrize("text", [[], [(b": hi", 0)], [(b": hi", 0), (b"a", 1)], [(b"", 1), (b"a", 1), (b"z", 0)]])
def test_short_streams_arrive_whole(text):
    async def main():
        async def events():
            for event in text:
                yield event

        return [data async for data in pace(0.01).paced(events())]

    assert b"".join(run(main())) == b"".join(data for data, _ in text)


def test_a_client_that_does_not_read_is_not_read_ahead_of_for_ever_and_gets_no_burst():
    async def main():
        loop, num_read, is_closed = asyncio.get_running_loop(), 0, False

        async def events():
            nonlocal num_read, is_closed
            try:
                while True:
                    num_read += 1
                    yield b"x", 1
            finally:
                is_closed = True

        times = []
        async with aclosing(pace(0.01).paced(events())) as releases:
            async for _ in releases:
                times.append(loop.time())
                if len(times) == 3:
                    await asyncio.sleep(5.003)
                if len(times) == 6:
                    break
        return times, num_read, is_closed

    times, num_read, is_closed = run(main())
    assert [round(after - before, 6) for before, after in zip(times, times[1:], strict=False)] == [
        0.01, 0.01, 5.01, 0.01, 0.01]  # fmt: skip
    assert num_read < 1100
    assert is_closed


SHAPE = {"pace": PaceOptions(0.001, 4)}


@pytest.mark.parametrize("mode", ["race", "grid", "rounds"])
def test_an_accelerated_stream_has_the_plain_streams_bytes(mode):
    plain, got, sidecar, _ = accelerated(
        Scorer(),
        both(asking(stream_options={"include_usage": True})),
        mode=mode,
        known=ANSWER,
        tokenizer=Words(),
        **SHAPE,
    )
    assert (got.body, got.is_whole) == (plain.body, True)
    assert counts(sidecar).get("adopted", 0) >= 1, sidecar.health()


def test_health_and_metrics_tell_of_it():
    async def ask(url, up, sidecar):
        await exchange(url, asking())
        health = json.loads((await exchange(url, request(method="GET", target="/health"))).body)
        return health, (await exchange(url, request(method="GET", target="/metrics"))).body

    health, metrics = accelerated(Reciter(), ask, **SHAPE)
    shape = health["speed"]["shape"]
    assert (shape["tick_ms"], shape["tokens"]) == (1.0, 4)
    assert shape["releases"] >= len(ANSWER) // 4
    assert b"sidecar_shape_releases_total %d" % shape["releases"] in metrics
    assert b"sidecar_shape_starved_ticks_total" in metrics
    health, _ = accelerated(Reciter(), ask)
    assert health["speed"]["shape"] == "off"


def test_a_client_that_leaves_takes_the_upstreams_requests_with_it():
    async def ask(url, up, sidecar):
        got = await exchange(url, asking(), stop_after=200)
        await until(lambda: up.alive == 0)
        return got, sidecar

    slow = {"pace": PaceOptions(0.05, 1)}
    got, sidecar = accelerated(Reciter(lag=50), ask, known=ANSWER, **slow)
    assert not got.is_whole
    assert sidecar.num_in_flight == 0


def test_events_of_several_tokens_are_not_accelerated():
    plain, got, sidecar, _ = accelerated(Reciter(joins=2), both(asking()), known=ANSWER, **SHAPE)
    assert got.body == plain.body
    assert counts(sidecar) == {}
    _, _, sidecar, _ = accelerated(Reciter(joins=2), both(asking()), known=ANSWER)
    assert counts(sidecar) != {}


def test_answers_that_are_not_streamed_are_not_accelerated():
    plain, got, sidecar, _ = accelerated(Reciter(), both(asking(stream=False)), known=ANSWER, **SHAPE)
    assert got.body == plain.body
    assert counts(sidecar) == {}
    assert sidecar.speed.refused == {"an answer that is not streamed cannot be shaped": 1}


def test_what_cannot_be_shaped_is_refused():
    for mode in ("off", "observe", "feed"):
        with pytest.raises(ConfigError, match=f"mode {mode} has no such streams"):
            SpeedOptions(mode=mode, pace=PaceOptions(0.02))
    with pytest.raises(ConfigError, match="exact-repeat cache"):
        SpeedOptions(mode="race", pace=PaceOptions(0.02), cache_ttl_s=5.0)
    with pytest.raises(ConfigError, match=r"1 to 10000 ms, got 0.5 ms"):
        PaceOptions(0.0005)
    with pytest.raises(ConfigError, match="1 to 256 tokens per release, got 0"):
        PaceOptions(0.02, 0)
    for words, said in ((["--shape-tokens", "2"], "needs --shape-ms"), (["--shape-ms", "20"], "mode observe")):
        got = CliRunner().invoke(command, ["sidecar", "--upstream", "http://127.0.0.1:9", *words])
        assert got.exit_code != 0
        assert said in got.output + str(got.exception)
