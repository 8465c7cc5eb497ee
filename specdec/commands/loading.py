"""Loads a model and its tokenizer for a command; says what was looked for when that fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specdec.commands import printing
from specdec.errors import ConfigError, LoadError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DTypeName", "LoadedModel", "find_device", "load_model"]

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer (None: it has none and none was required)."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens at which the model's own generation configuration ends an output."""
        stated = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return tuple(stated) if isinstance(stated, list) else () if stated is None else (stated,)


def load_model(
    name: str, *, dtype: DTypeName = "auto", device: str = "auto", needs_tokenizer: bool = True
) -> LoadedModel:
    """A causal LM from a local directory or from the Hugging Face hub.

    Args:
        name: a directory that ``save_pretrained`` wrote, or ``owner/name`` on the hub.
        dtype: ``auto`` is the checkpoint's own on a GPU and float32 on a CPU, where half precision is slow.
        device: ``auto`` is the first GPU, or the CPU where there is none.
        needs_tokenizer: refuse a model that has none.

    Raises:
        LoadError: nothing that can be loaded is there; the message says what was looked for.
        ConfigError: a device or dtype that this machine does not have.
        UnsupportedError: it is no causal LM.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # our own status line says what is going on
    place = find_device(device)
    kind: Any = "auto" if dtype == "auto" and place.type != "cpu" else torch.float32
    if dtype != "auto":
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    source = _source(name)
    with printing.status(f"loading {name}"):
        config = _attempt(name, "config.json", lambda: transformers.AutoConfig.from_pretrained(source))
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"{name} is an encoder-decoder model ({config.model_type}); specdec needs a causal LM"
            )
        tokenizer = _tokenizer(name, source, is_required=needs_tokenizer)
        model = _attempt(
            name,
            "weights",
            lambda: transformers.AutoModelForCausalLM.from_pretrained(source, config=config, dtype=kind),
        )
        # Some quantised models refuse to be moved, even to where they are.
        model = _attempt(name, "weights", lambda: model.eval() if model.device == place else model.eval().to(place))
    return LoadedModel(name, model, tokenizer)


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: this machine does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device must exist, got {name!r}: torch {torch.__version__} sees no CUDA device")
    return device


def _source(name: str) -> str:
    """What to hand to ``from_pretrained``: a directory that holds a model, or a name for the hub."""
    if not name.strip():
        raise ConfigError(f"model must be a directory or a name on the Hugging Face hub, got {name!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise LoadError(f"{name} is no Hugging Face model: looked for config.json, found {found}")
        return str(path)
    if path.exists():
        raise LoadError(f"a model is a directory with a config.json, got the file {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LoadError(f"there is no directory {name!r}, and it cannot be a name on the Hugging Face hub (owner/name)")
    return name


def _attempt(name: str, what: str, load: Any) -> Any:
    """Call ``load``; everything that transformers says about a checkpoint that it cannot read becomes a LoadError."""
    import safetensors

    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, safetensors.SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        absent = "" if Path(name).expanduser().is_dir() else f"; there is no directory {name!r} either"
        raise LoadError(f"cannot load the {what} of {name!r}: {reason}{absent}") from error


def _tokenizer(name: str, source: str, *, is_required: bool) -> PreTrainedTokenizerBase | None:
    import transformers

    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
        # transformers has no one way of saying that the files of a tokenizer are missing.
        if is_required:
            raise LoadError(
                f"{name!r} has no usable tokenizer: looked for tokenizer.json, tokenizer_config.json and "
                f"tokenizer.model ({type(error).__name__})"
            ) from error
        return None
    return tokenizer
