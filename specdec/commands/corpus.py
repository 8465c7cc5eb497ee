"""``specdec corpus``: retrieval stores filled before the first request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.commands import printing
from specdec.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from specdec.bench.traces import Encode
    from specdec.tree import IntArray

__all__ = ["build", "corpus"]

corpus = typer.Typer(name="corpus", help="Stores of earlier text for the retrieval drafters.", no_args_is_help=True)
_TEXT = {
    ".txt",
    ".md",
    ".py",
    ".rst",
    ".json",
    ".yaml",
    ".toml",
    ".c",
    ".cc",
    ".h",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".java",
}
_PIECE = 4096  # tokens of a text file that become one response, so that eviction is not all or nothing


@corpus.callback()
def _root() -> None:
    """Stores of earlier text for the retrieval drafters."""


def _pieces(path: Path, encode: Encode) -> Iterator[IntArray]:
    import numpy as np

    from specdec.bench.traces import read_calls, tokenize_calls

    if path.suffix in _TEXT:
        try:
            ids = np.array(encode(path.read_text(encoding="utf-8")), np.int32)
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"cannot read {path}: {error}") from error
        yield from (ids[at : at + _PIECE] for at in range(0, len(ids), _PIECE))
    else:
        yield from (call.response_ids for call in tokenize_calls(read_calls(path), encode))


@corpus.command()
def build(
    files: Annotated[
        list[Path],
        typer.Argument(help="Traces (.jsonl, .jsonl.gz): their responses are kept. Or text and source files."),
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="tokenizer.json, or a directory or hub name: the target's own.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store; an existing one is extended.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose text this is.")] = "",
    shared: Annotated[
        bool, typer.Option("--shared", help="Fill the tier that every tenant reads. Nothing private belongs there.")
    ] = False,
    max_bytes: Annotated[int, typer.Option("--max-bytes", help="Bound of each tenant's index, in bytes.")] = 256 << 20,
) -> None:
    """Build a retrieval store from recorded traffic or text, for a warm start."""
    from specdec.bench.simulate_report import load_encoder
    from specdec.drafters.store import RetrievalStore

    if shared and tenant:
        raise ConfigError(f"give --shared or --tenant, not both, got tenant {tenant!r}")
    encode, _ = load_encoder(tokenizer)
    store = RetrievalStore.load(out, max_bytes=max_bytes) if out.exists() else RetrievalStore(max_bytes=max_bytes)
    count = tokens = 0
    for path in files:
        for number, ids in enumerate(_pieces(path, encode)):
            if shared:
                store.share([ids])
            else:
                store.insert(f"corpus:{path.name}:{number}", ids, tenant=tenant)
            count, tokens = count + 1, tokens + len(ids)
    store.save(out)
    where = "the shared tier" if shared else f"tenant {tenant!r}"
    printing.text(f"{count} texts, {tokens} tokens in {where}; {out} has {out.stat().st_size} bytes")
