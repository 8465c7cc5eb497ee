"""``specdec apd``: decode with a masked diffusion LM, several tokens per pass, and say what kind of result that is."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import printing
from specdec.commands.loading import DTypeName, load_model
from specdec.commands.options import (
    DeviceOption,
    DTypeOption,
    JsonOption,
    MaxNewTokensOption,
    SeedOption,
    TemperatureOption,
)
from specdec.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from specdec.drafters.masked_lm import MaskedLm

__all__ = ["apd"]


def apd(
    target: Annotated[Path, typer.Option("--target", help="A directory with a masked diffusion LM.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    small: Annotated[
        str | None, typer.Option("--small", help="The causal LM that decides what is kept; same tokens.")
    ] = None,
    ratio: Annotated[float, typer.Option("--ratio", help="Weight of the diffusion LM: near 1 is fast and poor.")] = 0.6,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Tokens re-read per pass; all if left out.")
    ] = None,
    lookahead: Annotated[
        int | None, typer.Option("--lookahead", min=1, help="Masks behind the text; as many as may come if left out.")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option("--tokens-per-step", min=1, help="Keep exactly so many, without --small.")
    ] = None,
    self_speculation: Annotated[
        int | None,
        typer.Option(
            "--self-speculation", min=0, help="LOSSLESS instead: so many steps guessed ahead, no other model."
        ),
    ] = None,
    mask: Annotated[int | None, typer.Option("--mask", help="Id of the mask, if the configuration is silent.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run the Python code that comes with the checkpoint.")] = False,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with a masked diffusion LM; LOSSY, unless --self-speculation is given.

    For LLaDA, Dream and their like.

    Adaptive Parallel Decoding: the diffusion model guesses a run of tokens per pass, and a small causal model decides
    how many of them stay. What comes out follows neither model's law. --self-speculation N needs no second model and
    gives the text of filling one token per pass, in order of confidence, in fewer passes.

    specdec apd --target path/to/llada --small path/to/small --prompt "def add(a, b):" --ratio 0.6 --window 32
    """
    from specdec.apd import ApdDecoder
    from specdec.self_speculation import SelfSpeculation

    if self_speculation is not None and (small is not None or tokens_per_step is not None or temperature):
        raise ConfigError("--self-speculation is greedy and needs neither --small nor --tokens-per-step")
    model, tokenizer = _load(target, mask=mask, trust=trust, dtype=dtype, device=device)
    ids = tokenizer(prompt)["input_ids"]
    if self_speculation is not None:
        exact = SelfSpeculation(model, length=self_speculation)
        start = perf_counter()
        done = exact.generate(ids, max_new_tokens)
        _report(target, small, tokenizer, done.token_ids, done.num_passes, perf_counter() - start, True, as_json)
        return
    decoder = ApdDecoder(
        model, _causal(small, tokenizer, dtype=dtype, device=device), ratio=ratio, window=window, lookahead=lookahead,
        tokens_per_step=tokens_per_step, temperature=temperature, seed=seed,
        stop_ids=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
    )  # fmt: skip
    start = perf_counter()
    lossy = decoder.generate(ids, max_new_tokens)
    seconds = perf_counter() - start
    _report(target, small, tokenizer, lossy.token_ids, len(lossy.kept), seconds, lossy.lossless, as_json)


def _load(target: Path, *, mask: int | None, trust: bool, dtype: str, device: str) -> tuple[MaskedLm, Any]:
    import torch

    from specdec.drafters.lm_loading import tokenizer_of
    from specdec.drafters.masked_lm import load_masked_lm
    from specdec.drafters.probing import probe_ids

    tokenizer = tokenizer_of(target)
    if tokenizer is None:
        raise LoadError(f"{str(target)!r} has no usable tokenizer")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    kind = getattr(torch, "float32" if dtype == "auto" else dtype)
    model = load_masked_lm(
        target, device=place, dtype=kind, probe_ids=probe_ids(tokenizer), mask=mask, trust=int(trust)
    )
    return model, tokenizer


def _causal(small: str | None, tokenizer: Any, *, dtype: DTypeName, device: str) -> Any:
    """The model of the gate, or None."""
    from specdec.drafters.lm_loading import same_tokens

    if small is None:
        return None
    causal = load_model(small, dtype=dtype, device=device)
    if causal.tokenizer is not None and not same_tokens(causal.tokenizer, tokenizer):
        raise ConfigError(f"{small} and the target must share their tokens, and they do not")
    return causal.model


def _report(
    target: Path, small: str | None, tokenizer: Any, token_ids: list[int], num_passes: int, seconds: float,
    is_lossless: bool, as_json: bool,
) -> None:  # fmt: skip
    words = tokenizer.decode(token_ids, skip_special_tokens=True)
    if as_json:
        printing.result({
            "target": str(target), "small": small, "is_lossless": is_lossless, "text": words, "token_ids": token_ids,
            "num_output_tokens": len(token_ids), "num_passes": num_passes, "seconds": seconds,
        })  # fmt: skip
        return
    printing.text(words + "\n")
    mark = "" if is_lossless else "; LOSSY: follows neither model's law"
    rate = len(token_ids) / max(num_passes, 1)
    printing.note(f"\n{len(token_ids)} tokens in {seconds:.2f} s, {rate:.2f} tokens per pass{mark}")
