"""Why a drafter with a checkpoint is accepted as seldom as it is: acceptance, agreement, and named causes.

Acceptance comes from a few greedy continuations by the engine. For the causes the drafter is taught: it sees a text
and, for an EAGLE head, the target's true states, and should name the target's own choice after every token. That
*agreement* is then taken apart: over readings of the checkpoint, forms of the text, places in it, and the words that
the drafter knows at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from specdec.build import build_engine, model_max_length, name_drafter
from specdec.doctor.report import Acceptance, Agreement, DrafterReport, Problem
from specdec.drafters.checkpoint import PendingDrafter, short_name
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle_files import EagleFiles, read_files
from specdec.drafters.eagle_head import EagleConfig, EagleHead
from specdec.drafters.eagle_probe import Lesson, build_head, hits, probe_readings
from specdec.drafters.lm import LmDrafter
from specdec.drafters.lm_loading import tokenizer_of
from specdec.drafters.lm_text import TextLmDrafter
from specdec.drafters.probing import PROBE_TEXT, Reading, best_reading, differences
from specdec.errors import ConfigError
from specdec.types import Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.protocols import Drafter

__all__ = ["examine_drafter", "quantisation_of"]

_CLEARLY: Final = 0.1  # agreement that two texts must differ by before their difference is a cause
_KNOWN: Final = 0.95  # share of the target's words below which a reduced vocabulary is a cause
_WEAK: Final = 0.5  # agreement below which a quantised target is more than a note
_LONGEST: Final = 4096  # tokens of the longest text: one forward of the target keeps all its states
_BEYOND: Final = 64  # tokens beyond the training's length that say something
_NUM_PROBED: Final = 200  # tokens of a text, as many as loading a head looks at
_BUDGET: Final = 16
_NUM_NEW: Final = 48
_QUESTION: Final = "Write Python functions that return the largest and the smallest numbers of a list."
_AREAS: Final = {"hidden_layers": "layers", "norm_before_residual": "norm", "rope": "rope"}

# [T - 1] bool of a lesson: where the drafter names the target's choice
Guess = Callable[[Lesson], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A loaded drafter with its target, and two texts that the target has read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafter: Drafter
    pending: PendingDrafter
    lessons: dict[str, Lesson]  # by form of the text: "plain" and, with a template, "chat"


def examine_drafter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, drafter: str, *, name: str = "model"
) -> DrafterReport:
    """Measure a drafter with a checkpoint on a target, and name what keeps its acceptance low.

    Args:
        model: the target, a causal LM in evaluation mode.
        tokenizer: the target's.
        drafter: ``KIND:PATH?options``.
        name: of the target.

    Raises:
        ConfigError: it is no drafter with a checkpoint, or there is no tokenizer.
        LoadError: it cannot be read, or does not fit the target.
        UnsupportedError: it cannot draft for this target.
    """
    if tokenizer is None:
        raise ConfigError("a drafter is examined on text, and the model has no tokenizer")
    pending = name_drafter(drafter)
    if not isinstance(pending, PendingDrafter):
        raise ConfigError(f"only drafters with a checkpoint (KIND:PATH) can be examined, got {drafter!r}")
    lessons = {form: Lesson.of(model, ids[:_NUM_PROBED]) for form, ids in _texts(tokenizer).items()}
    case = _Case(model, tokenizer, pending.load(model, tokenizer), pending, lessons)
    acceptance = tuple(_acceptance(case, form, ids) for form, ids in _prompts(tokenizer).items())
    if isinstance(case.drafter, EagleDrafter) and isinstance(case.drafter.head, EagleHead):
        agreement, problems = _eagle(case, name)
    elif isinstance(case.drafter, LmDrafter) and isinstance(pending.source, Path):
        agreement, problems = _draft_model(case)
    else:
        agreement, problems = (), list(_foreign_words(case))
    if not [problem for problem in problems if problem.severity != "note"]:
        problems.append(Problem("drafter", "note", "none of the known causes of a low acceptance length was found"))
    return DrafterReport(short_name(drafter), acceptance, agreement, tuple(problems))


def quantisation_of(model: PreTrainedModel) -> str | None:
    """How the weights of a model are quantised; None: they are not."""
    stated = getattr(model.config, "quantization_config", None)
    if stated is not None:
        method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
        return str(getattr(method, "value", method) or type(stated).__name__)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype.itemsize == 1:
            return str(weight.dtype).removeprefix("torch.")
    return None


def _texts(tokenizer: Any) -> dict[str, list[int]]:
    """The probe's text as it is and, where there is a template, as an answer in a chat."""
    texts: dict[str, list[int]] = {"plain": tokenizer(PROBE_TEXT)["input_ids"]}
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": PROBE_TEXT}]
        texts["chat"] = tokenizer.apply_chat_template(messages, return_dict=False)
    return texts


