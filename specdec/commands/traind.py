"""``specdec traind``: learn from a spool, publish to a registry; ``specdec drafters``: look after the registry."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import DeviceOption
from specdec.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from specdec.online_training.daemon import DaemonStatus, TrainDaemon
    from specdec.online_training.registry import Registry

__all__ = ["drafters", "traind"]


def traind(
    model: Annotated[str, typer.Argument(help="The target: a directory with a Hugging Face model, or its hub name.")],
    spool: Annotated[str, typer.Option("--spool", help="Directory of traces, or redis://HOST/STREAM.")],
    registry: Annotated[Path, typer.Option("--registry", help="Directory of versions.")],
    work: Annotated[Path | None, typer.Option("--work", help="Checkpoint and ledger. Default: REGISTRY/work.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="Of a new drafter: eagle3, or lm.")] = "eagle3",
    init: Annotated[Path | None, typer.Option("--init", help="A drafter to begin from.")] = None,
    start: Annotated[str, typer.Option("--start", help="Of a new drafter: random weights, or copying.")] = "random",
    depth: Annotated[int, typer.Option("--depth", min=1, help="Levels that training looks ahead.")] = 4,
    learning_rate: Annotated[float, typer.Option("--lr", help="Of AdamW; 1e-5 for a trained drafter.")] = 1e-4,
    muon_lr: Annotated[float, typer.Option("--muon-lr", help="Above 0: matrices learn by Muon at this rate.")] = 0.0,
    clip: Annotated[float, typer.Option("--clip", help="Largest norm of the gradient.")] = 0.5,
    ema: Annotated[float, typer.Option("--ema", help="Decay of the mean of weights that is published.")] = 0.999,
    rejected_weight: Annotated[
        float, typer.Option("--rejected-weight", help="How much more a first-rejected position counts.")
    ] = 1.0,
    counterfactual: Annotated[
        float, typer.Option("--counterfactual", help="Factor of rows behind rejections, where they were captured.")
    ] = 0.0,
    prompt_weight: Annotated[float, typer.Option("--prompt-weight", help="Of positions in prompts.")] = 0.0,
    tokens_per_step: Annotated[int, typer.Option("--tokens-per-step", min=1, help="Replay included.")] = 4096,
    publish_steps: Annotated[int, typer.Option("--publish-steps", min=1, help="Steps between versions.")] = 50,
    heldout: Annotated[int, typer.Option("--heldout", min=1, help="Newest requests that versions are judged on.")] = 48,
    rehearses: Annotated[
        bool, typer.Option("--rehearse", help="While no traces wait, learn on from remembered ones.")
    ] = False,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Of a new draft model, kind lm.")] = 1,
    duty: Annotated[float, typer.Option("--duty", help="Share of the time to work, beside a server: 0 to 1.")] = 1.0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as many as usual.")] = 0,
    is_tireless: Annotated[bool, typer.Option("--always", help="Learn also when nothing is gained by it.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a drafter from live traces, and publish versions that a server tries and swaps in.

    specdec traind path/to/model --spool traces --registry drafters
    """
    import torch

    if not 0 < duty <= 1:
        raise ConfigError(f"duty must be in (0, 1], got {duty}")
    if threads:
        torch.set_num_threads(threads)
    modules = _modules()
    loaded = load_model(model, dtype="float32", device=device)
    target = modules.fingerprint(loaded.model)
    plan = modules.OnlinePlan(
        kind=kind, init=init, start=start, depth=depth, num_layers=layers,
        learner=modules.LearnerOptions(
            learning_rate=learning_rate, muon_lr=muon_lr, clip=clip, ema=ema, rejected_weight=rejected_weight,
            counterfactual=counterfactual, prompt_weight=prompt_weight,
        ),
    )  # fmt: skip
    learner = modules.build_learner(plan, loaded.model, loaded.tokenizer)
    versions = modules.Registry(registry)
    if not versions.state().current:
        first = versions.publish(
            learner.export, modules.Manifest(version=0, parent=0, kind=learner.kind, target=target)
        ).version
        versions.promote(first, "the first one")
        printing.note(f"version {first} is the first of {registry}")
    daemon = modules.TrainDaemon(
        modules.open_transport(spool), versions, learner, target=target, work=work or registry / "work",
        options=modules.DaemonOptions(
            tokens_per_step=tokens_per_step, publish_steps=publish_steps, mix=modules.ReplayMix(num_heldout=heldout),
            rehearses=rehearses,
        ),
        gate=None if is_tireless else modules.TrainGate(), report=_Reporter(), duty=duty,
    )  # fmt: skip
    printing.note(f"learning from {spool}")
    _run(daemon)


