from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError, LoadError, RequestError
from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.calibration import CELL_WIDTH, T_TOKEN
from specdec.suffix_tree.index import _TABLE_SIZES

DEPTH = 14


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def filled() -> RetrievalStore:
    store = RetrievalStore(max_bytes=1 << 20)
    store.insert("a", [1, 2, 3, 4, 5])
    store.insert("b", [11, 12, 13, 14, 15], tenant="north")
    store.share([[21, 22, 23, 24]])
    memory = store.branches("north", DEPTH)
    memory.open("b")
    memory.append("b", ids(11, 12, 13, 14))
    memory.close("b")
    store.successors("north").update(ids(11, 12), ids(0, 1), [1], np.arange(16, dtype=np.int32).reshape(2, 8), "b")
    return store


def drafts(store: RetrievalStore, tenant: str = "") -> list[list[int]]:
    found = []
    for n, prompt in enumerate(([1, 2], [11, 12], [21, 22])):
        store.suffix.start(("probe", n), prompt, tenant=tenant, caching=False)
        got = store.suffix.speculate([("probe", n)], [8], threshold=0.0, as_tree=False)
        found.append(got.token_ids[1:].tolist())
        store.suffix.finish(("probe", n))
    return found


def test_a_saved_store_drafts_as_before(tmp_path):
    store = filled()
    store.save(tmp_path / "store")
    again = RetrievalStore.load(tmp_path / "store", max_bytes=1 << 20)
    for tenant, expected in (("", [[3, 4, 5], [], [23, 24]]), ("north", [[], [13, 14, 15], [23, 24]])):
        assert drafts(store, tenant) == expected
        assert drafts(again, tenant) == expected
    assert again.branches("north", DEPTH).trie.count([12, 13]) == 1
    assert again.successors("north").rows[12].tolist() == list(range(8, 16))
    for index in again.suffix.tenants.values():
        index.check_integrity()


def test_a_loaded_store_learns_on_without_touching_the_file(tmp_path):
    path = tmp_path / "store"
    filled().save(path)
    before = path.read_bytes()
    again = RetrievalStore.load(path, max_bytes=1 << 20)
    for n in range(50):
        again.insert(f"more {n}", np.arange(200) + n, tenant="north")
    again.forget("b", tenant="north")
    for index in again.suffix.tenants.values():
        index.check_integrity()
    assert path.read_bytes() == before
    assert drafts(again, "north")[1] != [13, 14, 15]
    again.save(path)
    assert "more 49" in RetrievalStore.load(path, max_bytes=1 << 20).suffix.index("north").responses


@pytest.mark.parametrize("cut", [0, 10, 40, 5000, -1])
def test_a_truncated_file_gives_one_clear_error(tmp_path, cut):
    path = tmp_path / "store"
    filled().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(LoadError, match="cut short|damaged"):
        RetrievalStore.load(path)


def test_every_damaged_byte_of_the_used_parts_is_noticed(tmp_path):
    path = tmp_path / "store"
    filled().save(path)
    data = bytearray(path.read_bytes())
    used = [i for i, byte in enumerate(data) if byte]
    for i in [*range(20), *used[:: len(used) // 60]]:
        if 24 <= i < 32:
            continue  # reserved
        damaged = bytearray(data)
        damaged[i] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(LoadError):
            RetrievalStore.load(path)


def test_a_missing_file_and_a_foreign_file_are_named(tmp_path):
    with pytest.raises(LoadError, match="No such file"):
        RetrievalStore.load(tmp_path / "nothing")
    (tmp_path / "other").write_bytes(b"x" * 100)
    with pytest.raises(LoadError, match="is not a retrieval store"):
        RetrievalStore.load(tmp_path / "other")


def test_a_store_that_is_too_large_for_the_bound_is_refused(tmp_path):
    store = RetrievalStore(max_bytes=1 << 20)
    store.insert("a", np.arange(20_000))
    store.save(tmp_path / "store")
    with pytest.raises(LoadError, match="the bound is 100000"):
        RetrievalStore.load(tmp_path / "store", max_bytes=100_000)


def test_a_store_with_tables_of_another_version_is_refused(tmp_path, monkeypatch):
    filled().save(tmp_path / "store")
    monkeypatch.setitem(_TABLE_SIZES, at.X_CELLS, (1000 + T_TOKEN) * CELL_WIDTH)
    with pytest.raises(LoadError, match="the saved cells are of another version"):
        RetrievalStore.load(tmp_path / "store", max_bytes=1 << 20)


def test_an_unwritable_place_leaves_everything_as_it_was(tmp_path):
    with pytest.raises(LoadError, match="cannot save the store"):
        filled().save(tmp_path / "no" / "such" / "directory")


def test_keys_that_a_file_cannot_hold_are_named(tmp_path):
    store = RetrievalStore()
    store.insert((1, 2), [1, 2, 3])
    with pytest.raises(ConfigError, match=r"\(1, 2\)"):
        store.save(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


SAVE_FOREVER = """
import sys
import numpy as np
from specdec.drafters.store import RetrievalStore
store = RetrievalStore(max_bytes=1 << 23)
n = 0
while True:
    n += 1
    store.insert("text", np.random.default_rng(n).integers(0, 1000, 100_000))
    store.save(sys.argv[1])
    print(n, flush=True)
"""


def test_a_kill_during_a_save_leaves_a_whole_file(tmp_path):
    path = tmp_path / "store"
    for delay in (0.0, 0.003, 0.011):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = RetrievalStore.load(path, max_bytes=1 << 23)
        assert store.suffix.index("").num_tokens == 100_000
        store.suffix.index("").check_integrity()
        store.save(path)  # what the killed process left behind is in nobody's way


def test_forgetting_a_request_reaches_every_part():
    store = filled()
    store.forget("b", tenant="north")
    assert drafts(store, "north")[1] == []
    assert store.branches("north", DEPTH).trie.num_nodes == 1
    assert (store.successors("north").rows[[11, 12]] == -1).all()
    with pytest.raises(RequestError, match="nothing is kept of request 'b'"):
        store.forget("b", tenant="north")


def test_forgetting_a_tenant_leaves_the_others():
    store = filled()
    store.forget_tenant("north")
    assert drafts(store, "north") == [[], [], [23, 24]]
    assert drafts(store, "")[0] == [3, 4, 5]
    with pytest.raises(RequestError, match="tenant 'nobody' is unknown"):
        store.forget_tenant("nobody")


def test_bad_options_are_named():
    with pytest.raises(ConfigError, match="max_bytes must hold"):
        RetrievalStore(max_bytes=1)
    with pytest.raises(ConfigError, match="counts strings of 14 tokens, the drafter needs 9"):
        filled().branches("north", 9)


def test_no_more_tenants_are_kept_than_allowed():
    store = RetrievalStore(max_tenants=2)
    for tenant in ("a", "b", "a", "c"):
        memory = store.branches(tenant, DEPTH)
        memory.open(tenant)
        store.successors(tenant).seed(ids(1, 2), tenant)
    assert store.branches("a", DEPTH).keys == ["a"]
    assert store.branches("b", DEPTH).keys == []
