"""Runs the same requests in different ways, each way once, and remembers the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from specdec.build import build_engine, name_drafter
from specdec.check.hostile import HostileDrafter
from specdec.check.prompts import Prompt
from specdec.check.settings import GREEDY, Setting
from specdec.errors import UnsupportedError
from specdec.placement import device_of
from specdec.types import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.drafters.checkpoint import PendingDrafter
    from specdec.engine import Engine
    from specdec.protocols import Drafter, Observer
    from specdec.routes import Route

__all__ = ["GENERATE", "HOSTILE", "PLAIN", "EngineFactory", "Lab", "Outputs", "Plan"]

PLAIN: Final = "plain"  # this engine without drafts, one request at a time
GENERATE: Final = "generate"  # transformers
HOSTILE: Final = "random-tree"  # see ``specdec.check.hostile``

# Called as ``build_engine`` is; a test puts a broken part into what that returns.
EngineFactory = Callable[..., "Engine"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Request id -> new tokens, and how many of the steps' tokens were drafted ones."""

    token_ids: dict[str, list[int]]
    num_steps: int = 0
    num_accepted: int = 0

    @property
    def acceptance_length(self) -> float | None:
        """Mean over all steps; None without an engine."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decoded, and within which limits.

    Args:
        prompts: continued under every setting.
        stop_token_ids: the model's own end-of-sequence tokens.
        max_new_tokens: per output.
        max_length: the engines' limit; no request is longer.
        budget: draft tokens per step.
        batch_size: requests at a time.
        num_seeds: seeds per prompt when sampling.
    """

    prompts: Sequence[Prompt]
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    max_length: int
    budget: int
    batch_size: int
    num_seeds: int

    def requests(self, setting: Setting) -> list[Request]:
        """Every prompt, with every seed if the setting draws."""
        seeds = range(self.num_seeds if setting.temperature else 1)
        return [
            Request(
                f"{prompt.name}, seed {seed}" if setting.temperature else prompt.name,
                prompt.token_ids,
                setting.sampling(seed=seed, max_new_tokens=self.max_new_tokens, stop_token_ids=self.stop_token_ids),
            )
            for seed in seeds
            for prompt in self.prompts
        ]


@dataclass(slots=True)
class Lab:
    """One model in one precision, and the outputs that it gave.

    Args:
        model: in evaluation mode.
        plan: what to decode.
        route: the path that the model takes.
        engine_factory: makes engines.
        on_request: called after each finished request.
        tokenizer: the model's, for drafters with a checkpoint.
    """

    model: PreTrainedModel
    plan: Plan
    route: Route
    engine_factory: EngineFactory = build_engine
    on_request: Callable[[], None] = lambda: None
    tokenizer: PreTrainedTokenizerBase | None = None
    _pending: dict[str, Drafter | PendingDrafter] = field(default_factory=dict)  # checkpoints are loaded once
    _outputs: dict[tuple[str, str], Outputs] = field(default_factory=dict)

    def outputs(self, setting: Setting, decoder: str) -> Outputs:
        """What ``decoder`` (PLAIN, GENERATE or a drafter's name) gives for all requests of a setting; run once."""
        key = (setting.name, decoder)
        if key not in self._outputs:
            self._outputs[key] = self._run(setting, decoder)
        return self._outputs[key]

    def decode(
        self,
        requests: Sequence[Request],
        drafter: str | Drafter | PendingDrafter,
        *,
        budget: int | None = None,
        batch_size: int | None = None,
        observers: Sequence[Observer] = (),
        tamper: Callable[[Engine], None] | None = None,
    ) -> Outputs:
        """Run requests through a new engine.

        Args:
            requests: what to continue, none longer than the plan's longest.
            drafter: a name that ``build_engine`` knows, or an object.
            budget: None: the plan's.
            batch_size: None: the plan's.
            observers: see every step.
            tamper: breaks the engine before it runs.
        """
        size = self.plan.batch_size if batch_size is None else batch_size
        tokens = self.plan.budget if budget is None else budget
        engine = self.engine_factory(
            self.model,
            drafter,
            budget=tokens,
            observers=observers,
            tokenizer=self.tokenizer,
            route=self.route,
            max_batch_size=size,
            max_length=self.plan.max_length,
            kv_tokens=size * (self.plan.max_length + tokens + 1),
        )
        try:
            if tamper is not None:
                tamper(engine)
            return self._collect(engine, requests)
        finally:
            engine.close()

    def _collect(self, engine: Engine, requests: Sequence[Request]) -> Outputs:
        token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
        num_steps = num_accepted = 0
        for output in engine.generate(requests):
            token_ids[output.request_id] += output.new_ids
            if output.finish_reason is not None:
                num_steps += output.state.num_steps
                num_accepted += output.state.num_accepted
                self.on_request()
        return Outputs(token_ids, num_steps, num_accepted)

    def _run(self, setting: Setting, decoder: str) -> Outputs:
        requests = self.plan.requests(setting)
        if decoder == GENERATE:
            return self._generate(setting, requests)
        if decoder == PLAIN:
            return self.decode(requests, "none", budget=0, batch_size=1)
        return self.decode(requests, self.drafter(setting, decoder))

    def drafter(self, setting: Setting, name: str) -> str | Drafter | PendingDrafter:
        """What ``build_engine`` takes for a drafter's name; the hostile one is told the plain outputs."""
        if name != HOSTILE:
            return self._pending.setdefault(name, name_drafter(name)) if ":" in name else name
        plain = self.outputs(setting, PLAIN).token_ids
        vocab_size = int(self.model.config.get_text_config().vocab_size)
        return HostileDrafter({key: [ids] for key, ids in plain.items()}, vocab_size)

    def _generate(self, setting: Setting, requests: Sequence[Request]) -> Outputs:
        if setting != GREEDY:
            raise ValueError(f"transformers draws with noise of its own: {setting.name} cannot be compared with it")
        found: dict[str, list[int]] = {}
        with _neutral_generation(self.model, self.plan.stop_token_ids):
            for request in requests:
                found[request.request_id] = self._generate_one(request)
                self.on_request()
        return Outputs(found)

    def _generate_one(self, request: Request) -> list[int]:
        input_ids = torch.from_numpy(request.prompt_ids.astype("int64"))[None].to(device_of(self.model))
        try:
            output: Any = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=request.sampling.max_new_tokens,
            )
        except Exception as error:
            raise UnsupportedError(
                f"model.generate cannot serve as the reference: {type(error).__name__}: {error}"
            ) from error
        ids: list[int] = output[0, input_ids.shape[1] :].tolist()
        return ids


@contextmanager
def _neutral_generation(model: Any, stop_token_ids: tuple[int, ...]) -> Iterator[None]:
    """Without the model's own sampling defaults and penalties, which would apply to greedy decoding too."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=list(stop_token_ids) or None, pad_token_id=stop_token_ids[0] if stop_token_ids else 0
    )
    try:
        yield
    finally:
        model.generation_config = before
