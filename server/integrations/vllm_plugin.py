"""Our suffix store as vLLM's drafter, through its ``custom_class`` method.

    vllm serve MODEL --speculative-config '{"method": "custom_class", "num_speculative_tokens": 16,
        "model": "specdec.server.integrations.vllm_plugin.SuffixProposer"}'

vLLM does the parallelism, the batching and the verification; this drafts. Nothing else needs to be installed or named:
the proposer binds itself to the runner that makes it, which is how it learns request ids and what clients sent along.

Per request, in ``vllm_xargs``: ``specdec_draft`` (token ids that the output is expected to repeat), ``specdec_tenant``
(texts of different tenants never meet) and ``specdec`` (0: no drafts for this request).

Written against vLLM 0.33.0 (``vllm/v1/worker/gpu_model_runner.py``). What is relied on is checked when vLLM loads the
class; if it has changed, loading fails and says what.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, UnsupportedError
from specdec.server.integrations.engine_drafts import EngineDrafts, Hint

__all__ = ["SuffixProposer", "check_call", "hint_of"]

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_ARGUMENTS = ("sampled_token_ids", "num_tokens_no_spec", "token_ids_cpu")  # as vLLM passes them, by position
_KEYWORDS = ("slot_mappings",)


def check_call(source: str) -> None:
    """Check how the runner calls a custom proposer.

    Args:
        source: of ``GPUModelRunner.propose_draft_token_ids``.

    Raises:
        UnsupportedError: it is called in another way than this class expects.
    """
    expected = f"propose({', '.join(_ARGUMENTS)}, {', '.join(f'{name}=...' for name in _KEYWORDS)})"
    tree = ast.parse(textwrap.dedent(source))
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and "'custom_class'" in ast.unparse(branch.test):
            calls = [
                node
                for node in ast.walk(ast.Module(branch.body, []))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "propose"
            ]
            found = [
                (tuple(ast.unparse(one).rpartition(".")[2] for one in call.args), tuple(k.arg for k in call.keywords))
                for call in calls
            ]
            if found == [(_ARGUMENTS, _KEYWORDS)]:
                return
            raise UnsupportedError(f"this vLLM calls a custom proposer as {found}, expected {expected}")
    raise UnsupportedError("this vLLM's runner has no method custom_class; version 0.33 has")


def hint_of(extra_args: Mapping[str, Any] | None) -> Hint:
    """What a request's ``vllm_xargs`` say; odd values count as not given, because one request must not end a step."""
    given = extra_args or {}
    draft = given.get("specdec_draft")
    ids = tuple(draft) if isinstance(draft, list) and all(type(x) is int and 0 <= x < 2**31 for x in draft) else ()
    return Hint(str(given.get("specdec_tenant", "")), given.get("specdec", 1) not in (0, 0.0, "0"), ids)


class SuffixProposer:
    """Drafts of a suffix store (vLLM's contract for ``custom_class``).

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        UnsupportedError: this vLLM differs from what the class was written against.
        ConfigError: ``num_speculative_tokens`` is missing.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._budget = vllm_config.speculative_config.num_speculative_tokens
        if not isinstance(self._budget, int) or self._budget < 1:
            raise ConfigError(f"num_speculative_tokens must be at least 1, got {self._budget}")
        self._max_length = int(vllm_config.model_config.max_model_len)
        self.drafts = EngineDrafts()
        self._runner: Any = None
        module = sys.modules.get(_RUNNER)
        if module is None:
            raise UnsupportedError(f"{_RUNNER} is not loaded: the proposer is for vLLM's first model runner")
        _bind(module.GPUModelRunner)

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is no model to load."""

    def bind(self, runner: Any) -> None:
        """Whose requests these are; called before every step."""
        self._runner = runner

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """One chain of draft tokens per row, empty for rows that are still in their prompt.

        Args:
            sampled_token_ids: per row, the tokens of the last step; empty during a prompt.
            num_tokens_no_spec: [max rows] tokens of each row, drafts not counted.
            token_ids_cpu: [max rows, max length] prompt and output.
            slot_mappings: not read.

        Raises:
            UnsupportedError: no runner was bound.
        """
        if self._runner is None:
            raise UnsupportedError("vLLM did not go through GPUModelRunner.propose_draft_token_ids")
        batch, requests = self._runner.input_batch, self._runner.requests
        wanted: dict[str, int] = {}  # request -> row
        budgets: list[int] = []
        for row, sampled in enumerate(sampled_token_ids):
            length = int(num_tokens_no_spec[row])
            if not sampled or length >= self._max_length:
                continue
            request_id = batch.req_ids[row]
            params = requests[request_id].sampling_params
            hint = hint_of(params.extra_args if params is not None else None)
            prompt_length = int(batch.num_prompt_tokens[row])
            self.drafts.follow(request_id, token_ids_cpu[row, :length], prompt_length, hint)
            if hint.is_on:
                wanted[request_id] = row
                budgets.append(min(self._budget, self._max_length - length - 1))
        self.drafts.retain(set(batch.req_id_to_index))
        answer: list[list[int]] = [[] for _ in sampled_token_ids]
        made = self.drafts.drafts(list(wanted), budgets, as_tree=False)
        for row, draft in zip(wanted.values(), made, strict=True):
            answer[row] = draft.token_ids
        return answer


def _bind(runner_class: Any) -> None:
    """Let the runner show itself to the proposer before each call; once per process."""
    original: Callable[..., Any] = runner_class.propose_draft_token_ids
    if hasattr(original, "__wrapped__"):
        return
    check_call(inspect.getsource(original))

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if isinstance(drafter, SuffixProposer):
            drafter.bind(self)
        return original(self, *args, **kwargs)

    runner_class.propose_draft_token_ids = propose_draft_token_ids