class _Reporter:
    """A line for every version, and one for every twentieth step between them."""

    def __init__(self) -> None:
        self._seen = (0, 0, 0)

    def __call__(self, status: DaemonStatus) -> None:
        num_versions = (status.num_published, status.num_withheld)
        if num_versions != self._seen[1:] or status.num_steps >= self._seen[0] + 20:
            self._seen = (status.num_steps, *num_versions)
            printing.note(
                f"step {status.num_steps}: loss {status.loss:.3f}, {status.num_shards} shards, "
                f"{status.num_published} versions, held-out acceptance length {status.acceptance_length:.2f}"
            )


def _run(daemon: TrainDaemon) -> None:
    """Until SIGINT or SIGTERM; what was learned is saved."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    daemon.run(stop)


drafters = typer.Typer(name="drafters", help="Versions of an online-trained drafter.", no_args_is_help=True)
_RegistryArgument = Annotated[Path, typer.Argument(help="Directory of versions.")]
_VersionArgument = Annotated[int, typer.Argument(min=1, help="Its number.")]


@drafters.command("list")
def list_versions(registry: _RegistryArgument) -> None:
    """List versions: what they come from, how they did, and which one does what."""
    versions = _open(registry)
    state = versions.state()
    roles = {state.current: "current", state.canary: "canary", state.pinned: "pinned"}
    if state.pinned == state.current:
        roles[state.current] = "current, pinned"
    printing.text(f"{'version':>7}  {'parent':>6}  {'step':>7}  {'held-out':>8}  role\n")
    for number in versions.numbers():
        manifest = versions.manifest(number)
        length = "-" if manifest.acceptance_length is None else f"{manifest.acceptance_length:.2f}"
        note = roles.get(number, "") or ("not served: " + state.marks[number] if number in state.marks else "")
        printing.text(f"{number:>7}  {manifest.parent:>6}  {manifest.step:>7}  {length:>8}  {note}\n")


@drafters.command()
def promote(registry: _RegistryArgument, version: _VersionArgument) -> None:
    """Make a version current; servers take it from the next round on."""
    _open(registry).promote(version, "by hand")
    printing.note(f"version {version} is current")


@drafters.command()
def rollback(registry: _RegistryArgument) -> None:
    """Go back to the last sound version; the current one is never served again."""
    printing.note(f"version {_open(registry).rollback('by hand')} is current again")


@drafters.command()
def pin(registry: _RegistryArgument, version: _VersionArgument) -> None:
    """Make a version the baseline that others are judged against."""
    _open(registry).pin(version, "by hand")
    printing.note(f"version {version} is the baseline")


@drafters.command()
def forget(
    tenant: Annotated[str, typer.Argument(help="Its name, as the server knows it.")],
    spool: Annotated[Path, typer.Option("--spool", help="Directory of traces.")],
    registry: Annotated[Path | None, typer.Option("--registry", help="Directory of versions.")] = None,
) -> None:
    """Delete a tenant's traces, and mark the versions that learned from them."""
    modules = _modules()
    if not spool.is_dir():
        raise ConfigError(f"there is no spool {str(spool)!r}")
    hashed = modules.KeyedHash.of_file(spool / "key").text(tenant)
    gone = modules.Spool(spool).forget(hashed)
    marked = _open(registry).mark_tenant(hashed, "it learned from a forgotten tenant") if registry else []
    printing.note(f"{len(gone)} shards deleted, {len(marked)} versions marked")


def _open(path: Path) -> Registry:
    if not path.is_dir():
        raise ConfigError(f"there is no registry {str(path)!r}")
    registry: Registry = _modules().Registry(path)
    return registry


def _modules() -> Any:
    try:
        from specdec.commands import traind_modules
    except ImportError as error:
        raise UnsupportedError(
            f"online training needs the extra `train` (pip install 'specdec-toolkit[train]'): {error}"
        ) from error
    return traind_modules
