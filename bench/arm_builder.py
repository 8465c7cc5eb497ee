"""The arms by name, ours and the peers'; a peer that is not installed gives an arm that says so.

arctic-inference's suffix tree is measured inside our engine, as a drafter: same target, same verification, other tree.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench.arms import Arm, EngineArm, GenerateArm, Job, JobResult
from specdec.build import DRAFTERS, model_max_length
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import DrafterNeeds
from specdec.rope import freeze_rope
from specdec.routes import choose_route
from specdec.types import DraftTree, RequestState, StepEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PEERS", "ArcticDrafter", "arm_names", "build_arms"]

PEERS = ("generate", "prompt-lookup", "assisted", "arctic")
_LOOKUP_TOKENS = 10  # what transformers' documentation uses


class ArcticDrafter:
    """arctic-inference's ``SuffixDecodingCache`` behind our protocol (`specdec.protocols.Drafter`).

    Args:
        cache: the cache object.
        use_tree: draft trees; else chains.
        max_factor: draft at most this times the matched length, its own rule; the default is its own default.
        min_probability: of a drafted token, by its counts; likewise.
    """

    needs = DrafterNeeds()

    def __init__(
        self, cache: Any, *, use_tree: bool = False, max_factor: float = 1.0, min_probability: float = 0.1
    ) -> None:
        self._cache = cache
        self._options = {"max_spec_factor": max_factor, "min_token_prob": min_probability, "use_tree_spec": use_tree}
        self._max_context = int(getattr(cache, "max_tree_depth", 64))

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self._cache.start_request(state.request_id, state.token_ids.copy())

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            root = int(state.token_ids[-1])
            if budget < 1:
                trees.append(DraftTree.root_only(root))
                continue
            context = state.token_ids[-self._max_context :].copy()
            draft = self._cache.speculate(state.request_id, context, max_spec_tokens=budget, **self._options)
            # Its tree has no root: parent -1 stands for the last token. Ours has: every index moves by one.
            parents = np.array([-1, *(parent + 1 for parent in draft.parents)], dtype=np.int32)
            trees.append(DraftTree(np.array([root, *draft.token_ids], dtype=np.int32), parents))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            self._cache.add_active_response(event.state.request_id, event.emitted_ids.tolist())

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._cache.stop_request(request_id)


class _Absent:
    """An arm that cannot run here and says why (`specdec.bench.arms.Arm`)."""

    def __init__(self, name: str, kind: str, reason: str) -> None:
        self.name, self.kind, self._reason = name, kind, reason

    def reset(self) -> None:
        """Nothing is kept."""

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing is learned."""

    def close(self) -> None:
        """It holds nothing."""

    def run(self, job: Job) -> JobResult:
        raise UnsupportedError(self._reason)


def arm_names() -> list[str]:
    """Every name that ``build_arms`` knows."""
    return ["plain", *sorted(name for name in DRAFTERS if name != "none"), *PEERS]


def build_arms(
    names: Sequence[str], model: PreTrainedModel, *, budget: int | None = None, assistant: Any = None, **options: Any
) -> list[Arm]:
    """The arms, in the given order.

    Args:
        names: of arms; ``plain`` is our engine without a drafter, ``NAME@4`` gives one arm another budget.
        model: the target of all; arms of transformers get a copy where other arms would pack its weights.
        budget: most draft tokens per step of our drafters; None: follows what is accepted.
        assistant: the small model of ``assisted``.
        **options: of the engines.

    Raises:
        ConfigError: an unknown or repeated name, or a budget that is none.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"arms must have different names, got {', '.join(names)}")
    for name in names:
        _check(name)
    # Engines pack the weights of a model on the CPU; what transformers does is measured on a model that nobody changed.
    is_peer = {name: name.partition("@")[0] in PEERS and not name.startswith("arctic") for name in names}
    unchanged = copy.deepcopy(model) if any(is_peer.values()) and not all(is_peer.values()) else model
    # Engines look for the best path of the model when they are built; it is the same for all.
    with freeze_rope(model, model_max_length(model)):
        route = choose_route(model, max_length=model_max_length(model))
    options["route"] = route
    return [_build(name, unchanged if is_peer[name] else model, budget, assistant, options) for name in names]


def _check(name: str) -> None:
    base, _, number = name.partition("@")
    if base not in arm_names():
        raise ConfigError(f"arm must be one of {', '.join(arm_names())}, got {name!r}")
    if "@" in name and not (number.isdecimal() and int(number) >= 1):
        raise ConfigError(f"the number behind @ must be a budget >= 1, got {name!r}")


def _build(name: str, model: PreTrainedModel, budget: int | None, assistant: Any, options: dict[str, Any]) -> Arm:
    base, _, number = name.partition("@")
    budget = int(number) if number else budget
    if base == "plain":
        return EngineArm(name, model, "none", budget=0, **options)
    if base == "generate":
        return GenerateArm(name, model)
    if base == "prompt-lookup":
        return GenerateArm(name, model, prompt_lookup_num_tokens=int(number or _LOOKUP_TOKENS))
    if base == "assisted":
        if assistant is None:
            return _Absent(name, "transformers", "no assistant model was given")
        return GenerateArm(name, model, assistant=assistant)
    if base == "arctic":
        made = _arctic_factory()
        if made is None:
            return _Absent(name, "arctic", "arctic-inference is not installed")
        return EngineArm(name, model, made, budget=budget, kind="arctic", **options)
    return EngineArm(name, model, base, budget=budget, **options)


def _arctic_factory() -> Callable[[], ArcticDrafter] | None:
    try:
        module = importlib.import_module("arctic_inference.suffix_decoding")
    except ImportError:
        return None
    return lambda: ArcticDrafter(module.SuffixDecodingCache())
