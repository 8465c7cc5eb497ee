"""Several specialised draft models for one target: requests are routed among them, and the surest speaks for all.

A request is drafted for by the models that have served it best. At every node of its tree the chance of a token is the
largest that any of its models gives it, and all of them go on from the nodes that were chosen, so a model that is sure
corrects the others in the middle of a draft, and every model's own best path stays in the tree beside the fused one.

Source: CoSine (2503.10325): routing by confidence and agreement, joined harmonically and kept as a moving average, with
exploration while little is accepted; confidence-based token fusion. Different here: agreement is told by tokens instead
of their embeddings, and the union of paths is chosen by value within the budget. Under the match rule the text cannot
depend on any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.growing import Growth
from specdec.drafters.lm import LmDrafter
from specdec.errors import ConfigError
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["CommitteeDrafter", "CommitteeModel", "Router", "Scorer"]

_NEWEST = 0.15  # share of a step in a model's score and in a request's accepted tokens
_CURIOUS_BELOW = 1.0  # accepted tokens per step under which other models are tried


class Scorer(Protocol):
    """What a committee asks of a member; see ``DraftModel``."""

    max_length: int
    vocab_size: int

    def read(self, request_ids: Sequence[str], texts: Sequence[IntArray]) -> tuple[list[int], Tensor]:
        """Read texts: which could be read, and the logits after them."""

    def grow(self, growths: Sequence[Growth]) -> Tensor | None:
        """Score new nodes."""

    def drop(self, request_ids: Sequence[str]) -> None:
        """Drop trees."""

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


class Router:
    """Which models draft for a request.

    Args:
        num_models: M.
        per_request: how many of them draft for one request, in [1, M].
        seed: of the exploration.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, num_models: int, *, per_request: int = 2, seed: int = 0) -> None:
        if not 1 <= per_request <= num_models:
            raise ConfigError(f"per_request must be in [1, {num_models}], got {per_request}")
        self._num_models, self._per_request = num_models, per_request
        self._rng = np.random.default_rng(seed)
        self._scores: dict[str, np.ndarray] = {}  # by request, [M]; infinite: not tried yet
        self._counts: dict[str, np.ndarray] = {}
        self._accepted: dict[str, float] = {}

    def pick(self, request_id: str) -> list[int]:
        """The models of a request's next draft, ascending."""
        scores = self._scores.get(request_id)
        if scores is None or self._accepted.get(request_id, 0.0) < _CURIOUS_BELOW:
            return sorted(self._rng.choice(self._num_models, self._per_request, replace=False).tolist())
        return sorted(np.argsort(-scores, kind="stable")[: self._per_request].tolist())

    def note(self, request_id: str, model: int, confidence: float, agreed: bool) -> None:
        """A model's best guess had this probability, and was right or not."""
        scores = self._scores.setdefault(request_id, np.full(self._num_models, np.inf))
        counts = self._counts.setdefault(request_id, np.zeros(self._num_models))
        agreement = 1.0 if agreed else 0.0
        score = 2 * confidence * agreement / max(confidence + agreement, 1e-9)
        counts[model] += 1
        before = 0.0 if np.isinf(scores[model]) else scores[model]
        scores[model] = before + max(_NEWEST, 1 / counts[model]) * (score - before)

    def note_accepted(self, request_id: str, accepted: int) -> None:
        """So many tokens of a request's draft were accepted."""
        before = self._accepted.get(request_id, 0.0)
        self._accepted[request_id] = before + _NEWEST * (accepted - before)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request."""
        self._scores.pop(request_id, None)
        self._counts.pop(request_id, None)
        self._accepted.pop(request_id, None)


class CommitteeModel:
    """Some draft models as one scorer: of each request those that the router picks.

    Args:
        models: with the same tokens.
        router: picks.

    Raises:
        ConfigError: no model, or vocabularies of different sizes.
    """

    def __init__(self, models: Sequence[Scorer], router: Router) -> None:
        sizes = {model.vocab_size for model in models}
        if len(sizes) != 1:
            raise ConfigError(f"a committee needs models with one vocabulary, got sizes {sorted(sizes)}")
        self.models, self.router = list(models), router
        self.vocab_size = sizes.pop()
        self.max_length = min(model.max_length for model in models)
        self.guesses: dict[str, list[tuple[int, int, float]]] = {}  # request -> (model, best token, its probability)
        self._members: dict[str, list[int]] = {}

    def read(self, request_ids: Sequence[str], texts: Sequence[IntArray]) -> tuple[list[int], Tensor]:
        best: dict[int, Tensor] = {}
        picks = [self.router.pick(request_id) for request_id in request_ids]
        for request_id in request_ids:
            self._members[request_id], self.guesses[request_id] = [], []
        for number, model in enumerate(self.models):
            mine = [row for row, picked in enumerate(picks) if number in picked]
            if not mine:
                continue
            served, logits = model.read([request_ids[row] for row in mine], [texts[row] for row in mine])
            laws = logits.float().log_softmax(dim=-1)
            for place, law in zip(served, laws, strict=True):
                row = mine[place]
                self._members[request_ids[row]].append(number)
                self.guesses[request_ids[row]].append((number, int(law.argmax()), float(law.max().exp())))
                best[row] = law if row not in best else torch.maximum(best[row], law)
        rows = sorted(best)
        return rows, torch.stack([best[row] for row in rows]) if rows else torch.empty(0, self.vocab_size)

    def grow(self, growths: Sequence[Growth]) -> Tensor | None:
        best: dict[str, Tensor] = {}
        for number, model in enumerate(self.models):
            mine = [growth for growth in growths if number in self._members[growth.request_id]]
            logits = model.grow(mine) if mine else None
            if logits is None:  # its cache is full: it has nothing more to say to these
                for growth in mine:
                    self._members[growth.request_id].remove(number)
                continue
            laws = logits.float().log_softmax(dim=-1).split([len(growth.token_ids) for growth in mine])
            for growth, law in zip(mine, laws, strict=True):
                seen = best.get(growth.request_id)
                best[growth.request_id] = law if seen is None else torch.maximum(seen, law)
        if any(growth.request_id not in best for growth in growths):
            return None
        return torch.cat([best[growth.request_id] for growth in growths])

    def drop(self, request_ids: Sequence[str]) -> None:
        for model in self.models:
            model.drop(request_ids)

    def release(self, request_ids: Sequence[str]) -> None:
        for model in self.models:
            model.release(request_ids)
        for request_id in request_ids:
            self.guesses.pop(request_id, None)
            self._members.pop(request_id, None)
            self.router.forget(request_id)


class CommitteeDrafter:
    """Drafts with a committee (`specdec.protocols.Drafter`).

    Args:
        model: the committee.
        vocab_size: of the target.
        **options: of ``LmDrafter``.
    """

    def __init__(self, model: CommitteeModel, *, vocab_size: int, **options: float) -> None:
        self.needs = DrafterNeeds(needs_match=True)
        self.model = model
        self._inner = LmDrafter(model, vocab_size=vocab_size, **options)  # type: ignore[arg-type]

    def start(self, states: Sequence[RequestState]) -> None:
        self._inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return self._inner.propose(states, budgets)

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            request_id, result = event.state.request_id, event.result
            right = int(result.accepted_ids[0]) if result.num_accepted else result.bonus_id
            for model, guess, confidence in self.model.guesses.pop(request_id, []):
                self.model.router.note(request_id, model, confidence, guess == right)
            if event.tree.num_draft_tokens:
                self.model.router.note_accepted(request_id, result.num_accepted)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._inner.stop(request_ids)
