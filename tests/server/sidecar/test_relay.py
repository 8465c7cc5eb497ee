"""The relay: what goes in comes out, byte for byte, and what breaks breaks visibly."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import ConfigError
from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.breaker import CircuitBreaker
from specdec.server.sidecar.options import RelayOptions, Timeouts, upstream_base
from tests.server.sidecar.rig import chunked, exchange, free_port, front, piece, request, sse, until, upstream

STREAM = ("Content-Type: text/event-stream", "X-Own: é", "Set-Cookie: a=1", "Set-Cookie: b=2", "Connection: X-Hop",
          "X-Hop: 1")  # fmt: skip
EVENTS = [
    b": keep-alive\n\n", sse({"choices": [{"text": "naïve 🦎"}]}), sse({"choices": [{"delta": {"tool_calls": [1]}}]}),
    sse("[DONE]"),
]  # fmt: skip


def run(script, ask, **options):
    """What ``ask(url, upstream, sidecar)`` returns with a scripted upstream behind a sidecar."""

    async def main():
        async with upstream(script) as up:
            sidecar = Sidecar(RelayOptions(up.url, **options))
            async with front(sidecar) as url:
                return await ask(url, up, sidecar)

    return asyncio.run(main())


def one(raw, **more):
    async def ask(url, up, sidecar):
        return await exchange(url, raw, **more), up, sidecar

    return ask


def answering(*parts, status="200 OK", headers=STREAM, end=b"0\r\n\r\n", pause=0.0):
    async def script(asked, writer):
        writer.write(chunked(status, *headers))
        for part in parts:
            writer.write(piece(part))
            await writer.drain()
            await asyncio.sleep(pause)
        writer.write(end)

    return script


async def plain(asked, writer):
    body = json.dumps({"method": asked.method, "target": asked.target}).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + (body if asked.method != "HEAD" else b"")
    )


def test_a_stream_is_relayed_byte_for_byte_with_its_headers():
    raw = b'{"prompt" : "x",  "stream":true, "unknown": [1, 2.50]}'
    got, up, _ = run(answering(*EVENTS), one(request(raw, headers=("Authorization: Bearer k", "X-Spec: off", "A: b"))))
    assert (got.status, got.body, got.is_whole) == (200, b"".join(EVENTS), True)
    sent = [pair for pair in got.headers if pair[0] in ("X-Own", "Set-Cookie", "Content-Type")]
    assert sorted(sent) == sorted(tuple(line.split(": ")) for line in STREAM[:4])
    assert "X-Hop" not in dict(got.headers)
    (asked,) = up.asked
    assert asked.body == raw
    names = {name.lower(): value for name, value in asked.headers}
    assert names["authorization"] == "Bearer k"
    assert names["a"] == "b"
    assert names["host"] == f"127.0.0.1:{up.port}"
    assert not {"x-spec", "user-agent", "accept", "accept-encoding", "content-type"} & set(names)


@settings(max_examples=15)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_any_bytes_in_any_pieces_arrive_as_they_were(parts):
    got, *_ = run(answering(*parts, headers=()), one(request({"prompt": "x"})))
    assert (got.body, got.is_whole) == (b"".join(parts), True)


def test_events_cut_within_a_character_are_relayed_as_they_come():
    data = EVENTS[1]
    at = data.index("🦎".encode().split(b"\\")[0]) if b"\xf0" in data else len(data) // 2
    got, *_ = run(answering(data[:at], data[at:], EVENTS[3]), one(request({})))
    assert got.body == data + EVENTS[3]


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v1/models?x=%2F%20"), ("DELETE", "/v1/files/a%20b"), ("PUT", "/any//thing"), ("HEAD", "/v1/models"),
     ("OPTIONS", "/v1/completions")],
)  # fmt: skip
def test_unknown_routes_and_methods_pass(method, target):
    got, up, _ = run(plain, one(request(method=method, target=target)))
    assert got.status == 200
    assert (up.asked[0].method, up.asked[0].target) == (method, target)
    if method != "HEAD":
        assert json.loads(got.body) == {"method": method, "target": target}


def test_compressed_bodies_pass_unread_both_ways():
    packed = gzip.compress(b"{}" * 100)
    script = answering(packed, headers=("Content-Encoding: gzip",))
    got, up, _ = run(script, one(request(packed, headers=("Content-Encoding: gzip",))))
    assert got.body == packed
    assert up.asked[0].body == packed
    assert ("Content-Encoding", "gzip") in got.headers


def test_a_stream_without_done_ends_as_it_ended_and_one_that_breaks_breaks():
    got, *_ = run(answering(EVENTS[1]), one(request({})))
    assert (got.body, got.is_whole) == (EVENTS[1], True)
    got, *_ = run(answering(EVENTS[1], end=b""), one(request({})), timeouts=Timeouts(idle_s=0.3))
    assert (got.body, got.is_whole) == (EVENTS[1], False)  # silence

    async def reset(asked, writer):
        writer.write(chunked() + piece(EVENTS[1]))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    got, *_ = run(reset, one(request({})))
    assert (got.body, got.is_whole) == (EVENTS[1], False)

    async def short(asked, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await writer.drain()
        writer.close()

    assert not run(short, one(request({})))[0].is_whole


def test_a_request_that_takes_too_long_is_cut_or_refused():
    slow = answering(b"x", b"y", pause=60)
    got, *_ = run(slow, one(request({})), timeouts=Timeouts(total_s=1.0))
    assert not got.is_whole

    async def silent(asked, writer):
        await asyncio.sleep(60)

    got, up, _ = run(silent, one(request({})), timeouts=Timeouts(first_byte_s=0.2))
    assert got.status == 504
    assert len(up.asked) == 1  # no retry: it may be at work


def busy_then(status, *extra, times=1, retry_after=""):
    count = {"n": 0}

    async def script(asked, writer):
        count["n"] += 1
        if count["n"] <= times:
            line = f"Retry-After: {retry_after}\r\n" if retry_after else ""
            writer.write(f"HTTP/1.1 {status} No\r\n{line}Content-Length: 4\r\n\r\nbusy".encode())
        else:
            await answering(*EVENTS)(asked, writer)

    return script


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_upstream_is_asked_again_before_the_first_byte_only(status):
    got, up, sidecar = run(busy_then(status), one(request({"prompt": "x"})))
    assert (got.status, len(up.asked), sidecar.upstream.num_retries) == (200, 2, 1)
    got, up, _ = run(busy_then(status, times=2), one(request({"prompt": "x"})))
    assert (got.status, got.body, len(up.asked)) == (status, b"busy", 2)  # its own words
    for body in ({"prompt": "x", "store": True}, b"not json"):
        got, up, _ = run(busy_then(status), one(request(body)))
        assert (got.status, len(up.asked)) == (status, 1)
    got, up, _ = run(busy_then(status), one(request({}, target="/v1/responses")))  # stored unless it says otherwise
    assert (got.status, len(up.asked)) == (status, 1)


def test_a_pause_is_kept_if_it_is_short():
    got, up, _ = run(busy_then(429, retry_after="0.2"), one(request({})))
    assert (got.status, len(up.asked)) == (200, 2)
    for long in ("60", "Fri, 31 Dec 1999 23:59:59 GMT"):
        got, up, _ = run(busy_then(429, retry_after=long), one(request({})))
        assert (got.status, len(up.asked)) == (429, 1)
        assert ("Retry-After", long) in got.headers


def test_errors_and_redirects_are_the_upstreams_own():
    for status in (400, 401, 404, 418, 500):
        got, up, _ = run(busy_then(status, times=9), one(request({})))
        assert (got.status, got.body, len(up.asked)) == (status, b"busy", 1)

    async def away(asked, writer):
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n")

    got, up, _ = run(away, one(request({})))
    assert (got.status, len(up.asked)) == (302, 1)


def test_a_client_that_goes_away_takes_its_upstream_request_with_it():
    async def ask(url, up, sidecar):
        await exchange(url, request({}), stop_after=1)
        await until(lambda: not up.alive and not sidecar.num_in_flight)
        return up, sidecar

    up, sidecar = run(answering(b"x", b"y", pause=60), ask)
    assert (up.alive, up.dropped, sidecar.num_in_flight) == (0, 1, 0)

    async def never(asked, writer):
        await asyncio.sleep(60)

    async def hang_up_early(url, up, sidecar):
        task = asyncio.ensure_future(exchange(url, request({})))
        await until(lambda: up.alive)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not up.alive)
        return up

    assert run(never, hang_up_early).dropped == 1


def test_a_slow_client_holds_the_upstream_back():
    sent = {"n": 0}
    block = b"x" * 65536

    async def script(asked, writer):
        writer.write(chunked())
        for _ in range(400):  # 25 MiB: more than all buffers on the way
            writer.write(piece(block))
            await writer.drain()
            sent["n"] += 1
        writer.write(b"0\r\n\r\n")

    async def ask(url, up, sidecar):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1 << 16)
        writer.write(request({}))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.5)
        before = sent["n"]
        writer.close()
        return before

    assert run(script, ask) < 400


def test_an_upstream_that_is_down_opens_the_breaker():
    async def main():
        sidecar = Sidecar(RelayOptions(f"http://127.0.0.1:{free_port()}", failures_to_open=2, cooldown_s=30, retries=0))
        async with front(sidecar) as url:
            statuses = [(await exchange(url, request({}))) for _ in range(3)]
            health = json.loads((await exchange(url, request(method="GET", target="/health"))).body)
            ready = await exchange(url, request(method="GET", target="/ready"))
            metrics = (await exchange(url, request(method="GET", target="/metrics"))).body.decode()
        return statuses, health, ready, metrics

    answers, health, ready, metrics = asyncio.run(main())
    assert [got.status for got in answers] == [502, 502, 503]
    assert 1 <= int(dict(answers[2].headers)["Retry-After"]) <= 30
    assert json.loads(answers[2].body)["error"]["type"] == "upstream_error"
    assert (health["status"], health["upstream"]["circuit"], ready.status) == ("degraded", "open", 503)
    assert "sidecar_circuit_state 2.0" in metrics
    assert 'sidecar_requests_total{outcome="unreachable",route="/v1/completions"} 3.0' in metrics


def test_the_breaker_lets_one_request_try():
    now = [0.0]
    breaker = CircuitBreaker(2, 10, clock=lambda: now[0])
    for _ in range(2):
        assert breaker.admits()
        breaker.failed()
    assert (breaker.state, breaker.admits()) == ("open", False)
    now[0] = 10.0
    assert breaker.state == "half-open"
    assert (breaker.admits(), breaker.admits()) == (True, False)
    breaker.failed()
    assert (breaker.state, breaker.admits()) == ("open", False)
    now[0] = 20.0
    assert breaker.admits()
    breaker.abandoned()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_more_requests_than_allowed_are_refused_and_large_bodies_too():
    async def ask(url, up, sidecar):
        first = asyncio.ensure_future(exchange(url, request({})))
        await until(lambda: up.alive)
        second = await exchange(url, request({}))
        first.cancel()
        await until(lambda: not sidecar.num_in_flight)
        return second, await exchange(url, request(b"x" * 2000))

    second, large = run(answering(b"x", pause=60), ask, max_in_flight=1, max_body_bytes=1000)
    assert (second.status, large.status) == (429, 413)


def test_the_address_of_the_upstream_never_depends_on_a_request():
    async def ask(url, up, sidecar):
        absolute = await exchange(url, request({}, target="http://169.254.169.254/latest"))
        odd = await exchange(url, request(method="GET", target="//169.254.169.254/x", headers=("X-Forwarded-Host: e",)))
        upgrade = await exchange(url, request(method="GET", headers=("Upgrade: websocket", "Connection: upgrade")))
        return absolute, odd, upgrade, up

    absolute, odd, upgrade, up = run(plain, ask)
    assert (absolute.status, odd.status, upgrade.status) == (400, 200, 501)
    assert [asked.target for asked in up.asked] == ["//169.254.169.254/x"]


@pytest.mark.parametrize(
    "url", ["ftp://x", "x", "http://", "http://u:p@x", "http://x?y=1", "http://x#y", "http://x:99999999", "//x"]
)
def test_an_upstream_that_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="upstream must"):
        RelayOptions(url)
    for good, base in (("http://x:1/v1", "http://x:1"), ("https://[::1]/a/", "https://[::1]/a")):
        assert upstream_base(good) == base
    with pytest.raises(ConfigError, match="idle_s"):
        Timeouts(idle_s=0)
    with pytest.raises(ConfigError, match="retries"):
        RelayOptions("http://x", retries=-1)


def test_what_is_ready_together_goes_out_together():
    """Head, body and end of an answer that is there in one piece are one write; a stream's head does not wait."""

    class Watched(Sidecar):
        async def handle(self, request):
            transport = request.transport
            write = transport.write
            transport.write = lambda data: (writes.append(bytes(data)), write(data))
            return await super().handle(request)

    async def asked(head, later):
        may_go_on = asyncio.Event()

        async def script(asked, writer):
            writer.write(head)
            if later:
                await may_go_on.wait()
                writer.write(later)

        writes.clear()
        async with upstream(script) as up, front(Watched(RelayOptions(up.url))) as url:
            going = asyncio.ensure_future(exchange(url, request({})))
            if later:
                await until(lambda: writes)
                may_go_on.set()
            got = await going
            assert (got.body, got.is_whole) == (b"all of it", True)
        return list(writes)

    writes: list[bytes] = []
    (write,) = asyncio.run(asked(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nall of it", b""))
    assert write.endswith(b"\r\n\r\nall of it")
    (write,) = asyncio.run(asked(chunked() + piece(b"all ") + piece(b"of it") + b"0\r\n\r\n", b""))
    assert write.endswith(b"\r\n\r\n9\r\nall of it\r\n0\r\n\r\n")
    head, rest = asyncio.run(asked(chunked(), piece(b"all of it") + b"0\r\n\r\n"))
    assert head.endswith(b"\r\n\r\n")
    assert rest == b"9\r\nall of it\r\n0\r\n\r\n"
