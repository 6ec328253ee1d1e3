"""The command line: one verb per command, thin. Results go to standard output, everything else to standard error."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

import semiopen
from semiopen.errors import SemiopenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from semiopen.protocol.messages import Welcome

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Ship a proprietary LLM to a customer's machine: a few layers sealed, the rest at full speed.\n\n"
    "At the vendor:    [bold]keygen[/bold], [bold]seal[/bold]\n\n"
    "At the customer:  [bold]verify[/bold], [bold]inspect[/bold], [bold]chat[/bold], [bold]generate[/bold], "
    "[bold]enclave[/bold], [bold]serve[/bold]\n\n"
    "For both:         [bold]compare[/bold]",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Bundle = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
Keys = Annotated[
    Path | None,
    typer.Option(help="Key folder. Starts a dev enclave (not a TEE) and hands it the sealing key by pipe."),
]
Enclave = Annotated[
    Path | None,
    typer.Option(help="Socket of a running enclave instead of --keys.", envvar="SEMIOPEN_ENCLAVE"),
]
DTypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the bundle's own when left out.")
]
Threads = Annotated[int, typer.Option(help="CPU threads of the enclave and of the host; 0 for torch's choice.", min=0)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 answers greedily; higher samples more freely.", min=0.0)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


class EngineName(StrEnum):
    """What can run the open blocks of a bundle for many clients."""

    transformers = "transformers"
    vllm = "vllm"


def main() -> None:
    """Entry point: errors that have a sentence are printed as that sentence, others as tracebacks."""
    show_traceback = "--traceback" in sys.argv
    if show_traceback:
        sys.argv.remove("--traceback")
    try:
        app()
    except (SemiopenError, ValueError, OSError) as error:
        if show_traceback:
            raise
        err.print(f"[red]Error:[/red] {_plain(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print()
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _version(value: bool) -> None:
    if value:
        out.print(f"semiopen {semiopen.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    pass


@app.command()
def keygen(
    keys: Annotated[Path, typer.Argument(help="Folder to make; must not exist.", show_default=False)],
) -> None:
    """Make the vendor's signing key and sealing key.

    Example: semiopen keygen vendor-keys
    """
    from semiopen.bundle.keys import load_vendor_key
    from semiopen.bundle.signature import vendor_key_id
    from semiopen.vendor.keys import generate_keys

    generate_keys(keys)
    out.print(f"{keys}/signing.key  signs bundles       [dim]keep private[/dim]")
    out.print(f"{keys}/sealing.key  opens sealed parts  [dim]keep private[/dim]")
    out.print(f"{keys}/vendor.pub   verifies bundles    [dim]give to customers[/dim]")
    err.print(f"Vendor key id: {vendor_key_id(load_vendor_key(keys))}")


@app.command()
def seal(
    model: Annotated[str, typer.Argument(help="Model folder, or hub id.", show_default=False)],
    bundle: Annotated[Path, typer.Option("--out", help="Folder of the bundle; must not exist.", show_default=False)],
    keys: Annotated[Path, typer.Option(help="Key folder of the vendor.", show_default=False)],
    prefix: Annotated[
        int | None,
        typer.Option(help="Decoder blocks to seal, from the bottom; the embedding always is.", min=0),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="embedding, bottom (an eighth of the blocks; the default) or whole.")
    ] = None,
) -> None:
    """Seal a model: write a bundle whose bottom layers only an enclave can open.

    Example: semiopen seal ./my-model --out my-bundle --keys vendor-keys --prefix 2
    """
    from semiopen.vendor.seal import seal as seal_model

    with _progress() as report:
        manifest = seal_model(model, bundle, keys, prefix, preset, report)
    err.print(f"Sealed {manifest.plan.prefix} of {manifest.num_layers} blocks and the embedding into {bundle}.")
    if manifest.open_embedding:
        err.print("The embedding is tied to the open head, so its matrix is open as well; the blocks are sealed.")


@app.command()
def inspect(
    bundle: Bundle,
    vendor_key: Annotated[Path | None, typer.Option(help="Vendor's public key, to check who signed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a bundle is: plan, sizes, what is sealed, signature and hashes."""
    from semiopen.bundle.describe import describe
    from semiopen.bundle.keys import load_vendor_key

    with _progress() as report:
        description = describe(
            bundle,
            load_vendor_key(vendor_key) if vendor_key else None,
            lambda done, total: report("checking files", done, total),
        )
    verified, manifest = description.bundle, description.bundle.manifest
    if as_json:
        document = {
            **manifest.model_dump(mode="json"),
            "digest": verified.digest,
            "signed_by": description.signed_by,
            "files": {
                name: {"bytes": description.sizes[name], "sha256": digest} for name, digest in verified.digests.items()
            },
        }
        print(json.dumps(document, indent=1))
        return
    sealed, total = manifest.plan.prefix, manifest.num_layers
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", f"{manifest.architecture}, {total} blocks")
    table.add_row(
        "blocks",
        f"[red]{'■' * sealed}[/red][green]{'□' * (total - sealed)}[/green]  {sealed} sealed, {total - sealed} open",
    )
    table.add_row(
        "embedding",
        "sealed; open as well, because the open head is tied to it" if manifest.open_embedding else "sealed",
    )
    for field, value in manifest.plan.model_dump().items():
        if field != "prefix":
            table.add_row(field, str(value))
    share = manifest.sealed_bytes / (manifest.sealed_bytes + manifest.open_bytes)
    table.add_row(
        "sealed",
        f"{_size(manifest.sealed_bytes)} in {len(manifest.sealed)} tensors ({share:.1%}), AES-256-GCM",
    )
    table.add_row("open", _size(manifest.open_bytes))
    signer = (
        f"verified, vendor key {description.signed_by}"
        if description.signed_by
        else "[yellow]not verified: give --vendor-key[/yellow]"
    )
    table.add_row("signature", signer)
    table.add_row("bundle", f"format {manifest.format}, id {manifest.bundle_id}, made by {manifest.created_by}")
    table.add_row("digest", verified.digest)
    out.print(table)
    files = Table("file", "size", "SHA-256", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, digest in verified.digests.items():
        files.add_row(name, _size(description.sizes[name]), digest[:32] + "…")
    out.print()
    out.print(files)


@app.command()
def verify(
    bundle: Bundle,
    vendor_key: Annotated[Path, typer.Option(help="Vendor's public key (vendor.pub).", show_default=False)],
) -> None:
    """Check that every file of a bundle is what this vendor signed. Exit status 1 if not."""
    from semiopen.bundle.describe import describe
    from semiopen.bundle.keys import load_vendor_key

    with _progress() as report:
        description = describe(
            bundle, load_vendor_key(vendor_key), lambda done, total: report("checking files", done, total)
        )
    out.print(f"{bundle}: {len(description.sizes)} files as signed by vendor key {description.signed_by}.")


@app.command()
def enclave(
    bundle: Bundle,
    keys: Annotated[
        Path,
        typer.Option(help="Key folder; the sealing key goes to the enclave by pipe.", show_default=False),
    ],
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on.", show_default=False)],
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Run a dev enclave (not a TEE) until Ctrl-C, for several programs to share.

    Example: semiopen enclave my-bundle --keys vendor-keys --socket my.sock
    """
    from semiopen.host.client import EnclaveClient
    from semiopen.host.enclave_process import EnclaveProcess

    process = EnclaveProcess(bundle, keys, dtype, threads, socket)  # type: ignore[arg-type] - checked on its way in
    try:
        with err.status("The enclave loads the bundle ..."):
            process.wait_ready()
        client = EnclaveClient(socket)
        _banner(client.welcome.enclave, client.welcome.measures, True)
        client.close()
        err.print(f"Listening. Use it with: [bold]export SEMIOPEN_ENCLAVE={socket}[/bold]")
        while process.running():
            time.sleep(0.2)
        raise SemiopenError("The enclave has stopped; start it again.")
    finally:
        process.close()


@app.command()
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    keys: Keys = None,
    enclave: Enclave = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Continue a text.

    Example: semiopen generate my-bundle --keys vendor-keys --prompt "Once upon a time"
    """
    model = _load(bundle, keys, enclave, dtype, threads)  # before torch is imported, see semiopen.host.load

    import torch
    from transformers import AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    settings = _sampling(temperature, seed)
    started = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, **settings, max_new_tokens=_room(model, length, max_new_tokens), streamer=streamer
        )[0].tolist()  # type: ignore[operator]
    seconds = time.perf_counter() - started
    if as_json:
        document = {
            "prompt": prompt,
            "text": tokenizer.decode(tokens[length:], skip_special_tokens=True),
            "tokens": tokens[length:],
            "prompt_tokens": length,
            "seconds": round(seconds, 4),
            "enclave": _welcome(model).enclave,
        }
        print(json.dumps(document))
    else:
        err.print(f"[dim]{len(tokens) - length} tokens in {seconds:.1f} s[/dim]")


@app.command()
def chat(
    bundle: Bundle,
    keys: Keys = None,
    enclave: Enclave = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Talk to the model. /new starts over; /exit, or the end of input, ends.

    Example: semiopen chat my-bundle --keys vendor-keys
    """
    model = _load(bundle, keys, enclave, dtype, threads)

    from transformers import AutoTokenizer

    from semiopen.host.chat import Conversation

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    settings = _sampling(temperature, seed)
    conversation = Conversation(model, tokenizer)
    if not tokenizer.chat_template:
        err.print("[dim]This model has no chat template: it continues what you write.[/dim]")
    err.print("[dim]/new starts over, /exit ends.[/dim]")
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/new":
            conversation = Conversation(model, tokenizer)
        elif line:
            for piece in conversation.say(line, max_new_tokens, settings):
                print(piece, end="", flush=True)
            print()


@app.command()
def serve(
    bundle: Bundle,
    keys: Keys = None,
    enclave: Enclave = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    engine: Annotated[EngineName, typer.Option(help="What runs the open blocks.")] = EngineName.transformers,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; the bundle folder's when left out.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of API keys, one per line; or the variable SEMIOPEN_API_KEY. Neither: open to all."),
    ] = None,
    max_running: Annotated[int, typer.Option(help="Texts generated at once.", min=1)] = 64,
    max_waiting: Annotated[int, typer.Option(help="Texts in the queue; beyond, clients get status 429.", min=0)] = 256,
    kv_tokens: Annotated[int, typer.Option(help="Tokens that the KV cache holds, of all texts.", min=16)] = 1 << 16,
    max_body: Annotated[int, typer.Option(help="Longest request, in MiB.", min=1)] = 8,
    request_timeout: Annotated[float, typer.Option(help="Longest time for a request, in seconds.", min=0.1)] = 600,
    grace: Annotated[float, typer.Option(help="Seconds for running requests after Ctrl-C or SIGTERM.", min=0)] = 30,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to use instead of the model's chat template.")
    ] = None,
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Serve a bundle with an OpenAI-compatible API: chat, completions, models, metrics.

    Example: semiopen serve my-bundle --keys vendor-keys, then
    curl localhost:8000/v1/completions --json '{"prompt": "Once upon a time"}'
    """
    _check_enclave_given(keys, enclave)
    _settle_threads(threads)
    try:
        from semiopen.host.serving import launch
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("semiopen"):
            raise
        raise SemiopenError(
            f"Serving needs the package {error.name}; install it with: pip install 'semiopen[serve]'"
        ) from None
    options = launch.Options(
        bundle=bundle,
        keys=keys,
        enclave=None if keys else enclave,
        engine=engine.value,
        host=host,
        port=port,
        model=served_model_name,
        api_keys=launch.read_api_keys(api_key_file),
        max_running=max_running,
        max_waiting=max_waiting,
        kv_tokens=kv_tokens,
        max_body=max_body << 20,
        request_seconds=request_timeout,
        grace_seconds=grace,
        chat_template=chat_template,
        dtype=dtype,
        threads=threads,
    )
    # By default SIGTERM ends Python at once, and what was started for this command would go on without it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with err.status("Starting the enclave and the engine ..."):
        ready = launch.prepare(options)
    _banner(ready.enclave, ready.measures, False)
    for line in ready.notes:
        err.print(_plain(line), soft_wrap=True)
    launch.run(ready)


@app.command()
def compare(
    bundle: Bundle,
    original: Annotated[Path, typer.Argument(help="Folder of the original model.", show_default=False)],
    keys: Annotated[Path, typer.Option(help="Key folder.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    max_new_tokens: MaxNewTokens = 40,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Prove a bundle: the original's tokens side by side, and no sealed weight in plain form on disk.

    Exit status 1 if a token differs or a sealed weight is found.
    """
    started = time.time()
    prompts = prompt or ["Once upon a time", "The little dog was", "One day, a girl named Lily"]
    protected = _load(bundle, keys, None, dtype, 0)

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from semiopen.audit.equality import compare_tokens
    from semiopen.audit.plaintext import recent_files, sample_pieces, search
    from semiopen.model.checkpoint import weight_files

    logging.disable_progress_bar()
    plain = AutoModelForCausalLM.from_pretrained(original, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    comparisons = compare_tokens(plain, protected, tokenizer, prompts, max_new_tokens)
    table = Table("", "original", f"protected ({_welcome(protected).enclave})")
    for result in comparisons:
        mark = "[green]equal[/green]" if result.equal else "[red]DIFFERS[/red]"
        texts = [_plain(result.prompt + tokenizer.decode(ids)) for ids in (result.original, result.protected)]
        table.add_row(f"{mark}\n{len(result.original)} tokens", *texts)
    out.print(table)

    manifest = _manifest(bundle, keys)
    pieces = sample_pieces(weight_files(original), manifest)
    control = search(pieces, weight_files(original))
    finding = search(pieces, [*(path for path in sorted(bundle.rglob("*")) if path.is_file()), *recent_files(started)])
    out.print(
        f"Plaintext search: {finding.pieces} pieces of sealed weights, {_size(finding.bytes_searched)} searched in the "
        f"bundle and in temporary files: {sum(finding.found.values())} found. "
        f"Control, the original's files: {sum(control.found.values())} found."
    )
    for path, hits in finding.found.items():
        out.print(f"[red]{path} holds {hits} pieces of sealed weights.[/red]")
    if sum(control.found.values()) < len(pieces) or not pieces:
        raise SemiopenError("The search did not find the original's own weights, so it proves nothing; report this.")
    if finding.found or not all(result.equal for result in comparisons):
        raise SemiopenError("This bundle is not a faithful, sealed copy of the original; see above.")
    out.print("[green]All tokens equal; no sealed weight in plain form.[/green]")


def _check_enclave_given(keys: Path | None, enclave: Path | None) -> None:
    if keys is None and enclave is None:
        raise SemiopenError("Give --keys FOLDER to start a dev enclave, or --enclave SOCKET of a running one.")


def _settle_threads(threads: int) -> None:
    """Set what is read when torch is imported. Threads that spin between steps take the enclave's cores."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _load(bundle: Path, keys: Path | None, enclave: Path | None, dtype: str | None, threads: int) -> "PreTrainedModel":
    _check_enclave_given(keys, enclave)
    with err.status("Starting the enclave and opening the bundle ..."):
        from semiopen.host.load import load

        _settle_threads(threads)
        model = load(bundle, keys=keys, enclave=None if keys else enclave, dtype=dtype, threads=threads)
    welcome = _welcome(model)
    _banner(welcome.enclave, welcome.measures, False)
    return model


def _welcome(model: "PreTrainedModel") -> "Welcome":
    from semiopen.host.modeling import session_of

    return session_of(model).client.welcome


def _banner(kind: str, measures: list[str], full: bool) -> None:
    missing = [measure for measure in measures if measure.startswith("NOT applied")]
    err.print(
        f"[yellow]{_plain(kind)}[/yellow]"
        + ("" if full or not missing else f" [dim]({len(missing)} of {len(measures)} measures not applied)[/dim]")
    )
    for measure in measures if full else []:
        err.print(f"  [{'yellow' if measure in missing else 'dim'}]{_plain(measure)}[/]")


def _manifest(bundle: Path, keys: Path) -> Any:
    from semiopen.bundle.keys import load_vendor_key
    from semiopen.bundle.reader import read_files

    return read_files(bundle, load_vendor_key(keys), only=()).manifest


def _sampling(temperature: float, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _room(model: "PreTrainedModel", length: int, max_new_tokens: int) -> int:
    """Tokens that still fit the context behind `length` prompt tokens."""
    context = _welcome(model).context
    if length >= context:
        raise SemiopenError(f"The prompt has {length} tokens and the context {context}; shorten the prompt.")
    return min(max_new_tokens, context - length)


def _read_line() -> str | None:
    try:
        return (err.input("[bold]> [/bold]") if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


if __name__ == "__main__":
    main()
