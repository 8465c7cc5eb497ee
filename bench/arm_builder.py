"""The arms by name, ours and the peers'; a peer that is not installed gives an arm that says so.

arctic-inference's suffix tree is measured inside our engine, as a drafter: same target, same verification, other tree.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench.arms import Arm, EngineArm, EngineFactory, GenerateArm, Job, JobResult
from specdec.bench.results_schema import at_load
from specdec.bench.scripted import scripted_engine
from specdec.build import DRAFTER_KINDS, DRAFTERS, build_engine, drafter_names, model_max_length
from specdec.drafters import checkpoint
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import DrafterNeeds
from specdec.rope import freeze_rope
from specdec.routes import choose_route
from specdec.types import DraftTree, RequestState, StepEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PEERS", "TEXT_DRAFTERS", "ArcticDrafter", "arm_names", "build_arms", "build_simulated_arms", "short_name"]

_OTHER_ENGINES = ("generate", "prompt-lookup", "assisted")
PEERS = (*_OTHER_ENGINES, "arctic")
TEXT_DRAFTERS = ("ngram", "suffix", "lookahead")  # they read tokens and nothing else, so a simulation can judge them
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

    concurrency = 1

    def __init__(self, name: str, kind: str, reason: str) -> None:
        self.name, self.kind, self._reason = name, kind, reason

    def reset(self) -> None:
        """Nothing is kept."""

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing is learned."""

    def close(self) -> None:
        """It holds nothing."""

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        raise UnsupportedError(self._reason)


def arm_names() -> list[str]:
    """Every name that ``build_arms`` knows, beside ``KIND:PATH`` of checkpoints."""
    return ["plain", *sorted(name for name in DRAFTERS if name != "none"), *PEERS]


def build_arms(
    names: Sequence[str],
    model: PreTrainedModel,
    *,
    budget: int | None = None,
    assistant: Any = None,
    concurrency: Sequence[int] = (1,),
    kv_tokens: int | None = None,
    overlap: str = "auto",
) -> list[Arm]:
    """The arms, those of transformers first; each number of ``concurrency`` gives ours again, as ``NAME xN`` above 1.

    Args:
        names: of arms; ``plain`` is our engine without a drafter, ``NAME@4`` gives one arm another budget.
        model: the target of all; arms of transformers get a copy where other arms would pack its weights.
        budget: most draft tokens per step of our drafters; None: follows what is accepted.
        assistant: the small model of ``assisted``.
        concurrency: requests at a time.
        kv_tokens: of an engine, for each request at a time.
        overlap: of drafting and verification in our engines; see ``EngineConfig``.

    Raises:
        ConfigError: an unknown or repeated name, or a budget that is none.
    """
    _check(names)
    # Engines pack the weights of a model on the CPU; what transformers does is measured on a model that nobody changed.
    peers = [name for name in names if name.partition("@")[0] in _OTHER_ENGINES]
    unchanged = copy.deepcopy(model) if peers and len(peers) < len(names) else model
    # Engines look for the best path of the model when they are built; it is the same for all.
    with freeze_rope(model, model_max_length(model)):
        route = choose_route(model, max_length=model_max_length(model))
    # Speculation of transformers takes one request at a time, so its arms have no place in a sweep.
    arms: list[Arm] = [_peer(name, unchanged, assistant) for name in peers]
    for number in concurrency:
        held = None if kv_tokens is None else number * kv_tokens
        make = partial(build_engine, model, route=route, kv_tokens=held, overlap=overlap)
        arms += [_ours(name, make, budget, number) for name in names if name not in peers]
    return arms


def build_simulated_arms(names: Sequence[str], vocab_size: int, *, budget: int | None = None) -> list[Arm]:
    """The arms of a simulation: drafters that read text; every other name gives an arm that says what it would need.

    Raises:
        ConfigError: as ``build_arms``.
    """
    _check(names)
    make = partial(scripted_engine, vocab_size)
    arms: list[Arm] = []
    for name in names:
        base, _, _ = name.partition("@")
        reads_text = all(part in TEXT_DRAFTERS for part in base.removeprefix("fused:").split("+"))
        if base in ("plain", "arctic") or reads_text:
            arms.append(_ours(name, make, budget, 1))
        else:
            reason = "it needs a model, which a simulation does not have: replay or live can measure it"
            arms.append(_Absent(name, "transformers" if base in PEERS else "specdec", reason))
    return arms


def _check(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ConfigError(f"arms must have different names, got {', '.join(names)}")
    for name in names:
        base, _, number = name.partition("@")
        if base not in arm_names() and not _is_checkpoint(base):
            known = dict.fromkeys([*arm_names(), *drafter_names()])
            raise ConfigError(f"arm must be one of {', '.join(known)}, got {name!r}")
        if "@" in name and not (number.isdecimal() and int(number) >= 1):
            raise ConfigError(f"the number behind @ must be a budget >= 1, got {name!r}")


def _is_checkpoint(base: str) -> bool:
    kind = checkpoint.kind_in(base, DRAFTER_KINDS)
    return (
        kind is not None and kind in DRAFTER_KINDS and bool(base.partition(":")[2]) == bool(DRAFTER_KINDS[kind].takes)
    )


def short_name(name: str) -> str:
    """An arm's name without the folder of its checkpoint: where that lies is nobody's business."""
    base, mark, number = name.partition("@")
    return f"{checkpoint.short_name(base)}{mark}{number}"


def _peer(name: str, model: PreTrainedModel, assistant: Any) -> Arm:
    base, _, number = name.partition("@")
    if base == "generate":
        return GenerateArm(name, model)
    if base == "prompt-lookup":
        return GenerateArm(name, model, prompt_lookup_num_tokens=int(number or _LOOKUP_TOKENS))
    if assistant is None:
        return _Absent(name, "transformers", "no assistant model was given")
    return GenerateArm(name, model, assistant=assistant)


def _ours(name: str, make: EngineFactory, budget: int | None, concurrency: int) -> Arm:
    base, _, number = name.partition("@")
    full = at_load(short_name(name), f"x{concurrency}" if concurrency > 1 else "")
    options: Mapping[str, Any] = {"budget": int(number) if number else budget, "concurrency": concurrency}
    if base == "plain":
        return EngineArm(full, make, "none", **{**options, "budget": 0})
    if base == "arctic":
        made = _arctic_factory()
        if made is None:
            return _Absent(full, "arctic", "arctic-inference is not installed")
        return EngineArm(full, make, made, kind="arctic", **options)
    return EngineArm(full, make, base, **options)


def _arctic_factory() -> Callable[[], ArcticDrafter] | None:
    try:
        module = importlib.import_module("arctic_inference.suffix_decoding")
    except ImportError:
        return None
    return lambda: ArcticDrafter(module.SuffixDecodingCache())
