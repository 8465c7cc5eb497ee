"""What a deployment is made of: affinity behind a real nginx, metrics in a real Prometheus, files that fit the code."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from specdec.server.affinity import HEADER, affinity_of
from specdec.server.keys import Keyring, hash_key
from specdec.server.wire import ChatRequest, CompletionRequest
from tests.server.live import Live, running, service

DEPLOY = Path(__file__).resolve().parents[2] / "server" / "deploy"
OPEN = Keyring()


def chat(*messages: tuple[str, str]) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": role, "content": text} for role, text in messages]})


def test_turns_of_a_conversation_share_their_affinity_and_others_do_not():
    first = (("system", "be brief"), ("user", "one"))
    later = chat(*first, ("assistant", "yes"), ("user", "two"))
    assert affinity_of(chat(*first), "t", OPEN) == affinity_of(later, "t", OPEN)
    others = [
        affinity_of(chat(*first), "t", OPEN),
        affinity_of(chat(("system", "be brief"), ("user", "two")), "t", OPEN),
        affinity_of(chat(("user", "one")), "t", OPEN),
        affinity_of(chat(*first), "another", OPEN),
        affinity_of(chat(*first), "t", Keyring((("t", hash_key("k")),))),
    ]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("prompt", ["a" * 600, ["a" * 600], [7] * 600, [[7] * 600]])
def test_a_completion_is_known_by_its_beginning(prompt: Any):
    def of(prompt: Any) -> str:
        return affinity_of(CompletionRequest.model_validate({"prompt": prompt}), "t", OPEN)

    def first_changed() -> Any:
        inner = prompt[0] if isinstance(prompt[0], (str, list)) and not isinstance(prompt, str) else prompt
        other = "b" + inner[1:] if isinstance(inner, str) else [8, *inner[1:]]
        return [other] if inner is not prompt else other

    longer = prompt + prompt if len(prompt) > 1 else [prompt[0] + prompt[0]]
    assert of(prompt) == of(longer)
    assert of(prompt) != of(first_changed())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(command: Sequence[str], is_up: Callable[[], bool]) -> Iterator[None]:
    """Run a program until the block ends."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            end = time.monotonic() + 60
            while not is_up():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end, f"{command[0]} does not answer"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs Debian's nginx-light")
def test_behind_nginx_a_conversation_stays_where_its_beginning_is_cached(tmp_path: Path):
    port = free_port()
    with running(service()) as one, running(service()) as two:
        config = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        for old, new in (("8000", port), ("8001", one.url.rpartition(":")[2]), ("8002", two.url.rpartition(":")[2])):
            config = config.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        path = tmp_path / "nginx.conf"
        path.write_text(f"daemon off; pid {tmp_path}/pid; error_log stderr;\n" + config, encoding="utf-8")
        url = f"http://127.0.0.1:{port}"
        with program(["nginx", "-p", str(tmp_path), "-c", str(path)], lambda: answers(url + "/health")):
            cached = [talk(url, f"conversation {number} begins") for number in range(6)]
        used = [replica.service.worker.totals.num_steps for replica in (one, two)]
    assert all(used), "one replica did everything"
    # Once the header is known, every turn finds the turn before it.
    assert all(turn > 0 for turns in cached for turn in turns[2:])


def talk(url: str, opening: str) -> list[int]:
    """Five turns; the cached prompt tokens of each."""
    messages = [{"role": "user", "content": opening}]
    headers: dict[str, str] = {}
    cached = []
    for _ in range(5):
        body = {"messages": messages, "max_completion_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        headers = {HEADER: answer.headers[HEADER]}
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]
    return cached


def dashboard_queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "specdec.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus")
def test_every_panel_of_the_dashboard_shows_something_in_a_real_prometheus(tmp_path: Path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "1s"
    with running(service()) as live:
        (job,) = config["scrape_configs"]
        assert job["static_configs"] == [{"targets": ["specdec:8000"]}]
        job["static_configs"] = [{"targets": [live.url.removeprefix("http://")]}]
        path = tmp_path / "prometheus.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [
            "prometheus", f"--config.file={path}", f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with program(command, lambda: answers(url + "/-/ready")):
            missing = wait_for_panels(live, url)
    assert not missing


def wait_for_panels(live: Live, url: str) -> list[str]:
    """Keep the server busy until every query has an answer that is a number; the queries that have none in time."""
    missing, end = dashboard_queries(), time.monotonic() + 60
    while missing and time.monotonic() < end:
        for body in ({"prompt": "abab" * 6, "max_tokens": 40, "temperature": 0}, {"prompt": "x", "max_tokens": 0}):
            live.post("/v1/completions", body)
        time.sleep(0.3)
        missing = [query for query in missing if not numbers(url, query.replace("$__rate_interval", "10s"))]
    return missing


def numbers(url: str, query: str) -> list[float]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10)
    assert answer.status_code == 200, f"{query}: {answer.text}"
    values = [float(series["value"][1]) for series in answer.json()["data"]["result"]]
    return [value for value in values if value == value]


def test_the_compose_file_mounts_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    build = compose["services"]["specdec"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    mounts = [volume for part in compose["services"].values() for volume in part.get("volumes", [])]
    files = [mount.split(":")[0] for mount in mounts if re.match(r"\./(?!keys)", mount)]
    assert len(files) == 4
    assert all((DEPLOY / name).is_file() for name in files)
    ports = [port for part in compose["services"].values() for port in part.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_containers_command_is_one_that_the_program_takes():
    from typer.testing import CliRunner

    from specdec.cli import app

    command = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["specdec"]["command"]
    options = {word for word in command if word.startswith("--")}
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert options
    assert all(option in shown for option in options)
