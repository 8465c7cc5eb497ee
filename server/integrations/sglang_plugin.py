"""Our suffix store as a speculative algorithm of SGLang, registered through its plug-in group.

    python -m sglang.launch_server --model-path MODEL --speculative-algorithm SPECDEC \
        --speculative-num-draft-tokens 12 --speculative-eagle-topk 1 --speculative-num-steps 1

It is SGLang's own n-gram worker with other drafts: verification, trees and overlap scheduling are SGLang's.
Tenants are requests' ``extra_key``. Registration alone changes nothing for other algorithms.

Each tensor-parallel rank drafts for itself from the same tokens in the same order, so all ranks draft the same.

Written against SGLang 0.5.23 (``sglang/srt/speculative/ngram_worker.py``). What is relied on is checked when the
algorithm is chosen; if it has changed, the start fails and says what.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.errors import UnsupportedError
from specdec.server.integrations.engine_drafts import Draft, EngineDrafts, Hint

__all__ = ["NAME", "check_worker", "pack", "register", "worker_class"]

NAME = "SPECDEC"
_METHODS = {
    "_prepare_draft_tokens": ("self", "batch"),
    "_update_ngram_corpus": ("self", "batch"),
    "forward_batch_generation": ("self", "batch", "on_publish", "pp_proxy_tensors"),
}
_READ = ("enable_overlap", "draft_token_num", "prev_token_ids", "prev_accept_lens", "grammar_needs_sync",
         "accept_tokens", "accept_lens", "origin_input_ids_unpadded", "output_ids")  # fmt: skip


def check_worker(source: str) -> None:
    """Check that the n-gram worker has the methods and attributes that ours replaces and reads.

    Args:
        source: of the class ``NGRAMWorker``, or of its module.

    Raises:
        UnsupportedError: it has not; the message names the first difference.
    """
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "NGRAMWorker"]
    if not classes:
        raise UnsupportedError("this SGLang has no NGRAMWorker; version 0.5.23 has")
    methods = {node.name: node for node in classes[0].body if isinstance(node, ast.FunctionDef)}
    for name, expected in _METHODS.items():
        found = tuple(arg.arg for arg in methods[name].args.args) if name in methods else None
        if found != expected:
            raise UnsupportedError(f"this SGLang's NGRAMWorker.{name} takes {found}, expected {expected}")
    named = {node.attr for node in ast.walk(classes[0]) if isinstance(node, ast.Attribute)}
    missing = [name for name in _READ if name not in named]
    if missing:
        raise UnsupportedError(f"this SGLang's NGRAMWorker does not use {missing[0]}, which drafts are made from")


def pack(
    last_ids: Sequence[int], drafts: Sequence[Draft], num_nodes: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Trees as SGLang's verification takes them.

    Node 0 is the last token; nodes behind the draft are token 0 below the root, as SGLang pads.

    Args:
        last_ids: [B] last token of each request.
        drafts: [B] at most ``num_nodes - 1`` tokens each.
        num_nodes: nodes per request.

    Returns:
        [B * num_nodes] token ids, and [B * num_nodes * num_nodes] where row i marks node i and its ancestors.
    """
    size = len(last_ids)
    tokens = np.zeros((size, num_nodes), np.int64)
    mask = np.zeros((size, num_nodes, num_nodes), np.bool_)
    for row, (last, draft) in enumerate(zip(last_ids, drafts, strict=True)):
        tokens[row, 0] = last
        mask[row, 0, 0] = True
        for node in range(1, num_nodes):
            is_drafted = node <= len(draft.token_ids)
            parent = draft.parents[node - 1] + 1 if is_drafted else 0
            tokens[row, node] = draft.token_ids[node - 1] if is_drafted else 0
            mask[row, node] = mask[row, parent]
            mask[row, node, node] = True
    return tokens.reshape(-1), mask.reshape(-1)


def worker_class(base: Any) -> Any:
    """The worker: SGLang's own, with our drafts.

    Args:
        base: ``NGRAMWorker``.

    Raises:
        UnsupportedError: it is not what this was written against.
    """
    check_worker(inspect.getsource(base))

    class SuffixWorker(base):  # type: ignore[misc]
        """Drafts of a suffix store in place of the n-gram corpus."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.drafts = EngineDrafts()

        def _prepare_draft_tokens(self, batch: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
            self._stage(batch)
            width = self.draft_token_num
            ids, lasts = [], []
            for row, req in enumerate(batch.reqs):
                fresh = self.prev_token_ids[row * width : row * width + self.prev_accept_lens[row]]
                prompt = list(req.origin_input_ids_unpadded)
                tokens = np.array([*prompt, *req.output_ids, *fresh], np.int32)
                tenant = str(getattr(req, "extra_key", None) or "")
                self.drafts.follow(req.rid, tokens, len(prompt), Hint(tenant))
                ids.append(req.rid)
                lasts.append(int(tokens[-1]))
            self.drafts.retain(set(ids))
            return pack(lasts, self.drafts.drafts(ids, [width - 1] * len(ids), as_tree=True), width)

        def _stage(self, batch: Any) -> None:
            """Tokens of the last step that overlap scheduling has not put into ``output_ids`` yet."""
            if self.enable_overlap and not batch.grammar_needs_sync():
                self.prev_token_ids = batch.spec_info.accept_tokens.cpu().tolist()
                self.prev_accept_lens = batch.spec_info.accept_lens.cpu().tolist()
            else:
                self.prev_token_ids, self.prev_accept_lens = [], [0] * len(batch.reqs)

        def _update_ngram_corpus(self, batch: Any) -> None:
            """The store learned these tokens when it drafted."""

    return SuffixWorker


def register() -> None:
    """Make the algorithm known; SGLang calls this in each of its processes."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    class Suffix(CustomSpecAlgo):  # type: ignore[misc]
        """Takes the n-gram algorithm's paths through the scheduler."""

        def is_ngram(self) -> bool:
            return True

        def has_draft_kv(self) -> bool:
            return False

    @SpeculativeAlgorithm.register(NAME, supports_overlap=True, spec_class=Suffix)  # type: ignore[untyped-decorator]
    def _factory(_: Any) -> Any:
        from sglang.srt.speculative.ngram_worker import NGRAMWorker

        return worker_class(NGRAMWorker)