def _prompts(tokenizer: Any) -> dict[str, list[int]]:
    ids: list[int] = tokenizer(PROBE_TEXT)["input_ids"]
    prompts = {"plain": ids[: min(_NUM_PROBED, len(ids)) // 2]}
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _QUESTION}]
        prompts["chat"] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return prompts


def _acceptance(case: _Case, form: str, prompt: list[int]) -> Acceptance:
    """What the engine accepts of a greedy continuation."""
    room = model_max_length(case.model) - len(prompt)
    sampling = SamplingParams(max_new_tokens=min(_NUM_NEW, max(room, 1)))
    request: Any = Request(form, prompt, sampling)  # type: ignore[arg-type]
    with build_engine(case.model, case.drafter, budget=_BUDGET, max_batch_size=1) as engine:
        state = [output.state for output in engine.generate([request])][-1]
    return Acceptance(form, 1 + state.num_accepted / state.num_steps, state.num_steps, state.num_drafted)


def _eagle(case: _Case, name: str) -> tuple[tuple[Agreement, ...], list[Problem]]:
    """The stated and the best reading, then what is left with the best one."""
    files = read_files(case.pending.source)
    readings = {form: probe_readings(files, case.model, lesson) for form, lesson in case.lessons.items()}
    # A head that was trained on chats may be equally bad in all readings of a plain text.
    form = max(readings, key=lambda form: max(reading.agreement for reading in readings[form]))
    stated, best = readings[form][0], best_reading(readings[form])
    vocab_size = int(case.model.config.get_text_config().vocab_size)
    head = build_head(files, case.model, best.config)

    def guess(lesson: Lesson) -> Tensor:
        return hits(head, lesson, vocab_size)

    problems = [
        *_readings(stated, best),
        *_vocabulary(files, case, vocab_size),
        *_other_target(files, name),
        *_template(case, guess),
        *_context(case, guess, best.config.max_length),
        *_quantised(case.model, best.agreement),
    ]
    return _agreements(case, guess), problems


def _draft_model(case: _Case) -> tuple[tuple[Agreement, ...], list[Problem]]:
    assert isinstance(case.drafter, LmDrafter)
    small, length = case.drafter.model.hf_model, case.drafter.model.max_length

    def guess(lesson: Lesson) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = small(input_ids=lesson.token_ids[None], use_cache=False).logits[0, 1:]
        return logits.argmax(dim=-1) == lesson.truth

    agreement = _agreements(case, guess)
    problems = [
        *_other_template(case),
        *_template(case, guess),
        *_context(case, guess, length),
        *_quantised(case.model, max(entry.share for entry in agreement)),
    ]
    return agreement, problems


def _agreements(case: _Case, guess: Guess) -> tuple[Agreement, ...]:
    return tuple(Agreement(form, float(guess(lesson).float().mean())) for form, lesson in case.lessons.items())


def _readings(stated: Reading[EagleConfig], best: Reading[EagleConfig]) -> Iterator[Problem]:
    """One cause for each thing that the best reading changes, with what it alone is worth."""
    for field, words in differences(stated.config, best.config).items():
        yield Problem(
            _AREAS[field],
            "warning",
            f"the checkpoint is read better with {words}: {best.agreement:.0%} of the target's choices are named, "
            f"{stated.agreement:.0%} as it is stated; loading it probes for that, unless probe=0",
        )


