"""Two replicas behind a local Ray: the same text from each, streamed and whole. In a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.commands.ray_app import app
from specdec.errors import ConfigError
from tests.tiny_models import save_tiny_llama

SCRIPT = """
import json, sys
import httpx, ray
from ray import serve
from specdec.commands.ray_app import app
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
url = f"http://127.0.0.1:{sys.argv[2]}/v1/completions"
body = {"prompt": "abcd", "max_tokens": 12, "temperature": 1, "seed": 3}
try:
    serve.run(app({"model": sys.argv[1], "num_replicas": 2, "drafters": "ngram,none", "max_length": 64}))
    texts = [httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"] for _ in range(6)]
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]))
    refused = httpx.post(url, json=body | {"max_tokens": 0}, timeout=60).status_code
    running = serve.status().applications["default"].deployments["specdec"].replica_states["RUNNING"]
    print("RESULT", json.dumps([texts, events[-1], refused, running]))
finally:
    serve.shutdown()
    ray.shutdown()
"""


def test_arguments_are_checked_before_ray_is_asked():
    with pytest.raises(ConfigError, match="num_replica: Extra inputs are not permitted, got 2"):
        app({"model": "m", "num_replica": 2})
    with pytest.raises(ConfigError, match="num_replicas: .* greater than or equal to 1, got 0"):
        app({"model": "m", "num_replicas": 0})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
def test_two_replicas_give_the_same_text(tmp_path: Path):
    model = save_tiny_llama(tmp_path / "model")
    script = tmp_path / "replicas.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(model), "18655"], capture_output=True, text=True, timeout=280, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    texts, last, refused, num_running = json.loads(found[0].removeprefix("RESULT "))
    assert len(set(texts)) == 1
    assert texts[0]
    assert (last, refused, num_running) == ("[DONE]", 400, 2)
