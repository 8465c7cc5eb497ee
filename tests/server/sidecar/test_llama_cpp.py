"""A sidecar before llama.cpp's server with the bundled model: the same text, and what a repeated answer takes.

pip install gguf 'llama-cpp-python[server]'
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.service import SpeedOptions
from specdec.server.sidecar.tokens import load_tokens
from tests.gguf_export import write_gguf
from tests.server.sidecar.rig import exchange, free_port, front, request

TINY = Path(__file__).parents[3] / "bench" / "tiny"
PROMPT = "def add(first, second):\n    return first"
MISSING = [name for name in ("gguf", "llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")
           if importlib.util.find_spec(name) is None]  # fmt: skip
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = write_gguf(TINY, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--model", str(path), "--port", str(port),
               "--n_ctx", "512", "--n_threads", "1", "--verbose", "false"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None, "llama.cpp's server did not start"
            assert time.monotonic() < end
            try:
                with urlopen(url + "/v1/models") as answer:
                    assert answer.status == 200
                break
            except URLError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def text_of(body):
    if body.startswith(b"{"):
        return json.loads(body)["choices"][0]["text"]
    events = [event for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)


def asking(**more):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, **more}
    return request(body, headers=("Content-Type: application/json", "Authorization: Bearer k"))


def test_the_text_is_llama_cpps_own_in_every_mode_and_a_repeat_costs_nothing(llama, capsys):
    async def timed(url, raw):
        start = time.perf_counter()
        return await exchange(url, raw), 1e3 * (time.perf_counter() - start)

    async def main(mode):
        speed = SpeedOptions(mode=mode, kind="llamacpp", cache_ttl_s=60.0 if mode == "observe" else 0.0)
        sidecar = Sidecar(RelayOptions(llama), speed, tokens=load_tokens(str(TINY)))
        async with front(sidecar) as url:
            got = []
            for stream in (True, False):
                raw = asking(stream=stream)
                got += [await timed(llama, raw), await timed(url, raw), await timed(url, raw)]
                await sidecar.speed.learner.idle()
            return got, sidecar.health()["speed"], sidecar.metrics.cache_hits._value.get()

    for mode in ("observe", "race", "rounds"):
        got, health, hits = asyncio.run(main(mode))
        assert len({text_of(answer.body) for answer, _ in got}) == 1
        assert text_of(got[0][0].body).startswith("\n    return first\n\nclass")
        assert all(answer.is_whole for answer, _ in got)
        assert health["capabilities"]["has_ids"] is False  # it tells no token ids: nothing but the relay, and learning
        assert health["shadow"]["answers"] > 0 or mode != "observe"
        assert hits == (2 if mode == "observe" else 0)
        with capsys.disabled():
            milliseconds = [round(ms, 1) for _, ms in got]
            sys.stdout.write(f"\nllama.cpp, {mode}: direct, through, again; streamed, whole: {milliseconds} ms")
