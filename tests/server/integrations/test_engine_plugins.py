"""The plug-ins for vLLM and SGLang against runners that call them exactly as the published sources do.

The fast tests use the calls as written down here; the slow ones read them out of the wheels of the two projects.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from specdec.errors import UnsupportedError
from specdec.server.integrations import sglang_plugin, vllm_plugin
from specdec.server.integrations.engine_drafts import Draft, EngineDrafts, Hint

LOOP = [5, 6, 7, 8, 9, 10, 11, 12] * 4
CALL = """
def propose_draft_token_ids(self, scheduler_output, sampled_token_ids, *rest, slot_mappings=None):
    spec_config = self.speculative_config
    if spec_config.method == "ngram":
        return None
    elif spec_config.method == "custom_class":
        return cast(Any, self.drafter).propose(
            sampled_token_ids, self.input_batch.num_tokens_no_spec, self.input_batch.token_ids_cpu,
            slot_mappings=slot_mappings,
        )
"""


def fetched(tmp_path, package, member):
    """A source file out of a published wheel."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(tmp_path), package],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"cannot download {package}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = Path(tmp_path).glob("*.whl")
    return zipfile.ZipFile(wheel).read(member).decode()


class FakeBatch:
    """vLLM's input batch, as far as a proposer sees it."""

    def __init__(self, rows, width=256):
        self.req_ids = list(rows)
        self.req_id_to_index = {name: row for row, name in enumerate(rows)}
        self.num_prompt_tokens = np.array([prompt for prompt, _ in rows.values()])
        self.num_tokens_no_spec = np.array([len(ids) for _, ids in rows.values()])
        self.token_ids_cpu = np.zeros((len(rows) + 2, width), np.int32)
        for row, (_, ids) in enumerate(rows.values()):
            self.token_ids_cpu[row, : len(ids)] = ids


def runner_of(source, budget=8):
    """A runner whose method is the given source, with a proposer made as vLLM makes it."""
    names = {"cast": lambda kind, value: value, "Any": object}
    exec(compile(ast.parse(source), __file__, "exec"), names)
    runner_class = type("GPUModelRunner", (), {"propose_draft_token_ids": names["propose_draft_token_ids"]})
    return runner_class


@pytest.fixture
def runner(monkeypatch):
    module = types.ModuleType("vllm.v1.worker.gpu_model_runner")
    module.GPUModelRunner = runner_of(CALL)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_plugin.inspect, "getsource", lambda function: CALL)
    config = types.SimpleNamespace(
        speculative_config=types.SimpleNamespace(num_speculative_tokens=8, method="custom_class"),
        model_config=types.SimpleNamespace(max_model_len=200),
    )
    made = module.GPUModelRunner()
    made.speculative_config = config.speculative_config
    made.drafter = vllm_plugin.SuffixProposer(config)
    return made


def step(runner, rows, sampled, extra=None):
    runner.input_batch = FakeBatch(rows)
    args = extra or {}
    params = {name: types.SimpleNamespace(extra_args=args.get(name)) for name in rows}
    runner.requests = {name: types.SimpleNamespace(sampling_params=params[name]) for name in rows}
    return runner.propose_draft_token_ids(None, sampled)


def test_rows_draft_from_their_own_text_whatever_their_order(runner):
    rows = {"a": (4, LOOP[:20]), "b": (2, [1, 2, 3]), "c": (6, [9, 9])}
    first, *others = step(runner, rows, [[LOOP[19]], [3], []])
    assert others == [[], []]  # c is still in its prompt
    assert first == LOOP[20 : 20 + len(first)]
    assert 4 <= len(first) <= 8
    rows = {"b": (2, [1, 2, 3, 4]), "a": (4, LOOP[:22])}
    nothing, second = step(runner, rows, [[4], LOOP[20:22]])
    assert nothing == []
    assert second == LOOP[22 : 22 + len(second)]
    assert len(second) >= 4
    assert set(runner.drafter.drafts.live) == {"a", "b"}
    step(runner, {"b": (2, [1, 2, 3, 4, 5])}, [[5]])
    assert set(runner.drafter.drafts.live) == {"b"}


def test_a_client_can_send_a_draft_be_another_tenant_or_switch_off(runner):
    expected = [31, 32, 33, 34, 35, 36]
    hint = {"a": {"specdec_draft": expected}}
    assert step(runner, {"a": (3, [1, 2, 3, 31])}, [[31]], hint)[0][:4] == expected[1:5]
    off = {"a": {"specdec": 0}}
    assert step(runner, {"a": (3, LOOP[:24])}, [[LOOP[23]]], off) == [[]]
    step(runner, {"x": (1, [1, *LOOP])}, [[LOOP[-1]]], {"x": {"specdec_tenant": "t1"}})
    step(runner, {"y": (1, [2])}, [[2]])
    (same,) = step(runner, {"z": (1, [1, 5, 6, 7])}, [[7]], {"z": {"specdec_tenant": "t1"}})
    (other,) = step(runner, {"w": (1, [1, 5, 6, 7])}, [[7]], {"w": {"specdec_tenant": "t2"}})
    assert same[:3] == [8, 9, 10]
    assert other == []
    odd = {"v": {"specdec_draft": "text", "specdec_tenant": 7}}
    assert step(runner, {"v": (1, [1, 2])}, [[2]], odd) == [[]]