def _vocabulary(files: EagleFiles, case: _Case, vocab_size: int) -> Iterator[Problem]:
    ids = files.target_ids(vocab_size)
    if ids is None:
        return
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[ids] = True
    truth = torch.cat([lesson.truth for lesson in case.lessons.values()]).cpu()
    share = float(known[truth].float().mean())
    if share < _KNOWN:
        yield Problem(
            "vocabulary",
            "warning",
            f"the draft vocabulary of {len(ids)} tokens holds {share:.0%} of what the target chooses: no more can be "
            "accepted; take a head whose vocabulary was counted on text like this",
        )


def _other_target(files: EagleFiles, name: str) -> Iterator[Problem]:
    verifier = (files.config.get("speculators_config") or {}).get("verifier") or {}
    stated = str(verifier.get("name_or_path") or "")
    if stated and stated.rstrip("/").rpartition("/")[2].lower() != name.rstrip("/").rpartition("/")[2].lower():
        yield Problem("target", "note", f"the checkpoint says that it was trained for {stated!r}, this is {name!r}")


def _template(case: _Case, guess: Guess) -> Iterator[Problem]:
    """The same words with and without the chat template around them."""
    if "chat" not in case.lessons:
        return
    plain, chat = (float(guess(case.lessons[form]).float().mean()) for form in ("plain", "chat"))
    said = f"{chat:.0%} of the target's choices are named in the chat template, {plain:.0%} without it"
    if chat > plain + _CLEARLY:
        yield Problem("template", "warning", f"{said}: it was trained on chats; send prompts in the template (--chat)")
    elif plain > chat + _CLEARLY:
        yield Problem("template", "warning", f"{said}: it was not trained with this template; compare it with its own")


def _other_template(case: _Case) -> Iterator[Problem]:
    own: Any = tokenizer_of(case.pending.source)
    theirs: Any = case.tokenizer
    if own is not None and own.chat_template and theirs.chat_template and own.chat_template != theirs.chat_template:
        yield Problem(
            "template", "warning", "the draft model's own chat template is another one: prompts look foreign to it"
        )


def _foreign_words(case: _Case) -> Iterator[Problem]:
    if isinstance(case.drafter, TextLmDrafter):
        yield Problem(
            "vocabulary",
            "warning",
            "the draft model has another tokenizer: its guesses go over as text, in chains, and are given up where the "
            "words do not align; a draft model of the target's family needs none of that",
        )


def _context(case: _Case, guess: Guess, length: int) -> Iterator[Problem]:
    """Agreement up to the end of what the drafter was trained for, and beyond."""
    limit = model_max_length(case.model)
    if limit <= length:
        return
    said = f"the drafter was trained on texts of up to {length} tokens, the target takes {limit}"
    size = min(limit, 2 * length, _LONGEST)
    if size < length + _BEYOND or isinstance(case.drafter, LmDrafter):
        after = "its guesses end there" if isinstance(case.drafter, LmDrafter) else "beyond that it was not probed"
        yield Problem("context", "note", f"{said}: {after}")
        return
    ids = case.lessons["plain"].token_ids.tolist()
    right = guess(Lesson.of(case.model, (ids * (size // len(ids) + 1))[:size])).float()
    within, beyond = float(right[length // 2 : length].mean()), float(right[length:].mean())
    shares = f"{within:.0%} of the target's choices are named up to there and {beyond:.0%} beyond"
    is_cause = beyond < within - _CLEARLY
    yield Problem("context", "warning" if is_cause else "note", f"{said}: {shares}")


def _quantised(model: PreTrainedModel, agreement: float) -> Iterator[Problem]:
    how = quantisation_of(model)
    if how is not None:
        yield Problem(
            "quantisation",
            "warning" if agreement < _WEAK else "note",
            f"the target's weights are quantised ({how}), and drafters are trained on what the unquantised one says: "
            f"{agreement:.0%} of its choices are named; compare with the unquantised target, or train for this one",
        )
