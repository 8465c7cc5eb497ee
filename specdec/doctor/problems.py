"""What is wrong, or other than expected, with the files around a model: tokenizer, generation config, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from specdec.doctor.report import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["chat_template_problems", "dtype_problems", "find_problems", "generation_problems", "tokenizer_problems"]

_INSTRUCT_WORDS: Final = ("instruct", "chat", "-it")  # in a model's name
_INSTRUCT_TOKENS: Final = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|start|>", "[INST]")
# Generation defaults that change what is drawn, and the value at which each is off.
_SAMPLING_DEFAULTS: Final[dict[str, Any]] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
}
# Generation features that are no law of a next token, and the values at which each is off.
_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
}


def find_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> list[Problem]:
    """Everything below, errors first.

    Args:
        model: a causal LM.
        tokenizer: None if there is none.
        name: of the model; it may say that the model is for chats.
    """
    rank = {"error": 0, "warning": 1, "note": 2}
    found = [*tokenizer_problems(model, tokenizer), *generation_problems(model, tokenizer), *dtype_problems(model)]
    if tokenizer is not None:
        found += chat_template_problems(tokenizer, name)
    return sorted(found, key=lambda problem: rank[problem.severity])


def tokenizer_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Problem]:
    """A vocabulary that does not fit the model, and missing or strange special tokens."""
    area = "tokenizer"
    if tokenizer is None:
        yield Problem(area, "error", "there is no usable tokenizer: only token ids can be continued, no text")
        return
    num_rows = _num_embeddings(model)
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= num_rows:
        yield Problem(
            area,
            "error",
            f"the vocabulary goes up to id {last}, but the model embeds ids below {num_rows} only: texts with the "
            f"tokens above are refused; call model.resize_token_embeddings({last + 1}) or take the right tokenizer",
        )
    if tokenizer.eos_token_id is None:
        yield Problem(area, "warning", "it has no end-of-sequence token: see that generation has another way to stop")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Problem(
            area,
            "note",
            "the padding token is the end-of-sequence token: specdec does not pad, but training and padded batches "
            "must mask by attention_mask, not by token",
        )
    known = set(tokenizer.get_vocab())
    absent = sorted({str(token) for token in tokenizer.all_special_tokens} - known)
    if absent:
        yield Problem(area, "error", f"special tokens that are not in the vocabulary: {', '.join(absent)}")


def generation_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Problem]:
    """Ends of sequence that disagree, defaults that change what is drawn, and features that cannot be kept."""
    area = "generation config"
    config = getattr(model, "generation_config", None)  # a model without a head has not even the attribute
    if config is None:
        yield Problem(area, "warning", "there is none: no end-of-sequence token is known to generate")
        return
    stated = config.eos_token_id
    ids = [] if stated is None else list(stated) if isinstance(stated, list | tuple) else [int(stated)]
    num_rows = _num_embeddings(model)
    for token_id in ids:
        if not 0 <= token_id < num_rows:
            yield Problem(area, "error", f"eos_token_id {token_id} is not in the vocabulary of {num_rows}")
    own = getattr(tokenizer, "eos_token_id", None)
    if not ids:
        hint = "" if own is None else f"; the tokenizer's is {own}: set it, or outputs run to max_new_tokens"
        yield Problem(area, "warning", f"there is no eos_token_id{hint}")
    elif own is not None and own not in ids:
        yield Problem(
            area, "warning", f"eos_token_id is {ids}, but the tokenizer's is {own}: outputs do not end at the latter"
        )
    applied = _differing(config, {key: (None, off) for key, off in _SAMPLING_DEFAULTS.items()})
    if applied:
        yield Problem(area, "note", f"defaults that model.generate applies by itself: {applied}")
    unsupported = _differing(config, _UNSUPPORTED)
    if unsupported:
        yield Problem(
            area, "warning", f"features that specdec refuses, as they are no law of a next token: {unsupported}"
        )


def chat_template_problems(tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[Problem]:
    """A template that is missing, does not render, or adds a second beginning-of-sequence token."""
    area = "chat template"
    if not tokenizer.chat_template:
        words = [word for word in _INSTRUCT_WORDS if word in name.lower()]
        tokens = [token for token in _INSTRUCT_TOKENS if token in tokenizer.get_vocab()]
        if words or tokens:
            signs = ", ".join(repr(sign) for sign in [*words, *tokens])
            yield Problem(area, "warning", f"there is none, although the model looks made for chats ({signs})")
        return
    messages = [{"role": "user", "content": "Hello"}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # noqa: BLE001  -- a template is a program: it raises whatever it likes
        yield Problem(area, "error", f"it does not render one user message: {type(error).__name__}: {error}")
        return
    if "Hello" not in text:
        yield Problem(area, "error", f"it leaves out the user's message: {text!r}")
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer(text)["input_ids"][:2]) == [bos, bos]:
        yield Problem(
            area,
            "warning",
            "it writes the beginning-of-sequence token, and the tokenizer adds another: encode rendered chats with "
            "add_special_tokens=False",
        )


def dtype_problems(model: PreTrainedModel) -> Iterator[Problem]:
    """Precisions that are slow or mixed."""
    area = "dtype"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    if getattr(model, "is_quantized", False):
        yield Problem(
            area, "note", "the model is quantised: specdec check cannot re-run near-ties in a wider precision"
        )
    elif len(dtypes) > 1:
        yield Problem(area, "note", f"parameters have several precisions: {', '.join(dtypes)}")
    half = [name for name in dtypes if name in ("bfloat16", "float16")]
    if half and model.device.type == "cpu":
        yield Problem(area, "note", f"{half[0]} on a CPU is slow where the CPU has no instructions for it")
    if half:
        yield Problem(
            area,
            "note",
            f"in {half[0]} two ways of computing a logit differ by rounding: some tokens may be near-ties; "
            "specdec check counts them",
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        yield Problem(area, "warning", f"parameters lie on several devices: {', '.join(devices)}")


def _num_embeddings(model: PreTrainedModel) -> int:
    weight: torch.Tensor = model.get_input_embeddings().weight
    return int(weight.shape[0])


def _differing(config: Any, off: dict[str, tuple[Any, ...]]) -> str:
    """``key=value`` of every setting that is on."""
    settings = ((key, getattr(config, key, None), values) for key, values in off.items())
    return ", ".join(f"{key}={value!r}" for key, value, values in settings if value not in values)
