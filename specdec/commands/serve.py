"""``specdec serve``: an OpenAI-compatible server around a speculating model; ``specdec keys``: who may call it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import BudgetOption, DeviceOption, DTypeOption, OverlapOption
from specdec.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from specdec.server.keys import Keyring

__all__ = ["keys", "serve"]

_Drafter = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter", "-d", help="Who may guess (ngram, ..., KIND:PATH); repeat it, the first is the default: ngram."
    ),
]
_AllowAnyone = Annotated[bool, typer.Option("--allow-anyone", help="Serve without API keys beyond this machine.")]
_RequestMetrics = Annotated[
    bool | None,
    typer.Option(help="Tell in each answer what speculation did. Default: only without API keys."),
]
_MetricsPrefix = Annotated[
    str, typer.Option("--metrics-prefix", help="Of Prometheus names; `vllm:` for tools that expect vLLM.")
]
_OtlpEndpoint = Annotated[
    str | None, typer.Option("--otlp-endpoint", help="Send spans to this OpenTelemetry collector (HTTP).")
]
_Registry = Annotated[
    Path | None, typer.Option("--registry", help="Draft with versions in here, see `specdec traind`.")
]
_Capture = Annotated[str | None, typer.Option("--capture", help="Keep traces: a directory, or redis://HOST/STREAM.")]
_CaptureTenant = Annotated[
    list[str] | None, typer.Option("--capture-tenant", help="Who opted in; repeat it. Without keys: anonymous.")
]
_CaptureMode = Annotated[str, typer.Option("--capture-mode", help="tokens, features, or features+rejected.")]
_HashKey = Annotated[Path | None, typer.Option("--hash-key", help="Key that names tenants in traces.")]
_Redact = Annotated[bool, typer.Option(help="Keep no text with addresses, phone or card numbers, or keys.")]
_RedactPattern = Annotated[
    list[str] | None, typer.Option("--redact-pattern", help="Nor with a match of this; repeat it.")
]
_AdminKeyFile = Annotated[Path | None, typer.Option("--admin-key-file", help="Keys for /admin, see `specdec keys`.")]


def serve(
    model: Annotated[str, typer.Argument(help="A directory with a Hugging Face model, or owner/name on the hub.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--served-model-name", help="Model name of the API.")] = None,
    drafter: _Drafter = None,
    budget: BudgetOption = None,
    overlap: OverlapOption = "auto",
    max_batch_size: Annotated[int, typer.Option("--max-batch-size", min=1, help="Most requests per step.")] = 16,
    max_in_flight: Annotated[
        int, typer.Option("--max-in-flight", min=1, help="More requests than this get status 429.")
    ] = 256,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Most tokens of a request.")] = None,
    kv_tokens: Annotated[int | None, typer.Option("--kv-tokens", min=2, help="Size of the KV pool.")] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep the KV of finished requests, while there is room, for those that begin alike.")
    ] = True,
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds for live requests at shutdown.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option("--max-body-mb", min=0.001, help="Largest request.")] = 8.0,
    key_file: Annotated[Path | None, typer.Option("--key-file", help="API keys, made by `specdec keys`.")] = None,
    allow_anyone: _AllowAnyone = False,
    request_metrics: _RequestMetrics = None,
    metrics_prefix: _MetricsPrefix = "specdec:",
    otlp_endpoint: _OtlpEndpoint = None,
    registry: _Registry = None,
    capture: _Capture = None,
    capture_tenant: _CaptureTenant = None,
    capture_mode: _CaptureMode = "tokens",
    hash_key: _HashKey = None,
    redact: _Redact = True,
    redact_pattern: _RedactPattern = None,
    admin_key_file: _AdminKeyFile = None,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve a model with speculation behind an OpenAI-compatible API.

    specdec serve path/to/model --drafter suffix --drafter ngram
    """
    from specdec.build import name_drafter

    launch = _launch_module()
    keyring = _keyring(key_file, host, is_open_wanted=allow_anyone)
    admins = _admin_keys(admin_key_file)
    names = [*([f"registry:{registry}"] if registry is not None else []), *(drafter or [])] or ["ngram"]
    for one in names:
        name_drafter(one)  # what is wrong with a name is said before the minutes that loading may take
    with launch.listen(host, port) as bound:
        loaded = load_model(model, dtype=dtype, device=device)
        engine = {
            "max_batch_size": max_batch_size, "max_length": max_length, "kv_tokens": kv_tokens,
            "prefix_cache": prefix_cache, "costs": "measure", "overlap": overlap,
        }  # fmt: skip
        options = launch.ServerOptions(
            name=name or Path(model).name,
            drafters=tuple(names),
            budget=budget,
            max_in_flight=max_in_flight,
            metrics_prefix=metrics_prefix,
            otlp_endpoint=otlp_endpoint,
            service=launch.ServiceOptions(
                deadline_s=deadline,
                max_body_bytes=round(max_body_mb * 2**20),
                has_metrics=keyring.is_open if request_metrics is None else request_metrics,
                drain_s=drain,
            ),
            online=launch.OnlineOptions(
                capture=capture,
                tenants=tuple(capture_tenant or ()),
                mode=capture_mode,
                hash_key=hash_key,
                redact=tuple(redact_pattern or ()) if redact or redact_pattern else None,
            ),
            engine={key: value for key, value in engine.items() if value is not None},
        )
        service = launch.build_service(loaded.model, loaded.tokenizer, loaded.eos_ids, options, keyring, admins)
        address, place = bound.getsockname()[:2]
        printing.note(f"serving {options.name} on http://{address}:{place}/v1 with {', '.join(options.drafters)}")
        launch.serve(service, bound)


def keys(
    key_file: Annotated[Path, typer.Argument(help="File of hashes; made if it is not there.")],
    tenant: Annotated[str, typer.Argument(help="Whose key this is; tenants never share text.")],
) -> None:
    """Make an API key: its hash goes into the file, the key is printed once."""
    _launch_module()
    from specdec.server.keys import add_key

    printing.text(add_key(key_file, tenant) + "\n")


def _launch_module() -> Any:
    try:
        from specdec.server import launch
    except ImportError as error:
        raise UnsupportedError(
            f"serving needs the extra `server` (pip install 'specdec-toolkit[server]'): {error}"
        ) from error
    return launch


def _admin_keys(key_file: Path | None) -> Keyring | None:
    from specdec.server.keys import Keyring

    return None if key_file is None else Keyring.load(key_file)


def _keyring(key_file: Path | None, host: str, *, is_open_wanted: bool) -> Keyring:
    from specdec.server.keys import Keyring
    from specdec.server.listening import is_this_machine

    if key_file is not None:
        return Keyring.load(key_file)
    if not (is_this_machine(host) or is_open_wanted):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --key-file, or --allow-anyone if that is meant"
        )
    return Keyring()
