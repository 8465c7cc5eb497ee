"""Serving with versions from a registry, capturing what tenants allow, and the admin routes behind their own key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from specdec.errors import ConfigError, UnsupportedError
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.privacy import OPT_OUT_HEADER
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.spool import Spool
from specdec.server.keys import Keyring, hash_key
from specdec.server.launch import ServerOptions, build_service
from specdec.server.online import OnlineOptions
from tests.browser import browser_page, needs_chromium
from tests.server.live import EOS, Live, running, tokenizer
from tests.tiny_models import tiny_llama

KEYS = Keyring((("yes", hash_key("key-yes")), ("no", hash_key("key-no"))))
ADMINS = Keyring((("root", hash_key("key-admin")),))
ADMIN = {"authorization": "Bearer key-admin"}


def publish(registry: Registry, model: Any, *, seed: int) -> int:
    """A draft model: a tiny Llama of another seed; seed 0 is the target itself."""

    def export(folder: Path) -> None:
        tiny_llama(seed=seed).save_pretrained(folder)

    manifest = Manifest(version=0, parent=0, kind="lm", target=fingerprint(model), acceptance_length=1.5)
    return registry.publish(export, manifest).version


@dataclass
class Learning:
    live: Live
    registry: Registry
    spool: Path

    def ask(self, prompt: str, key: str = "key-yes", **headers: str) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 24, "seed": 1, "temperature": 0}
        answer = self.live.post("/v1/completions", body, authorization=f"Bearer {key}", **headers)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def admin(self, path: str, method: str = "get", **body: Any) -> Any:
        if method == "get":
            return self.live.get(f"/admin/{path}", **ADMIN)
        return self.live.post(f"/admin/{path}", body, **ADMIN)

    def wait_for_version(self, version: int) -> None:
        end = monotonic() + 60
        while self.admin("drafters").json()["serving"] != version and monotonic() < end:
            self.ask("a round boundary")
            sleep(0.05)
        assert self.admin("drafters").json()["serving"] == version


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learning]:
    root = tmp_path_factory.mktemp("learning")
    registry, model = Registry(root / "registry"), tiny_llama()
    for seed in (5, 0):
        publish(registry, model, seed=seed)
    registry.promote(1, "first")
    options = ServerOptions(
        name="tiny", drafters=(f"registry:{root / 'registry'}?depth=3", "none"), budget=3,
        online=OnlineOptions(str(root / "spool"), ("yes",), redact=(), is_automatic=False),
        engine={"max_length": 200, "kv_tokens": 4096},
    )  # fmt: skip
    made = build_service(model, tokenizer(), (EOS,), options, KEYS, ADMINS)
    with running(made) as live:
        yield Learning(live, registry, root / "spool")


def test_versions_are_listed_promoted_and_rolled_back(learning: Learning) -> None:
    text = learning.ask("hello")["choices"][0]["text"]
    state = learning.admin("drafters").json()
    assert [row["version"] for row in state["versions"]] == [2, 1]
    assert (state["current"], state["pinned"], state["serving"]) == (1, 1, 1)
    assert learning.admin("drafters/2/promote", "post").json()["current"] == 2
    learning.wait_for_version(2)
    assert learning.ask("hello")["choices"][0]["text"] == text
    lengths = {row["version"]: row["acceptance_length"] for row in learning.admin("drafters").json()["versions"]}
    assert lengths[2] > 1.7 > lengths[1]  # version 2 is the target itself
    metrics = learning.live.get("/metrics").text
    assert 'specdec:drafter_version_accepted_total{drafter_version="2",engine="0",model_name="tiny"}' in metrics
    assert 'drafter_info{drafter="registry:registry?depth=3",drafter_version="2"' in metrics
    assert learning.admin("drafters/rollback", "post").json()["current"] == 1
    learning.wait_for_version(1)
    refused = learning.admin("drafters/2/promote", "post")
    assert refused.status_code == 409
    assert "version 2 must not be served: by an administrator" in refused.json()["error"]["message"]
    assert learning.admin("drafters/rollback", "post").status_code == 409
    assert learning.admin("drafters/7/promote", "post").status_code == 409
    assert learning.admin("drafters/x/promote", "post").status_code == 400
    assert learning.admin("drafters/1/pin", "post").json()["pinned"] == 1


@pytest.mark.parametrize("path", ["/admin/drafters", "/admin/capture"])
@pytest.mark.parametrize("key", ["", "Bearer key-yes", "Bearer wrong", "Basic key-admin"])
def test_only_the_admin_key_opens_admin(learning: Learning, path: str, key: str) -> None:
    headers = {"authorization": key} if key else {}
    assert learning.live.get(path, **headers).status_code == 401
    assert learning.live.post("/admin/drafters/rollback", {}, **headers).status_code == 401


def test_an_admin_key_opens_nothing_else(learning: Learning) -> None:
    assert learning.live.get("/v1/models", **ADMIN).status_code == 401


def test_only_what_tenants_allow_is_captured(learning: Learning) -> None:
    capture = learning.live.service.online.capture
    assert capture is not None
    assert capture.flush()
    before = learning.admin("capture").json()["requests"]
    learning.ask("from one who opted in")
    learning.ask("from one who did not", "key-no")
    learning.ask("from one who opted in, but not this", **{OPT_OUT_HEADER: "1"})
    learning.ask("write to jane.doe@example.org")
    assert capture.flush()
    after = learning.admin("capture").json()["requests"]
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed == {"queued": 2, "written": 1, "no consent": 1, "opted out": 1, "redacted": 1}
    spool, texts = Spool(learning.spool), []
    while (lease := spool.lease("test")) is not None:
        texts += [tokenizer().decode(record.token_ids.tolist()) for record in lease.records]
        assert all(record.drafter.startswith("registry:") for record in lease.records)
        assert all(set(record.rounds.versions.tolist()) <= {1, 2} for record in lease.records)
    assert any(text.startswith("from one who opted in") for text in texts)
    assert not [text for text in texts if "did not" in text or "not this" in text or "@" in text[:40]]
    assert (
        'captured_requests_total{engine="0",model_name="tiny",outcome="opted_out"}'
        in learning.live.get("/metrics").text
    )
    gone = learning.admin("capture/forget", "post", tenant="yes")
    assert gone.json()["shards_deleted"] >= 1
    assert not list(learning.spool.rglob("meta.arrow"))


@needs_chromium
def test_the_page_shows_versions_and_promotes_one(learning: Learning) -> None:
    newest = publish(learning.registry, tiny_llama(), seed=0)
    with browser_page() as page:
        page.open(learning.live.url, width=390, dark=False)
        page.run(
            "document.getElementById('admin-key').value = 'wrong'; document.getElementById('versions-show').click()"
        )
        page.wait("document.getElementById('versions-status').textContent.startsWith('error: the admin key')")
        page.run("document.getElementById('admin-key').value = 'key-admin'")
        page.run("document.getElementById('versions-show').click()")
        page.wait("document.querySelectorAll('#versions tr').length >= 3")
        page.run(f"document.querySelector('#versions button[aria-label=\"promote version {newest}\"]').click()")
        page.wait(f"document.querySelector('#versions').textContent.includes('{newest}current')")
        assert learning.registry.state().current == newest
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_without_an_admin_key_file_admin_is_closed(live: Live) -> None:
    answer = live.get("/admin/drafters", **ADMIN)
    assert answer.status_code == 403
    assert "--admin-key-file" in answer.json()["error"]["message"]


def test_wrong_wishes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="capturing needs tenants who opted in"):
        OnlineOptions(capture="x")
    with pytest.raises(ConfigError, match="give --capture"):
        OnlineOptions(tenants=("a",))

    def build(**options: Any) -> None:
        given = ServerOptions(name="tiny", online=OnlineOptions(**options), engine={"max_length": 99, "kv_tokens": 999})
        build_service(tiny_llama(), tokenizer(), (EOS,), given)

    with pytest.raises(ConfigError, match="no drafter reads any"):
        build(capture=str(tmp_path), tenants=("anonymous",), mode="features")
    with pytest.raises((ConfigError, UnsupportedError), match="hash key"):
        build(capture="redis://localhost/x", tenants=("anonymous",))
