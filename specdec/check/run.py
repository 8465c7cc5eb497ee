"""The whole check, in the order in which it makes sense to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final

from specdec.build import build_engine, drafter_names, model_max_length, name_drafter
from specdec.check.controls import MAX_SAMPLES, NUM_REQUESTS, run_controls
from specdec.check.difference import Judge
from specdec.check.lab import GENERATE, HOSTILE, PLAIN, EngineFactory, Lab, Plan
from specdec.check.laws import compare_laws
from specdec.check.prompts import BUILTIN_PROMPTS, Prompt, encode
from specdec.check.report import CheckReport, Comparison, Control, TwoSample
from specdec.check.rounding import tie_rule
from specdec.check.settings import GREEDY, LAWS, SAMPLED
from specdec.errors import ConfigError, UnsupportedError
from specdec.placement import device_of
from specdec.rope import freeze_rope
from specdec.routes import Route, choose_route
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CheckOptions", "check_drafters", "check_model"]

_LEAST_LAW_TOKENS: Final = 4  # a prompt of the two-sample test is short, but not so short that it says nothing

_LEAST_LENGTH: Final = 128  # tokens: a route is chosen by trying sequences that need some room

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """How much is checked.

    Args:
        drafters: names; "random-tree" is hostile, "none" decodes without drafts in a ragged batch.
        max_new_tokens: per output.
        budget: draft tokens per step.
        batch_size: requests at a time; prompts have different lengths, so the batch is ragged.
        num_seeds: per prompt and sampled setting; 0 leaves sampling out.
        num_samples: of each side of the two-sample tests; 0 leaves them out.
        has_controls: also run broken engines, which must be caught.
        is_strict: engines run with ``numerics="strict"``, and a difference from plain decoding is a bug, never a tie.

    Raises:
        ConfigError: a value is outside its rule.
    """

    drafters: tuple[str, ...] = ("none", "ngram", HOSTILE)
    max_new_tokens: int = 48
    budget: int = 8
    batch_size: int = 5
    num_seeds: int = 2
    num_samples: int = 500
    has_controls: bool = True
    is_strict: bool = False

    def __post_init__(self) -> None:
        check_drafters(self.drafters)
        for name, least in (("max_new_tokens", 8), ("budget", 1), ("batch_size", 1), ("num_seeds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.num_samples != 0 and self.num_samples < 20:
            raise ConfigError(f"num_samples must be 0 (off) or >= 20, got {self.num_samples}")


def check_drafters(names: Sequence[str]) -> None:
    """Refuse names that are no drafter.

    Raises:
        ConfigError: an unknown name, or none at all.
        LoadError: a checkpoint is not there.
    """
    known = [HOSTILE, *drafter_names()]
    unknown = [name for name in names if name not in known and ":" not in name]
    if unknown or not names:
        raise ConfigError(f"drafter must be one of {', '.join(known)}, got {', '.join(map(repr, unknown)) or 'none'}")
    for name in names:
        if ":" in name:
            name_drafter(name)


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "model",
    texts: Mapping[str, str] = BUILTIN_PROMPTS,
    options: CheckOptions | None = None,
    engine_factory: EngineFactory | None = None,
    on_progress: Progress | None = None,
) -> CheckReport:
    """Find out on this machine whether speculation changes the output of ``model``.

    Greedy outputs are compared with plain decoding and with ``model.generate``, sampled ones with plain decoding under
    the same seed, token for token; then the engine's law is compared with that of an ordinary sampler.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        name: for the report.
        texts: name -> prompt.
        options: how much is checked.
        engine_factory: called in place of ``specdec.build.build_engine``.
        on_progress: told what is going on.

    Raises:
        ConfigError: no prompt is usable.
        UnsupportedError: the engine, or ``model.generate``, cannot run this model.
    """
    options = options or CheckOptions()
    factory = engine_factory or build_engine
    if options.is_strict:
        factory = partial(factory, numerics="strict")
    return _Check(model, tokenizer, texts, options, factory, on_progress).run(name)


class _Check:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
        options: CheckOptions,
        engine_factory: EngineFactory,
        on_progress: Progress | None,
    ) -> None:
        self.options = options
        limit = model_max_length(model)
        if limit <= options.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens must leave room for a prompt in the context of {limit} tokens, "
                f"got {options.max_new_tokens}"
            )
        vocab_size = int(model.config.get_text_config().vocab_size)
        prompts, notes = encode(
            dict(texts), tokenizer, vocab_size=vocab_size, max_tokens=limit - options.max_new_tokens
        )
        longest = max(len(prompt.token_ids) for prompt in prompts) + options.max_new_tokens
        plan = Plan(
            prompts=prompts,
            stop_token_ids=_stop_ids(model),
            max_new_tokens=options.max_new_tokens,
            max_length=min(limit, max(longest, _LEAST_LENGTH)),
            budget=options.budget,
            batch_size=options.batch_size,
            num_seeds=options.num_seeds,
        )
        with freeze_rope(model, plan.max_length):
            route = choose_route(model, max_length=plan.max_length)
        if route.kind == "refused":
            raise UnsupportedError(f"{type(model).__name__} cannot be checked: {' '.join(route.reasons)}")
        self.lab = Lab(model, plan, route, engine_factory, self._advance, tokenizer)
        self.judge = Judge(self.lab, tokenizer, list(notes), is_strict=options.is_strict)
        self._on_progress = on_progress
        self._what, self._num_done, self._num_units = "", 0, self._count_units(prompts)

    def run(self, name: str) -> CheckReport:
        # One rule for all: an engine freezes RoPE that follows the length, so model.generate has to run with it frozen.
        with freeze_rope(self.lab.model, self.lab.plan.max_length) as freeze:
            self.judge.notes.extend(freeze.notices)
            return self._run(name)

    def _run(self, name: str) -> CheckReport:
        begin = perf_counter()
        model = self.lab.model
        comparisons = [*self._greedy(), *self._sampled()]
        tests = self._laws()
        controls: list[Control] = []
        if self.options.has_controls and self.lab.route.can_draft:
            self._what = "broken engines"
            controls = run_controls(self.judge, LAWS[-1], self._law_prompt(), num_samples=self.options.num_samples)
        return CheckReport(
            model=name,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(device_of(model)),
            path=self.lab.route.kind,
            tie_rule=tie_rule(model.dtype),
            comparisons=tuple(comparisons),
            two_samples=tuple(tests),
            controls=tuple(controls),
            notes=(*self.judge.notes, *_notes(self.lab.route)),
            seconds=perf_counter() - begin,
        )

    def _greedy(self) -> list[Comparison]:
        self._what = "greedy: model.generate"
        self.lab.outputs(GREEDY, GENERATE)
        comparisons = []
        for decoder in (PLAIN, *self.options.drafters):
            self._what = f"greedy: {decoder}"
            comparisons.append(self.judge.compare(GREEDY, decoder, GENERATE))
            if decoder != PLAIN:
                comparisons.append(self.judge.compare(GREEDY, decoder, PLAIN))
        return comparisons

    def _sampled(self) -> list[Comparison]:
        comparisons = []
        for setting in SAMPLED if self.options.num_seeds else ():
            for decoder in self.options.drafters:
                self._what = f"{setting.name}: {decoder}"
                comparisons.append(self.judge.compare(setting, decoder, PLAIN))
        return comparisons

    def _laws(self) -> list[TwoSample]:
        tests = []
        for setting in LAWS if self.options.num_samples else ():
            self._what = f"two samples: {setting.name}"
            tests.append(compare_laws(self.lab, setting, self._law_prompt(), num_samples=self.options.num_samples))
        return tests

    def _law_prompt(self) -> IntArray:
        """The shortest prompt that says something: many are prefilled."""
        by_length = sorted(self.lab.plan.prompts, key=lambda prompt: len(prompt.token_ids))
        return next((p for p in by_length if len(p.token_ids) >= _LEAST_LAW_TOKENS), by_length[-1]).token_ids

    def _count_units(self, prompts: Sequence[Prompt]) -> int:
        """Requests that all runs together finish."""
        options = self.options
        greedy = len(prompts) * (2 + len(options.drafters))
        sampled = len(SAMPLED) * options.num_seeds * len(prompts) * (1 + len(options.drafters))
        laws = len(LAWS) * options.num_samples
        controls = min(len(prompts), NUM_REQUESTS) + min(options.num_samples, MAX_SAMPLES)
        return greedy + sampled + laws + controls * options.has_controls

    def _advance(self) -> None:
        self._num_done = min(self._num_done + 1, self._num_units)
        if self._on_progress is not None:
            self._on_progress(self._what, self._num_done, self._num_units)


def _stop_ids(model: PreTrainedModel) -> tuple[int, ...]:
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return tuple(int(token_id) for token_id in ids)


def _notes(route: Route) -> list[str]:
    if not route.can_draft:
        return ["this model only decodes plainly: no draft was verified, so there was nothing to go wrong"]
    if route.kind != "tree":
        return [f"this model takes the {route.kind} path: of every draft tree, one chain was verified"]
    return []
