"""The loop: plan, propose, forward, verify, commit, observe. One step serves every running request once.

The engine knows contracts only; ``specdec.build`` puts concrete parts together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from specdec.config import EngineConfig
from specdec.device_work import Clock, DeviceClock
from specdec.errors import InternalError, RequestError, UnsupportedError
from specdec.overlap import StepOverlap
from specdec.protocols import Controller, Drafter, Observer, TargetModel, Verifier
from specdec.readings import HiddenStates
from specdec.scheduler import Part, Scheduler
from specdec.step_events import step_events
from specdec.stopping import StopChecker
from specdec.types import (
    Chunk,
    DraftTree,
    FinishReason,
    IntArray,
    Request,
    RequestOutput,
    RequestState,
    TargetOutput,
    VerifyResult,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Engine"]


class Engine:
    """Decodes many requests with one target, the same tokens whatever drafter and controller guess.

    Not thread-safe: one thread owns an engine.

    Args:
        target: the model; it owns the KV.
        verifier: decides what the target would have produced.
        drafter: guesses.
        controller: decides how much is guessed.
        tokenizer: for stop strings only.
        config: limits.
        observers: see every step.
        on_close: called once by ``close``.
        clock: of the target's device; None: the wall's.
        overlap: lets drafting and verification overlap; None: one after the other.

    Raises:
        UnsupportedError: the drafter needs what this target or verifier does not give.
    """

    def __init__(
        self,
        target: TargetModel,
        verifier: Verifier,
        drafter: Drafter,
        controller: Controller,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: EngineConfig | None = None,
        observers: Sequence[Observer] = (),
        on_close: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
        overlap: StepOverlap | None = None,
    ) -> None:
        wanted = drafter.needs.hidden_layers
        if wanted and wanted != getattr(target, "hidden_layers", ()):
            raise UnsupportedError(f"{type(drafter).__name__} reads hidden states, which this target does not give")
        _check_pair(verifier, drafter)
        self.target = target
        self.verifier = verifier
        self.drafter = drafter
        self.controller = controller
        self.tokenizer = tokenizer
        self.observers = list(observers)
        self.scheduler = Scheduler(target, config or EngineConfig())
        self._states: dict[str, RequestState] = {}
        self._stops: dict[str, StopChecker] = {}
        self._outbox: list[RequestOutput] = []
        self._on_close = on_close
        self._clock = clock or DeviceClock(torch.device("cpu"))
        self.overlap = overlap

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is live and give the model back as it was; the engine must not be used afterwards."""
        self._finish([(state, "cancelled") for state in list(self._states.values())])
        if self.overlap is not None:
            self.overlap.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    @property
    def has_work(self) -> bool:
        """True while a step could bring something: a request is live or an output waits."""
        return bool(self._states or self._outbox)

    def submit(self, request: Request) -> RequestState:
        """Queue a request; it takes part from the next step that has room for it.

        Raises:
            RequestError: the request breaks a rule; nothing was kept.
        """
        self._check(request)
        state = RequestState(request)
        stop = StopChecker(
            request.sampling,
            num_prompt_tokens=state.num_prompt_tokens,
            max_length=self.target.max_length,
            tokenizer=self.tokenizer,
        )
        self.verifier.start(state)
        try:
            self.drafter.start([state])
        except BaseException:
            self.verifier.stop([state.request_id])
            raise
        self._states[request.request_id] = state
        self._stops[request.request_id] = stop
        self.scheduler.add(state)
        return state

    def cancel(self, request_id: str) -> bool:
        """End a request now; its last output comes with the next step. False if it is not live."""
        state = self._states.get(request_id)
        if state is None:
            return False
        self._finish([(state, "cancelled")])
        self._outbox.append(RequestOutput(request_id, [], "cancelled", state))
        return True

    def generate(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Submit ``requests`` and stream their tokens until all are done; closing the iterator cancels the rest."""
        mine: set[RequestState] = set()
        try:
            for request in requests:
                mine.add(self.submit(request))
            while mine:
                outputs = self.step()
                own = [output for output in outputs if output.state in mine]
                self._outbox += [output for output in outputs if output.state not in mine]  # somebody else's
                for output in own:
                    if output.finish_reason is not None:
                        mine.discard(output.state)
                    yield output
        finally:
            self._finish([(state, "cancelled") for state in mine if not state.is_finished])
            self._outbox = [output for output in self._outbox if output.state not in mine]

    def step(self) -> list[RequestOutput]:
        """Serve every running request once; the new tokens.

        An exception of a user's processor, criterion or observer passes through; requests of the step keep their
        tokens, lose their KV, and go on with the next step unless they are cancelled.
        """
        outputs, self._outbox = self._outbox, []
        self.scheduler.admit()
        parts: Sequence[Part] = self.scheduler.plan()
        if not parts:
            return outputs
        if self.overlap is not None:
            parts = self.overlap.select(parts)
        try:
            try:
                self._run(parts, outputs)
            finally:  # whatever failed: a request that has its last token must not go on
                self._finish([(out.state, out.finish_reason) for out in outputs if out.finish_reason is not None])
        except BaseException:
            for part in parts:
                self.scheduler.reset(part.state)
            self._outbox = outputs + self._outbox
            raise
        return outputs

    def _run(self, parts: Sequence[Part], outputs: list[RequestOutput]) -> None:
        times = [perf_counter()]
        trees = self._propose(parts)
        times.append(perf_counter())
        chunks = self.scheduler.reserve(parts, trees)
        if not chunks:
            return
        begin = self._clock.mark()
        output = self.target.forward(chunks) if self.overlap is None else self.overlap.forward(self.target, chunks)
        end = self._clock.mark()
        decoding = _verified([chunk for chunk in chunks if chunk.tree is not None], output)
        results = self._verify(decoding, output)
        times.append(perf_counter())
        emitted = self._commit(chunks, decoding, results, output, outputs)
        times.append(perf_counter())
        # Verification has waited for the device, so both marks are behind.
        target_ms = self._clock.ms(begin, end) if decoding else 0.0
        events = step_events(decoding, output, results, emitted, times, target_ms)
        observers: list[Controller | Drafter | Observer] = [self.controller, self.drafter, *self.observers]
        if self.overlap is not None:
            observers.insert(0, self.overlap)
        for observer in observers:
            observer.observe(events)
        for chunk in decoding:
            chunk.state.successors = []

    def _propose(self, parts: Sequence[Part]) -> dict[str, DraftTree]:
        states = [part.state for part in parts if part.decodes]
        if not states:
            return {}
        budgets = self.controller.plan(states, self.scheduler.load(parts))
        if len(budgets) != len(states) or min(budgets) < 0:
            raise InternalError(f"the controller must plan a budget >= 0 for each of {len(states)} requests: {budgets}")
        # The last token that may come is never drafted: it would be the bonus token in any case.
        limits = [
            min(budget, self.target.max_draft_tokens, self._num_left(state) - 1)
            for budget, state in zip(budgets, states, strict=True)
        ]
        if self.overlap is not None:
            trees = self.overlap.propose(self.drafter, states, limits)
        else:
            trees = self.drafter.propose(states, limits)
            for state in states:
                state.hidden = None
        self._check_trees(states, trees, limits)
        if not self.target.supports_trees:
            trees = [tree.to_chain() for tree in trees]
        trees = list(self.controller.admit(states, trees))
        if self.overlap is not None:
            trees = self.overlap.split(states, trees)
        return {state.request_id: tree for state, tree in zip(states, trees, strict=True)}

    def _check_trees(self, states: Sequence[RequestState], trees: Sequence[DraftTree], limits: Sequence[int]) -> None:
        """What would corrupt the text silently or break the target; the target checks the parents as it reads them."""
        if len(trees) != len(states):
            raise InternalError(f"the drafter must propose one tree for each of {len(states)} requests: {len(trees)}")
        for state, tree, limit in zip(states, trees, limits, strict=True):
            num_nodes = len(tree.token_ids)
            if not 1 <= num_nodes <= limit + 1 or len(tree.parents) != num_nodes:
                raise InternalError(
                    f"the drafter was allowed {limit} draft tokens and proposed {num_nodes - 1}, "
                    f"with {len(tree.parents)} parents"
                )
            last, root = state.token_ids[-1], tree.token_ids[0]
            if root != last:
                raise InternalError(f"the root of a draft must be the last token, {last}, but it is {root}")
        token_ids = np.concatenate([tree.token_ids for tree in trees])
        if token_ids.min() < 0 or token_ids.max() >= self.target.vocab_size:
            bad = token_ids[(token_ids < 0) | (token_ids >= self.target.vocab_size)][0]
            raise InternalError(f"draft token ids must be in [0, {self.target.vocab_size}), got {bad}")

    def _num_left(self, state: RequestState) -> int:
        by_request = state.request.sampling.max_new_tokens - state.num_output_tokens
        return min(by_request, self.target.max_length - state.num_tokens)

    def _verify(self, decoding: Sequence[Chunk], output: TargetOutput) -> list[VerifyResult]:
        if not decoding:
            return []
        states = [chunk.state for chunk in decoding]
        trees = [chunk.tree for chunk in decoding if chunk.tree is not None]
        return self.verifier.verify(states, trees, output)

    def _commit(
        self,
        chunks: Sequence[Chunk],
        decoding: Sequence[Chunk],
        results: Sequence[VerifyResult],
        output: TargetOutput,
        outputs: list[RequestOutput],
    ) -> list[IntArray]:
        """Cut each result at its first stop, keep the KV of what stays, append the tokens; what each request got."""
        keep: dict[str, list[int]] = {}
        emitted: list[tuple[list[int], FinishReason | None]] = []
        for row, (chunk, result) in enumerate(zip(decoding, results, strict=True)):
            new_ids = [*result.accepted_ids.tolist(), result.bonus_id]
            try:
                count, reason = self._stops[chunk.state.request_id].cut(chunk.state.token_ids, new_ids)
            except Exception as error:
                error.add_note(f"raised by the stopping criteria of request {chunk.state.request_id!r}")
                raise
            emitted.append((new_ids[:count], reason))
            # The last emitted token is the next root: its KV is not kept, also where it was a draft token.
            path = result.accepted_nodes[: count - 1].tolist()
            if output.kept_nodes is not None:
                path = output.kept_nodes[row][path].tolist()  # as the target counts them
            keep[chunk.state.request_id] = [0, *path]
        kept = [keep.get(chunk.state.request_id, []) for chunk in chunks]
        self.target.commit(chunks, kept)
        for chunk, nodes in zip(chunks, kept, strict=True):
            chunk.state.num_cached += len(chunk.prefix_ids) + len(nodes)
        _hand_on_hidden(chunks, kept, output)
        for chunk, found in zip(chunks, output.successors, strict=False):  # none at all, or one for each chunk
            if len(found.token_ids):
                chunk.state.successors.append(found)
        for chunk, result, (ids, reason) in zip(decoding, results, emitted, strict=True):
            state = chunk.state
            self.verifier.commit(state, ids)
            state.append(ids)
            state.num_steps += 1
            state.num_drafted += chunk.tree.num_draft_tokens if chunk.tree is not None else 0
            state.num_accepted += min(result.num_accepted, len(ids))
            # At once, so that no token which a state holds can miss its output.
            outputs.append(RequestOutput(state.request_id, ids, reason, state))
        return [np.array(ids, dtype=np.int32) for ids, _ in emitted]

    def _finish(self, ended: Sequence[tuple[RequestState, FinishReason]]) -> None:
        """Forget requests. Those that are no longer live are skipped: an observer may have cancelled one."""
        gone = []
        for state, reason in ended:
            if self._states.get(state.request_id) is state:
                del self._states[state.request_id], self._stops[state.request_id]
                state.finish_reason = reason
                self.scheduler.remove(state)
                gone.append(state.request_id)
        if gone:
            self.verifier.stop(gone)
            self.drafter.stop(gone)
            if self.overlap is not None:
                self.overlap.stop(gone)

    def _check(self, request: Request) -> None:
        ids, vocab_size = request.prompt_ids, self.target.vocab_size
        if request.request_id in self._states:
            raise RequestError(f"request_id must be unique among live requests, got {request.request_id!r} again")
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise RequestError(f"prompt token ids must be in [0, {vocab_size}), got {bad}")
        if len(ids) >= self.target.max_length:
            raise RequestError(
                f"the prompt must be shorter than the context of {self.target.max_length} tokens, got {len(ids)}"
            )
        needed = min(len(ids) + request.sampling.max_new_tokens, self.target.max_length)
        if not self.target.fits(needed):
            raise RequestError(
                f"one request must fit the KV pool, but this one may need {needed} tokens: raise kv_tokens"
            )


def _hand_on_hidden(chunks: Sequence[Chunk], kept: Sequence[Sequence[int]], output: TargetOutput) -> None:
    """Give each request the target's states at the tokens that were just cached, behind those it has not read yet."""
    if output.hidden is None:
        return
    start = 0
    for chunk, nodes in zip(chunks, kept, strict=True):
        num_prefix = len(chunk.prefix_ids)
        rows = [*range(start, start + num_prefix), *(start + num_prefix + node for node in nodes)]
        new, unread = output.hidden.at(rows), chunk.state.hidden
        if unread is not None:
            new = HiddenStates(new.layers, torch.cat((unread.rows, new.rows)))
        chunk.state.hidden = new
        start += chunk.num_tokens


def _verified(decoding: Sequence[Chunk], output: TargetOutput) -> list[Chunk]:
    """The chunks with what the target has left of their trees."""
    if output.kept_nodes is None:
        return list(decoding)
    return [
        chunk if chunk.tree is None else replace(chunk, tree=chunk.tree.subtree(nodes))
        for chunk, nodes in zip(decoding, output.kept_nodes, strict=True)
    ]


def _check_pair(verifier: Verifier, drafter: Drafter) -> None:
    """A rule that reads draft laws is lossless only for drafts that were drawn from them as it assumes."""
    if verifier.draws is None:
        return
    name, needs = type(drafter).__name__, drafter.needs
    if needs.needs_match or needs.draws is None:
        raise UnsupportedError(f"{name} needs the match rule: its drafts are not draws from laws that it states")
    if needs.draws not in verifier.draws:
        wanted = " or ".join(sorted(verifier.draws))
        raise UnsupportedError(f"this verifier needs drafts drawn as {wanted}, and {name} draws {needs.draws}")
