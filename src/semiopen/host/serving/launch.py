"""What `semiopen serve` does: check everything that is quick to check, open the engine, listen."""

import hashlib
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from semiopen.bundle.files import check_is_bundle, read_file
from semiopen.bundle.signature import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, signed_payload_digest
from semiopen.errors import SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.serving import server
from semiopen.host.serving.api import SAMPLING_DEFAULTS, Settings, create_app
from semiopen.host.serving.engine import Engine
from semiopen.host.serving.transport import Guard
from semiopen.host.tuning.adapter_files import WEIGHTS_NAME, check_adapter

API_KEY_SETTING = "SEMIOPEN_API_KEY"  # environment variable: API keys, one per line
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Options:
    """The command's options; sizes in bytes, times in seconds."""

    bundle: Path
    keys: Path | None
    enclave: Path | None
    engine: Literal["transformers", "vllm"] = "transformers"
    host: str = "127.0.0.1"
    port: int = 8000
    model: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_running: int = 64
    max_waiting: int = 256
    kv_tokens: int = 1 << 16
    max_body: int = 8 << 20
    request_seconds: float = 600.0
    grace_seconds: float = 30.0
    chat_template: Path | None = None
    adapter: Path | None = None
    dtype: str | None = None
    threads: int = 0
    lease: Path | None = None
    share_prefixes: bool = False
    forget_after: float | None = None


@dataclass
class Ready:
    """A server about to begin.

    Attributes:
        enclave: what protects the sealed part, in words, and `measures` in detail where it told them.
        notes: sentences for the person who started it.
    """

    engine: Engine
    app: Guard
    listener: socket.socket
    grace_seconds: float
    enclave: str
    measures: list[str]
    notes: list[str]


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, else of the environment variable, one per line.

    Raises:
        SemiopenError: the file has none, or one that no header can carry.
    """
    text = os.environ.get(API_KEY_SETTING, "") if path is None else path.read_text()
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    source = path or API_KEY_SETTING
    if not keys and (path is not None or API_KEY_SETTING in os.environ):
        # Empty must not mean open to all: it is a mistake in whatever fills it.
        raise SemiopenError(f"{source} has no API key; write one per line, or leave it out to serve without.")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise SemiopenError(f"A key in {source} has spaces or other characters that HTTP headers cannot carry.")
    return keys


def prepare(options: Options) -> Ready:
    """Open the engine and take the address. Nothing is served yet.

    Raises:
        SemiopenError: the bundle, the enclave or an option is not usable; the message says which.
        OSError: the address is taken, or a file cannot be read.
    """
    folder = options.bundle
    check_is_bundle(folder)
    template = options.chat_template.read_text() if options.chat_template else None
    if options.adapter is not None:
        check_adapter(options.adapter, folder)
    listener = server.listen(options.host, options.port)
    try:
        kind, measures = _enclave(options.enclave)
        engine = _open_engine(options)
        # Only now are the bundle's files known to be the vendor's.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = Settings(
            model=options.model or folder.resolve().name,
            fingerprint=_fingerprint(folder, options.adapter),
            api_keys=options.api_keys,
            max_body=options.max_body,
            request_seconds=options.request_seconds,
            side_by_side=options.max_running,
            sampling=sampling_defaults(folder),
            chat_template=template,
            share_prefixes=options.share_prefixes,
        )
        app = create_app(engine, tokenizer, settings)
        listener.listen(server.BACKLOG)  # who reads "serving" and connects at once has to wait a moment, no more
    except BaseException:
        listener.close()
        raise
    return Ready(
        engine, app, listener, options.grace_seconds, kind, measures, _notes(options, settings, engine, listener)
    )


def run(ready: Ready) -> None:
    """Serve until a signal ends it."""
    server.serve(ready.listener, ready.app, ready.engine, ready.grace_seconds)


def sampling_defaults(folder: Path) -> dict[str, float]:
    """What the model's generation_config.json says about sampling, for requests that do not; as vLLM does."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    config = cast(dict[str, Any], json.loads(path.read_text()))
    return {name: config[name] for name in SAMPLING_DEFAULTS if isinstance(config.get(name), int | float)}


def _fingerprint(bundle: Path, adapter: Path | None) -> str:
    """Changes when a file of the bundle does, or the adapter."""
    digest = signed_payload_digest(read_file(bundle, SIGNATURE_NAME, MAX_SIGNATURE_BYTES))
    if adapter is not None:
        with (adapter / WEIGHTS_NAME).open("rb") as file:
            digest = hashlib.sha256((digest + hashlib.file_digest(file, "sha256").hexdigest()).encode()).hexdigest()
    return f"fp_{digest[:16]}"


def _enclave(path: Path | None) -> tuple[str, list[str]]:
    if path is None:
        return "dev enclave: not a TEE", []  # the only kind that is started from here
    client = EnclaveClient(path)
    client.close()
    return client.welcome.enclave, client.welcome.measures


def _open_engine(options: Options) -> Engine:
    if options.engine == "vllm":
        try:
            from semiopen.host.serving.vllm_engine import VllmEngine
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise SemiopenError("vLLM is not installed; install it, or leave --engine out.") from None
        opener: Any = VllmEngine.open
    else:
        from semiopen.host.serving.transformers_engine import TransformersEngine

        opener = TransformersEngine.open
    return opener(
        options.bundle,
        keys=options.keys,
        enclave=options.enclave,
        dtype=options.dtype,
        kv_tokens=options.kv_tokens,
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        threads=options.threads,
        adapter=options.adapter,
        lease=options.lease,
        forget_after=options.forget_after,
    )


def _notes(options: Options, settings: Settings, engine: Engine, listener: socket.socket) -> list[str]:
    port = listener.getsockname()[1]
    shown = f"[{options.host}]" if ":" in options.host else options.host
    notes = [f"Serving {settings.model}, context {engine.context} tokens, at http://{shown}:{port}/v1"]
    if settings.sampling:
        values = ", ".join(f"{name} {value:g}" for name, value in settings.sampling.items())
        notes.append(f"The model's own defaults for sampling: {values}.")
    if options.adapter is not None:
        notes.append(f"All answers are with the adapter {options.adapter.name}.")
    if not options.api_keys and not options.host.startswith(_LOOPBACK):
        notes.append("Anyone who reaches this address can use the model, in the clear: give --api-key-file, and TLS.")
    return notes
