"""Capture: what is kept of requests, what never is, and that serving never waits for it."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import ConfigError
from specdec.online_training.capture import CaptureOptions, TraceCapture
from specdec.online_training.privacy import OPT_OUT_HEADER, Consent, KeyedHash, Redactor
from specdec.online_training.spool import Spool
from specdec.online_training.trace_queue import QueueLimits
from tests.online_training.traces import HASHES, ListSink, requests, serve

EVERYBODY = Consent(frozenset({"t", "u"}))


def capture_to(sink: Any, consent: Consent = EVERYBODY, **more: Any) -> TraceCapture:
    return TraceCapture(sink, consent=consent, hashes=HASHES, target="f" * 32, **more)


def test_a_record_tells_the_whole_story_of_a_request() -> None:
    sink = ListSink()
    capture = capture_to(sink, drafter_of=lambda _: ("random", 7))
    states = serve(requests(5, num_new=30), [capture])
    capture.close()
    assert capture.counts == {"queued": 5, "written": 5}
    by_prompt = {record.prompt_hash: record for record in sink.records}
    for state in states:
        record = by_prompt[HASHES.ids(state.request.prompt_ids)]
        assert record.token_ids.tolist() == state.token_ids.tolist()
        assert record.drafter == "random"
        assert set(record.rounds.versions.tolist()) == {7}
        assert record.tenant == HASHES.text("t")
        assert record.rounds.num_drafted.sum() == state.num_drafted == len(record.rounds.draft_ids)
        assert record.rounds.num_accepted.sum() == state.num_accepted
        start = 0
        for position, drafted, accepted in zip(
            record.rounds.positions, record.rounds.num_drafted, record.rounds.num_accepted, strict=True
        ):
            ids, parents = (getattr(record.rounds, n)[start : start + drafted] for n in ("draft_ids", "draft_parents"))
            start += drafted
            node = 0
            for depth in range(accepted):  # the accepted path is in the tree, and in the text
                wanted = record.token_ids[position + depth]
                node = 1 + next(i for i in range(drafted) if ids[i] == wanted and parents[i] == node)
            if position + accepted < len(record.token_ids):
                after = record.token_ids[position + accepted]
                assert not any(ids[i] == after and parents[i] == node for i in range(drafted))


@settings(max_examples=25)
@given(
    asks=st.lists(st.tuples(st.sampled_from(["t", "u", "v", "t/x", "v/t"]), st.booleans()), min_size=1, max_size=6),
    opted_in=st.sets(st.sampled_from(["t", "u", "v"])),
)
def test_refused_requests_never_reach_the_disk(
    tmp_path_factory: pytest.TempPathFactory, asks: list[tuple[str, bool]], opted_in: set[str]
) -> None:
    root = tmp_path_factory.mktemp("refused")
    spool = Spool(root)
    refused: set[str] = set()
    capture = capture_to(spool, Consent(frozenset(opted_in)), opts_out=refused.__contains__)
    marked = []
    for index, (tenant, opts_out) in enumerate(asks):
        request = requests(index + 1, tenant=tenant)[index]
        marked.append((request, opts_out or tenant.split("/")[0] not in opted_in))
        if opts_out:
            refused.add(request.request_id)
    serve([request for request, _ in marked], [capture])
    capture.close()
    lease = spool.lease("w")
    kept = [record.prompt_hash for record in lease.records] if lease else []
    allowed = [HASHES.ids(request.prompt_ids) for request, is_refused in marked if not is_refused]
    assert sorted(kept) == sorted(allowed)
    if not allowed:
        assert not [path for path in root.rglob("*") if path.is_file()]  # not even a file that was deleted again


def test_only_a_header_that_says_so_opts_out() -> None:
    assert Consent.opts_out({OPT_OUT_HEADER: "1"})
    assert Consent.opts_out({OPT_OUT_HEADER: ""})
    assert not Consent.opts_out({OPT_OUT_HEADER: "0"})
    assert not Consent.opts_out({})
    assert not Consent().allows("anonymous")


def test_a_slow_sink_never_delays_a_step() -> None:
    """The sink hangs during the whole run; steps take as long as without a capture, and memory is bounded."""
    sink = ListSink()
    sink.gate.clear()
    capture = capture_to(sink, options=CaptureOptions(shard_s=0.001, queue=QueueLimits(max_records=4)))
    serve(requests(1, tenant="u"), [capture])
    end = monotonic() + 60
    while not sink.num_calls and monotonic() < end:
        sleep(0.01)
    assert sink.num_calls == 1  # its thread hangs in the sink from here on
    slowest: list[float] = []

    class Timed:
        def observe(self, events: Any) -> None:
            start = monotonic()
            capture.observe(events)
            slowest.append(monotonic() - start)

    serve(requests(40, num_new=40), [Timed()])
    serve(requests(1, tenant="v"), [Timed()])  # one more step, so that the last ones are swept
    assert len(capture.queue) <= 4
    assert max(slowest) < 30  # seconds: the sink hangs for good
    assert capture.counts["sampled out"] + capture.counts["queue full"] >= 35
    assert capture.counts["queued"] + capture.counts["sampled out"] + capture.counts["queue full"] == 41
    sink.gate.set()
    capture.close()
    assert len(sink.records) == capture.counts["written"] == capture.counts["queued"]
    assert all(0 < record.inclusion <= 1 for record in sink.records)
    assert any(record.inclusion < 1 for record in sink.records)


def test_a_failing_sink_is_left_alone_for_a_while() -> None:
    sink = ListSink()
    sink.error = OSError("no space")
    capture = capture_to(sink, options=CaptureOptions(pause_s=30.0, shard_bytes=1))
    serve(requests(8), [capture])
    assert capture.flush()
    assert sink.num_calls == 3
    assert capture.counts["sink failed"] == 8
    sink.error = None
    capture.close()
    assert sink.records == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("write to jane.doe@example.org", "email"),
        ("call +49 89 1234567 now", "phone"),
        ("call (415) 555-0199 now", "phone"),
        ("card 4111 1111 1111 1111 ok", "card"),
        ("token ghp_" + "a" * 36, "key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "key"),
        ("project zebra", "custom 0"),
        ("card 4111 1111 1111 1112", None),
        ("x = 1234567890123 + y[3]; see a@b", None),
        ("version 1.2.3.4, 2024-05-06 07:08:09", None),
    ],
)
def test_text_that_must_not_be_kept_is_found(text: str, rule: str | None) -> None:
    assert Redactor([r"\bzebra\b"]).hit(text) == rule


def test_a_hit_drops_the_record_whole() -> None:
    sink = ListSink()

    def decode(ids: Any) -> str:
        return "mail a.b@example.org" if ids[2] == 3 else "nothing to see"

    capture = capture_to(sink, redactor=Redactor(), decode=decode)
    serve(requests(5), [capture])
    capture.close()
    assert capture.counts["redacted"] == 1
    assert len(sink.records) == 4
    assert all(record.token_ids[2] != 3 for record in sink.records)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="capture mode must be tokens, features or"):
        CaptureOptions(mode="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shard_s must be > 0, got 0"):
        CaptureOptions(shard_s=0)
    with pytest.raises(ConfigError, match="decode must be given"):
        capture_to(ListSink(), redactor=Redactor())
    with pytest.raises(ConfigError, match="regular expression, got '\\('"):
        Redactor(["("])
    with pytest.raises(ConfigError, match="must have 32 bytes, got 3"):
        KeyedHash(b"abc")


def test_keyed_hashes_last_and_depend_on_the_key(tmp_path: Any) -> None:
    first, again = KeyedHash.of_file(tmp_path / "key"), KeyedHash.of_file(tmp_path / "key")
    other = KeyedHash.of_file(tmp_path / "other")
    ids = np.array([1, 2], dtype=np.int32)
    assert first.text("a") == again.text("a") != other.text("a")
    assert first.ids(ids) == again.ids(ids) != other.ids(ids)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 2