def test_ids_that_come_again_and_full_contexts_are_no_trouble(runner):
    step(runner, {"a": (4, LOOP[:24])}, [[LOOP[23]]])
    assert step(runner, {"a": (2, [1, 2, 3])}, [[3]]) == [[]]  # preempted, or another request of that name
    assert step(runner, {"a": (2, (LOOP * 7)[:200])}, [[1]]) == [[]]  # at the model's length
    (short,) = step(runner, {"b": (2, (LOOP * 7)[:197])}, [[1]])
    assert len(short) <= 2


def test_another_vllm_is_refused_by_name():
    for changed, words in (
        (CALL.replace("sampled_token_ids, self.input_batch.num", "4, sampled_token_ids, self.input_batch.num"), "as"),
        (CALL.replace('"custom_class"', '"plugin"'), "no method custom_class"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            vllm_plugin.check_call(changed)
    config = types.SimpleNamespace(
        speculative_config=types.SimpleNamespace(num_speculative_tokens=4),
        model_config=types.SimpleNamespace(max_model_len=8),
    )
    with pytest.raises(UnsupportedError, match="not loaded"):
        vllm_plugin.SuffixProposer(config)


WORKER = """
class NGRAMWorker:
    def __init__(self, width):
        self.draft_token_num, self.enable_overlap = width, True
    def _prepare_draft_tokens(self, batch):
        return self.draft_token_num, self.prev_token_ids, self.prev_accept_lens, batch.grammar_needs_sync(), (
            batch.spec_info.accept_tokens, batch.spec_info.accept_lens, batch.reqs[0].origin_input_ids_unpadded,
            batch.reqs[0].output_ids)
    def _update_ngram_corpus(self, batch):
        raise AssertionError("the corpus is not used")
    def forward_batch_generation(self, batch, on_publish=None, pp_proxy_tensors=None):
        drafts = self._prepare_draft_tokens(batch)
        self._update_ngram_corpus(batch)
        return drafts
"""


class Cpu(list):
    def cpu(self):
        return self

    def tolist(self):
        return list(self)


def sglang_batch(rows, *, fresh=(), lens=None, needs_sync=False):
    reqs = [
        types.SimpleNamespace(rid=rid, origin_input_ids_unpadded=p, output_ids=o, extra_key=k) for rid, p, o, k in rows
    ]
    info = types.SimpleNamespace(accept_tokens=Cpu(fresh), accept_lens=Cpu(lens or [0] * len(rows)))
    return types.SimpleNamespace(reqs=reqs, spec_info=info, grammar_needs_sync=lambda: needs_sync)


@pytest.fixture
def worker(monkeypatch):
    names = {}
    exec(WORKER, names)
    monkeypatch.setattr(sglang_plugin.inspect, "getsource", lambda kind: WORKER)
    return sglang_plugin.worker_class(names["NGRAMWorker"])


def test_sglangs_trees_hold_the_draft_and_its_ancestors(worker):
    made = worker(4)
    # The last step's tokens of the second request are not in its output yet: overlap scheduling.
    rows = [("a", LOOP[:4], LOOP[4:20], None), ("b", [1, 2], [3], "t")]
    tokens, mask = made.forward_batch_generation(sglang_batch(rows, fresh=[LOOP[20], 0, 0, 0, 4, 0, 0, 0], lens=[1, 1]))
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [*LOOP[20:24], 4, 0, 0, 0]
    mask = mask.reshape(2, 4, 4)
    assert mask[0].tolist() == np.tri(4, dtype=bool).tolist()  # a chain
    assert mask[1, 1:, 0].all()  # padding hangs on the root
    again, _ = made.forward_batch_generation(sglang_batch(rows[:1], needs_sync=True))
    assert again[0] == LOOP[19]  # nothing is counted twice
    assert set(made.drafts.live) == {"a"}


def test_a_branching_draft_is_packed_by_ancestors():
    #   0 -> 1 -> 2
    #     -> 3
    tokens, mask = sglang_plugin.pack([7], [Draft([11, 12, 13], [-1, 0, -1])], 4)
    assert tokens.tolist() == [7, 11, 12, 13]
    assert mask.reshape(4, 4).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_another_sglang_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="no NGRAMWorker"):
        sglang_plugin.check_worker("x = 1")
    with pytest.raises(UnsupportedError, match="_update_ngram_corpus takes"):
        sglang_plugin.check_worker(WORKER.replace("_update_ngram_corpus(self, batch)", "_update_ngram_corpus(self)"))
    with pytest.raises(UnsupportedError, match="accept_lens"):
        sglang_plugin.check_worker(WORKER.replace("accept_lens", "lens"))


def test_drafts_of_one_tenant_never_come_from_another():
    made = EngineDrafts()
    made.follow("a", np.array([1, *LOOP], np.int32), 1, Hint("one"))
    made.retain(())
    made.follow("b", np.array([1, 5, 6, 7], np.int32), 1, Hint("two"))
    assert made.drafts(["b"], [4], as_tree=False)[0].token_ids == []


@pytest.mark.slow
def test_the_published_vllm_calls_the_proposer_as_expected(tmp_path):
    source = fetched(tmp_path, "vllm==0.33.0", "vllm/v1/worker/gpu_model_runner.py")
    (method,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.name == "propose_draft_token_ids"
        and node.args.args[0].arg == "self"
    ]
    vllm_plugin.check_call(ast.unparse(method))
    for name in ("input_batch.req_ids", "self.requests", "create_custom_proposer"):
        assert name in source


@pytest.mark.slow
def test_the_published_sglang_has_the_worker_that_ours_extends(tmp_path):
    source = fetched(tmp_path, "sglang==0.5.23", "sglang/srt/speculative/ngram_worker.py")
    sglang_plugin.check_worker(source)
