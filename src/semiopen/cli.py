"""The command line: one verb per command, thin. Results go to standard output, everything else to standard error."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import semiopen
from semiopen.errors import SemiopenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from semiopen.bundle.lease import Rights
    from semiopen.host.client import EnclaveClient
    from semiopen.protocol.messages import Welcome
    from semiopen.vendor.plan_file import PlanDocument
    from semiopen.vendor.recovery import Price

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Ship a proprietary LLM to a customer's machine: a few layers sealed, the rest at full speed.\n\n"
    "At the vendor:    [bold]keygen[/bold], [bold]plan[/bold], [bold]seal[/bold], [bold]lease[/bold], "
    "[bold]trace[/bold]\n\n"
    "At the customer:  [bold]verify[/bold], [bold]inspect[/bold], [bold]chat[/bold], [bold]generate[/bold], "
    "[bold]enclave[/bold], [bold]serve[/bold], [bold]tune[/bold], [bold]distil[/bold]\n\n"
    "For both:         [bold]compare[/bold], [bold]audit[/bold]",
)
lease_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Issue and read leases: what an enclave may do with a bundle, for how many tokens, and until when.",
)
app.add_typer(lease_app, name="lease")
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
Lease = Annotated[
    Path | None,
    typer.Option(
        help="Lease of the vendor's, with --keys, for a bundle that needs one. Its use is counted in FILE.used."
    ),
]
DTypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the bundle's own when left out.")
]
Threads = Annotated[int, typer.Option(help="CPU threads of the enclave and of the host; 0 for torch's choice.", min=0)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 answers greedily; higher samples more freely.", min=0.0)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Adapter on the open blocks: the folder that 'semiopen tune' or PEFT has written.")
]


TRAINING, KEPT = "Training", "What is kept, and resuming"  # panels of `tune --help`


class LossKind(StrEnum):
    """Which tokens of an example are learned."""

    completion = "completion"
    all = "all"


class ScheduleKind(StrEnum):
    """How a learning rate falls."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


# What training commands share.
Data = Annotated[
    Path,
    typer.Option(help="Your data: JSON Lines (.jsonl) or plain text (.txt). It stays here.", show_default=False),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Longest example in tokens; longer ones lose their end. \\[default: the context, 1024 at most]"),
]
LossOption = Annotated[
    LossKind,
    typer.Option(help="What to learn: completions and the assistant's turns, or all tokens. Of a text, all."),
]
Epochs = Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate.", rich_help_panel=TRAINING)]
Schedule = Annotated[ScheduleKind, typer.Option(help="How the rate falls after its warm-up.", rich_help_panel=TRAINING)]
WarmUp = Annotated[
    float, typer.Option(help="Share of all steps in which the rate rises.", min=0, rich_help_panel=TRAINING)
]
Accumulate = Annotated[int, typer.Option(help="Batches of one step of the optimiser.", min=1, rich_help_panel=TRAINING)]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.", min=0, rich_help_panel=TRAINING)]
GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=TRAINING),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=KEPT)]
SaveEvery = Annotated[
    int, typer.Option(help="Steps between checkpoints, which --resume needs.", min=1, rich_help_panel=KEPT)
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of what a resumed run needs; removed at the end. \\[default: OUT.work]", rich_help_panel=KEPT
    ),
]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
TrainingDType = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; the bundle's own when left out, float32 where that is float16."),
]


class StatesKind(StrEnum):
    """Where the states of private data are kept while tuning."""

    disk = "disk"
    memory = "memory"


class HeadKind(StrEnum):
    """Who holds final norm, output projection and sampling."""

    open = "open"
    shuffled = "shuffled"
    sealed = "sealed"


class LogitsKind(StrEnum):
    """What leaves a sealed head beside tokens."""

    none = "none"
    top_k = "top-k"
    full = "full"


class FoldKind(StrEnum):
    """In which basis the weights of a bundle are stored."""

    none = "none"
    keyed = "keyed"


class KvKind(StrEnum):
    """How keys and values lie in the host's cache."""

    plain = "plain"
    folded = "folded"
    enclave = "enclave"


class DivergenceKind(StrEnum):
    """How a student's distance from its teacher is measured."""

    forward_kl = "forward-kl"
    reverse_kl = "reverse-kl"
    jsd = "jsd"


class Attack(StrEnum):
    """What can be run against a bundle."""

    none = "none"
    sem = "sem"
    ft_closed = "ft_closed"
    ft_all = "ft_all"
    base_graft = "base_graft"
    weights = "weights"
    kv = "kv"


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
        str | None,
        typer.Option(
            help="embedding, bottom (an eighth of the blocks; the default), whole, solid (measures the model's "
            "distillation difficulty first, see `semiopen plan`), distillock (embedding; words shuffled; keyed), "
            "kv-shield (embedding; kv enclave), or recommended (an eighth of the blocks, at least two; head sealed; "
            "keyed)."
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json, made for this model by `semiopen plan`.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts that solid measures on; without, the model samples its own."),
    ] = None,
    head: Annotated[
        HeadKind | None,
        typer.Option(
            help="sealed: the enclave chooses the tokens, and gives logits only under a lease that allows it. "
            "shuffled: the projection is open, which word is which only the enclave knows. Both need a lease."
        ),
    ] = None,
    fold: Annotated[
        FoldKind | None,
        typer.Option(help="keyed: all weights in a secret basis of one customer's own, which leaks are traced by."),
    ] = None,
    kv: Annotated[
        KvKind | None,
        typer.Option(
            help="folded: keys and values are cached in a secret basis, at no cost. enclave: each open block's "
            "attention passes through the enclave too, which knows the order of its values (KV-Shield)."
        ),
    ] = None,
    customer: Annotated[str | None, typer.Option(help="For whom a keyed bundle is. Not written into it.")] = None,
    require_lease: Annotated[
        bool, typer.Option("--require-lease", help="No enclave opens it without a lease, though its head be open.")
    ] = False,
) -> None:
    """Seal a model: write a bundle whose bottom layers only an enclave can open.

    Example: semiopen seal ./my-model --out my-bundle --keys vendor-keys --prefix 2

    Example: semiopen seal ./my-model --out my-bundle --keys vendor-keys --plan plan.json
    """
    from semiopen.vendor.seal import seal as seal_model

    with _steps() if preset == "solid" else _progress() as report:
        manifest = seal_model(
            model,
            bundle,
            keys,
            prefix,
            preset,
            report,
            plan=plan,
            texts=texts,
            fold=fold.value if fold else None,
            customer=customer,
            head=head.value if head else None,
            require_lease=require_lease,
            kv=kv.value if kv else None,
        )
    parts = "the embedding and the head" if manifest.plan.head == "sealed" else "the embedding"
    err.print(f"Sealed {manifest.plan.prefix} of {manifest.num_layers} blocks and {parts} into {bundle}.")
    if manifest.open_embedding:
        err.print("The embedding is tied to the open head, so its matrix is open as well; the blocks are sealed.")
    if manifest.lease_required:
        err.print("An enclave opens this bundle only with a lease; make one with: semiopen lease new", soft_wrap=True)


@lease_app.command("new")
def lease_new(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle that it is for.", show_default=False)],
    keys: Annotated[Path, typer.Option(help="Key folder of the vendor.", show_default=False)],
    customer: Annotated[str, typer.Option(help="For whom, in your words; the customer sees it.", show_default=False)],
    to: Annotated[Path, typer.Option("--out", help="File of the lease; must not exist.", show_default=False)],
    tokens: Annotated[
        int | None,
        typer.Option(help="Budget; no limit when left out. `semiopen plan --attack-budget` proposes one.", min=1),
    ] = None,
    rate: Annotated[int | None, typer.Option(help="Tokens a minute; no limit when left out.", min=1)] = None,
    lasts: Annotated[str, typer.Option(help="How long it is valid: 90s, 45m, 12h or 30d.")] = "30d",
    begins: Annotated[datetime | None, typer.Option(help="When it begins, UTC; now when left out.")] = None,
    logits: Annotated[
        LogitsKind,
        typer.Option(help="What a sealed head gives beside tokens. full: whoever has them can compute the head."),
    ] = LogitsKind.none,
    top_k: Annotated[
        int, typer.Option(help="With --logits top-k: how many of the likeliest tokens' log-probabilities.", min=0)
    ] = 0,
    distil: Annotated[bool, typer.Option("--distil", help="Allow training a student: logits in full.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Allow training an adapter: logits in full, gradients through the head.")
    ] = False,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Allow no choice of tokens.")] = False,
) -> None:
    """Issue a lease: a signed file that lets an enclave use one bundle.

    It counts tokens through the sealed blocks, and answers of a head that is not open; the larger is what is used. All
    that a prefix emits is training data for a copy, so the budget is what protects it: take it from `semiopen plan`.

    Example: semiopen lease new --bundle my-bundle --keys vendor-keys --customer acme --tokens 1000000 --out acme.jwt
    """
    from semiopen.bundle.lease import Rights
    from semiopen.vendor.lease import new_lease, parse_duration

    if (logits is LogitsKind.top_k) != (top_k > 0):
        raise SemiopenError("--top-k N goes with --logits top-k; give both, or neither.")
    rights = Rights(generate=not no_generate, logits=logits.value, top_k=top_k, distil=distil, tune=tune)
    start = None if begins is None else int(begins.replace(tzinfo=UTC).timestamp())
    text = new_lease(bundle, keys, customer, rights, tokens, rate, start, parse_duration(lasts))
    try:
        with to.open("x") as file:
            file.write(text + "\n")
    except FileExistsError:
        raise SemiopenError(f"{to} exists already; give each lease a file of its own.") from None
    _show_lease(text, keys)
    err.print(f"Written to {_plain(str(to))}; the customer gives it as --lease.", soft_wrap=True)
    if tokens is None:
        err.print("Without --tokens, the customer may ask for as many states as a copy needs; see `semiopen plan`.")


@lease_app.command("show")
def lease_show(
    file: Annotated[Path, typer.Argument(help="File of the lease.", show_default=False)],
    vendor_key: Annotated[Path | None, typer.Option(help="Vendor's public key, to check who signed it.")] = None,
) -> None:
    """Show what a lease allows, and until when. Exit status 1 if the given key did not sign it.

    Example: semiopen lease show acme.jwt --vendor-key vendor.pub
    """
    from semiopen.host.enclave_process import read_lease

    _show_lease(read_lease(file), vendor_key)


def _show_lease(text: str, vendor_key: Path | None) -> None:
    from semiopen.bundle.keys import load_vendor_key
    from semiopen.bundle.lease import read_lease, words_of

    lease = read_lease(text, load_vendor_key(vendor_key) if vendor_key else None)
    ended = " [red](ended)[/red]" if time.time() >= lease.exp else ""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("customer", _plain(lease.sub))
    table.add_row("bundle", lease.bundle)
    table.add_row("valid", f"{words_of(lease.nbf)} to {words_of(lease.exp)}{ended}")
    table.add_row("tokens", f"{lease.tokens:,}" if lease.tokens else "no limit")
    table.add_row("rate", f"{lease.rate:,} tokens a minute" if lease.rate else "no limit")
    table.add_row("rights", _rights(lease.rights))
    signature = (
        f"verified, vendor key {lease.iss}" if vendor_key else "[yellow]not verified: give --vendor-key[/yellow]"
    )
    table.add_row("signature", signature)
    table.add_row("id", lease.jti)
    out.print(table)


def _rights(rights: "Rights") -> str:
    named = {
        "choose tokens": rights.generate,
        f"log-probabilities of the {rights.top_k} likeliest": rights.logits == "top-k",
        "all logits": rights.logits == "full",
        "distil (all logits)": rights.distil,
        "tune (all logits, gradients)": rights.tune,
    }
    return ", ".join(name for name, given in named.items() if given) or "states of the sealed blocks alone"


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model folder, or hub id.", show_default=False)],
    to: Annotated[Path, typer.Option("--out", help="File to write, for `semiopen seal --plan`.", show_default=False)],
    public_base: Annotated[
        str | None,
        typer.Option(
            help="Public model of the same shapes that this one was made from. A thief has it, and starts there.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts to measure on: plain, or JSONL with a field text. Without, the model writes some."),
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Rule: the smallest prefix whose difficulty is at least (1 - epsilon) of all's.")
    ] = 0.05,
    draws: Annotated[int, typer.Option(help="Random draws behind each difficulty.", min=1)] = 5,
    curve: Annotated[bool, typer.Option("--curve", help="Measure every prefix, not only those bisection needs.")] = (
        False
    ),
    attack_budget: Annotated[
        int | None,
        typer.Option(help="Tokens that an attack may query: shows what the plan protects. Needs memory and time."),
    ] = None,
    needed_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the customer needs; the attack's whole budget when left out.", min=1)
    ] = None,
    agreement: Annotated[float, typer.Option(help="Share of tokens that a copy may get right.")] = 0.8,
    max_slowdown: Annotated[
        float, typer.Option(help="Acceptable time per step, protected over plain, at one request.", min=1.0)
    ] = 1.5,
    candidates: Annotated[
        str | None, typer.Option(help="Prefixes to attack, such as 1,2,4. Left out: powers of two and the rule's.")
    ] = None,
    attack_steps: Annotated[int, typer.Option(help="Optimiser steps of one attack; fewer flatter the plan.")] = 1000,
    attack_seeds: Annotated[int, typer.Option(help="Attacks per number of tokens.")] = 2,
    sequences: Annotated[int, typer.Option(help="Texts to measure on, of 128 tokens each.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    threads: Threads = 0,
) -> None:
    """Choose how many blocks to seal, and say what that protects and costs.

    Two answers. Distillation difficulty is quick and holds one block in memory: how bad is the model when the sealed
    layers are replaced? It says where a thief starts, not what the rest costs. With --attack-budget the planner also
    attacks: how many tokens buy a copy? Where the two differ the attack decides.

    Example: semiopen plan ./my-model --texts texts.jsonl --out plan.json

    Example: semiopen plan ./my-model --public-base ./base --texts texts.jsonl --attack-budget 65536 --out plan.json
    """
    _settle_threads(threads)
    from semiopen.vendor.plan_file import write_plan
    from semiopen.vendor.planner import PlanOptions, make_plan

    options = PlanOptions(
        epsilon=epsilon,
        draws=draws,
        curve=curve,
        sequences=sequences,
        attack_budget=attack_budget,
        needed_tokens=needed_tokens,
        agreement=agreement,
        max_slowdown=max_slowdown,
        candidates=_whole_numbers(candidates) if candidates else None,
        attack_steps=attack_steps,
        attack_seeds=attack_seeds,
        seed=seed,
    )
    if not to.absolute().parent.is_dir():
        raise SemiopenError(f"{to.absolute().parent} is not a folder; make it, or give another --out.")
    with _steps() as report:
        document = make_plan(model, options, public_base, texts, report)
    write_plan(document, to)
    _show_plan(document)
    err.print(f"Written to {to}; seal with: semiopen seal {model} --plan {to} --out BUNDLE --keys KEYS", soft_wrap=True)


@app.command()
def trace(
    suspect: Annotated[
        Path, typer.Argument(help="Folder with safetensors, or one such file: all or some tensors.", show_default=False)
    ],
    registry: Annotated[
        Path, typer.Option(help="The folder 'customers' in the vendor's key folder.", show_default=False)
    ],
) -> None:
    """Say from which customer's keyed bundle a checkpoint comes, or that it comes from none.

    A thief who turns the weights once more is not found; see docs/fold.md.

    Example: semiopen trace ./found-somewhere --registry vendor-keys/customers
    """
    with err.status("Comparing ..."):
        from semiopen.vendor.trace import trace as trace_leak

        findings = trace_leak(suspect, registry)
    table = Table("customer", "bundle", "z", "p", "matrices", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for finding in [finding for finding in findings if finding.found] or findings[:1]:
        chance = f"{finding.p:.1e}" if finding.p else "< 1e-300"
        matrices = f"{len(finding.matched)} of {finding.compared} match"
        name = finding.customer if finding.found else f"none (nearest: {finding.customer})"
        table.add_row(_plain(name), finding.bundle_id[:16], f"{finding.z:.1f}", chance, matrices)
    out.print(table)
    for name in findings[0].matched if findings[0].found else ():
        out.print(f"[dim]{_plain(name)}[/dim]")


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SemiopenError(f"{text!r} is not a list of numbers; write them as 1,2,4.") from None


def _show_plan(document: "PlanDocument") -> None:
    facts, texts = document.model, document.texts
    out.print(
        f"{facts.architecture}, {facts.num_layers} blocks, {facts.parameters:,} parameters; measured on "
        f"{texts.sequences} texts of {texts.sequence_tokens} tokens "
        + ("from the file" if texts.source == "file" else "that the model wrote")
    )
    for difficulty in document.difficulties:
        start = "fresh layers" if difficulty.start == "noise" else "the public base's layers"
        out.print(f"\nLoss with {start} in place of the sealed ones ({difficulty.evaluations} evaluations):")
        table = Table("sealed", "DD (nats)", "tokens right", box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_row("nothing", f"{difficulty.unharmed_loss:.3f}", "100.0%")
        for harm in difficulty.table:
            error = "" if harm.standard_error is None else f" ± {harm.standard_error:.3f}"
            mark = "  rule" if harm.prefix == difficulty.rule_prefix else ""
            table.add_row(f"{harm.prefix}", f"{harm.loss:.3f}{error}", f"{harm.agreement:.1%}{mark}")
        out.print(table)
    if document.attack:
        levels = [price.agreement for price in document.attack.curves[0].prices]
        out.print("\nTokens with which the attack (SEM) gets a share of tokens right, and their 95 % interval:")
        table = Table(
            "sealed", *(f"{level:.0%}" for level in levels), box=None, padding=(0, 2, 0, 0), header_style="bold"
        )
        for curve in document.attack.curves:
            table.add_row(f"{curve.prefix}", *(_bought(price) for price in curve.prices))
        out.print(table)
    out.print("\nCosts:")
    columns = ("sealed", "parameters", "multiply-adds", "enclave weights", "and per token", "slowdown, 1", "8 requests")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown = {1, document.plan.prefix, facts.num_layers}
    shown |= {harm.prefix for difficulty in document.difficulties for harm in difficulty.table}
    shown |= {curve.prefix for curve in document.attack.curves} if document.attack else set()
    for cost in document.costs:
        if cost.prefix in shown:
            table.add_row(
                f"{cost.prefix}{'  plan' if cost.prefix == document.plan.prefix else ''}",
                f"{cost.parameter_share:.1%}",
                f"{cost.multiply_add_share:.1%}",
                _size(cost.weight_bytes),
                _size(cost.kv_bytes_per_token),
                f"{cost.slowdown_1:.2f}",
                f"{cost.slowdown_8:.2f}",
            )
    out.print(table)
    out.print()
    for sentence in document.findings:
        out.print(_plain(sentence), soft_wrap=True)
    for sentence in document.warnings:
        out.print(f"[yellow]Warning:[/yellow] {_plain(sentence)}", soft_wrap=True)
    budget = "" if document.proposed_tokens is None else f"; propose a lease of {document.proposed_tokens:,} tokens"
    out.print(f"[bold]Plan: seal {document.plan.prefix} of {facts.num_layers} blocks and the embedding{budget}.[/bold]")


def _bought(price: "Price") -> str:
    tokens, low, high = ("more" if value is None else f"{value:,}" for value in (price.tokens, price.low, price.high))
    return f"{tokens} ({low} - {high})" if price.low is not None else "more than tried"


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
    if manifest.plan.fold == "keyed":
        from semiopen.model.split import config_from_dict
        from semiopen.model.symmetries import describe as describe_fold

        config = config_from_dict(json.loads(verified.read("config.json"))["text_config"])
        for where, what in describe_fold(config).items():
            table.add_row(f"  {where}", f"[dim]{what}[/dim]")
    if manifest.plan.kv != "plain":
        from semiopen.model.kv_symmetries import describe as describe_kv
        from semiopen.model.split import config_from_dict

        config = config_from_dict(json.loads(verified.read("config.json"))["text_config"])
        for where, what in describe_kv(config, manifest.plan.kv).items():
            table.add_row(f"  {where}", f"[dim]{what}[/dim]")
    table.add_row("lease", "needed: --lease FILE" if manifest.lease_required else "not needed")
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
    lease: Lease = None,
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Run a dev enclave (not a TEE) until Ctrl-C, for several programs to share.

    Example: semiopen enclave my-bundle --keys vendor-keys --socket my.sock
    """
    from semiopen.host.client import EnclaveClient
    from semiopen.host.enclave_process import EnclaveProcess

    process = EnclaveProcess(bundle, keys, dtype, threads, socket, lease=lease)  # type: ignore[arg-type] - checked there
    try:
        with err.status("The enclave loads the bundle ..."):
            process.wait_ready()
        client = EnclaveClient(socket)
        _banner(client.welcome.enclave, client.welcome.measures, True)
        _lease_banner(client)
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
    lease: Lease = None,
    adapter: Adapter = None,
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
    # Before torch is imported, see semiopen.host.load.
    model = _load(bundle, keys, enclave, dtype, threads, adapter, lease)

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
    lease: Lease = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    dtype: DTypeOption = None,
    threads: Threads = 0,
) -> None:
    """Talk to the model. /new starts over; /exit, or the end of input, ends.

    Example: semiopen chat my-bundle --keys vendor-keys
    """
    model = _load(bundle, keys, enclave, dtype, threads, adapter, lease)

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
    lease: Lease = None,
    adapter: Adapter = None,
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
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="Let API keys share what others' prompts begin with, and see it.")
    ] = False,
    forget_after: Annotated[
        float | None, typer.Option(help="Seconds without a request after which kept texts are wiped.", min=0.1)
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
    with _extra("Serving", "serve"):
        from semiopen.host.serving import launch
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
        adapter=adapter,
        lease=lease,
        dtype=dtype,
        threads=threads,
        share_prefixes=share_prefixes,
        forget_after=forget_after,
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
def tune(
    bundle: Bundle,
    data: Data,
    adapter: Annotated[Path, typer.Option("--out", help="Folder of the adapter; must not exist.", show_default=False)],
    keys: Keys = None,
    enclave: Enclave = None,
    lease: Lease = None,
    max_length: MaxLength = None,
    loss: LossOption = LossKind.completion,
    eval_share: Annotated[
        float, typer.Option(help="Share of the examples held back, to tell the loss on. 0 for none.", min=0, max=0.9)
    ] = 0.05,
    epochs: Epochs = 3.0,
    lr: LearningRate = 2e-4,
    schedule: Schedule = ScheduleKind.cosine,
    warmup: WarmUp = 0.03,
    batch_size: Annotated[
        int, typer.Option(help="Examples in the model at once.", min=1, rich_help_panel=TRAINING)
    ] = 8,
    accumulate: Accumulate = 1,
    weight_decay: WeightDecay = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same adapter.", min=0, rich_help_panel=TRAINING)] = 0,
    gradient_checkpointing: GradientCheckpointing = False,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.", min=1, rich_help_panel=TRAINING)] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="LoRA's part is scaled by alpha / rank. \\[default: 2 x rank]", rich_help_panel=TRAINING),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Of LoRA.", min=0, rich_help_panel=TRAINING)] = 0.0,
    targets: Annotated[
        str,
        typer.Option(help="Modules to adapt: names with commas, such as q_proj,v_proj.", rich_help_panel=TRAINING),
    ] = "all-linear",
    resume: Resume = False,
    save_every: SaveEvery = 100,
    work: Work = None,
    states: Annotated[
        StatesKind,
        typer.Option(
            help="Where the prefix's states are kept. memory: never on disk, and --resume asks the enclave again.",
            rich_help_panel=KEPT,
        ),
    ] = StatesKind.disk,
    keep_states: Annotated[
        bool,
        typer.Option(
            "--keep-states",
            help="Leave the states in the work folder: further runs on the same data cost no tokens.",
            rich_help_panel=KEPT,
        ),
    ] = False,
    as_json: SummaryAsJson = False,
    dtype: TrainingDType = None,
    threads: Threads = 0,
) -> None:
    """Fine-tune the open blocks on private data (LoRA). The data stays here; the enclave sees each example once.

    Each line of a .jsonl file is one example, in any of three shapes:

    {"text": "..."}, {"prompt": "...", "completion": "..."}, or
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

    A .txt file is cut into examples of --max-length tokens.

    Example: semiopen tune my-bundle --keys vendor-keys --data letters.jsonl --out my-adapter, then
    semiopen chat my-bundle --keys vendor-keys --adapter my-adapter
    """
    _check_enclave_given(keys, enclave)
    _settle_threads(threads)
    with err.status("Preparing ..."), _extra("Tuning", "tune"):
        from semiopen.host.tuning import run
        from semiopen.host.tuning.settings import TuneSettings
    settings = TuneSettings(
        rank=rank,
        alpha=alpha or 2 * rank,
        dropout=dropout,
        targets="all-linear" if targets == "all-linear" else tuple(name.strip() for name in targets.split(",")),
        epochs=epochs,
        learning_rate=lr,
        warmup=warmup,
        schedule=schedule.value,
        batch_size=batch_size,
        accumulate=accumulate,
        weight_decay=weight_decay,
        max_length=max_length,
        loss=loss.value,
        eval_share=eval_share,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
    )
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as report:
        result = run.tune(
            bundle,
            data,
            adapter,
            keys,
            None if keys else enclave,
            settings,
            dtype=dtype,
            threads=threads,
            lease=lease,
            work=work,
            states=states.value,
            keep_states=keep_states,
            resume=resume,
            progress=report,
            say=lambda line: err.print(_plain(line), soft_wrap=True),
        )
    if as_json:
        print(json.dumps({"adapter": str(adapter), **dataclasses.asdict(result)}))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    before, after = result.loss_before, result.loss_after
    if before is not None and after is not None:
        table.add_row("loss", f"{before:.4f} before, {after:.4f} after (nats per token, {result.held_back} held back)")
    reused = f"; {result.reused_tokens:,} reused from an earlier run" if result.reused_tokens else ""
    table.add_row("enclave", f"{result.enclave_tokens:,} tokens, metered{reused}")
    table.add_row("", f"{result.tokens * epochs:,.0f} without keeping the states, over {epochs:g} epochs")
    table.add_row("training", f"{result.steps:,} steps in {result.training_seconds:.1f} s")
    table.add_row("adapter", f"{adapter}, {result.trained_parameters:,} parameters")
    out.print(table)


@app.command()
def distil(
    bundle: Bundle,
    student: Annotated[
        Path,
        typer.Option(help="Folder of the model to train; its vocabulary is the bundle's.", show_default=False),
    ],
    data: Data,
    to: Annotated[
        Path, typer.Option("--out", help="Folder of the trained student; must not exist.", show_default=False)
    ],
    keys: Keys = None,
    enclave: Enclave = None,
    lease: Lease = None,
    divergence: Annotated[
        DivergenceKind, typer.Option(help="How far the student is from the teacher, at each learned token.")
    ] = DivergenceKind.forward_kl,
    beta: Annotated[float, typer.Option(help="Of jsd: near 0 is forward KL, near 1 reverse KL.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Divides the logits of both.")] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Learn from the teacher's likeliest tokens and from the others as one. Asked for once and kept, so "
            "that further epochs cost no tokens. \\[default: the whole vocabulary, asked for in each epoch]",
            min=1,
        ),
    ] = None,
    truth: Annotated[float, typer.Option(help="Share of the data's own tokens in the loss.", min=0, max=1)] = 0.0,
    on_policy: Annotated[
        float, typer.Option(help="Share of the batches in which the student writes the completions.", min=0, max=1)
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion that the student writes.", min=1)] = 128,
    max_length: MaxLength = None,
    loss: LossOption = LossKind.completion,
    eval_share: Annotated[
        float, typer.Option(help="Share of the examples held back, to compare on. 0 for none.", min=0, max=0.9)
    ] = 0.05,
    epochs: Epochs = 3.0,
    lr: LearningRate = 2e-4,
    schedule: Schedule = ScheduleKind.cosine,
    warmup: WarmUp = 0.03,
    batch_size: Annotated[
        int, typer.Option(help="Examples in the models at once.", min=1, rich_help_panel=TRAINING)
    ] = 8,
    accumulate: Accumulate = 1,
    weight_decay: WeightDecay = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same student.", min=0, rich_help_panel=TRAINING)] = 0,
    gradient_checkpointing: GradientCheckpointing = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            help="Train LoRA of this rank, merged at the end. \\[default: train all weights]",
            min=1,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    resume: Resume = False,
    save_every: SaveEvery = 100,
    work: Work = None,
    as_json: SummaryAsJson = False,
    dtype: TrainingDType = None,
    threads: Threads = 0,
) -> None:
    """Train a smaller model on a bundle as its teacher. Data, teacher and student stay on this machine.

    The data is as for `semiopen tune`; what is learned of it is what the teacher would say there.

    Example: semiopen distil my-bundle --keys vendor-keys --student small --data letters.jsonl --out trained
    """
    _check_enclave_given(keys, enclave)
    _settle_threads(threads)
    with err.status("Preparing ..."), _extra("Distilling", "distil"):
        from semiopen.host.distilling import run
        from semiopen.host.distilling.settings import DistilSettings
    settings = DistilSettings(
        divergence=divergence.value,
        beta=beta,
        temperature=temperature,
        top_k=top_k,
        truth=truth,
        on_policy=on_policy,
        max_new_tokens=max_new_tokens,
        lora_rank=lora_rank,
        epochs=epochs,
        learning_rate=lr,
        warmup=warmup,
        schedule=schedule.value,
        batch_size=batch_size,
        accumulate=accumulate,
        weight_decay=weight_decay,
        max_length=max_length,
        loss=loss.value,
        eval_share=eval_share,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
    )
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as report:
        result = run.distil(
            bundle,
            student,
            data,
            to,
            keys,
            None if keys else enclave,
            settings,
            lease=lease,
            dtype=dtype,
            threads=threads,
            work=work,
            resume=resume,
            progress=report,
            say=lambda line: err.print(_plain(line), soft_wrap=True),
        )
    if as_json:
        print(json.dumps({"student": str(to), **dataclasses.asdict(result)}))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    before, after = result.divergence_before, result.divergence_after
    if before is not None and after is not None:
        table.add_row("distance", f"{before:.4f} before, {after:.4f} after (forward KL, nats per token)")
        table.add_row("agreement", f"{result.agreement_before:.1%} before, {result.agreement_after:.1%} after")
        table.add_row("", f"on {result.held_back} examples held back")
    reused = f"; answers to {result.reused_tokens:,} reused from an earlier run" if result.reused_tokens else ""
    table.add_row("enclave", f"{result.enclave_tokens:,} tokens, metered{reused}")
    table.add_row("training", f"{result.steps:,} steps in {result.training_seconds:.1f} s")
    table.add_row("student", f"{to}, {result.trained_parameters:,} parameters trained")
    out.print(table)


@app.command()
def compare(
    bundle: Bundle,
    original: Annotated[Path, typer.Argument(help="Folder of the original model.", show_default=False)],
    keys: Annotated[Path, typer.Option(help="Key folder.", show_default=False)],
    lease: Lease = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    max_new_tokens: MaxNewTokens = 40,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Prove a bundle: the original's tokens side by side, and no sealed weight in plain form on disk.

    Exit status 1 if a token differs or a sealed weight is found.
    """
    started = time.time()
    prompts = prompt or ["Once upon a time", "The little dog was", "One day, a girl named Lily"]
    protected = _load(bundle, keys, None, dtype, 0, lease=lease)

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


@app.command()
def audit(
    bundle: Bundle,
    to: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Folder of the report. If an earlier audit of the same was interrupted there, it goes on.",
            show_default=False,
        ),
    ],
    keys: Keys = None,
    enclave: Enclave = None,
    lease: Lease = None,
    attack: Annotated[
        list[Attack] | None,
        typer.Option(
            help="May be given several times. sem fits the sealed blocks to their states; ft_closed and ft_all train "
            "through the whole model; base_graft needs --public-base; none asks nothing, and always runs; weights "
            "takes the files by themselves; kv reads conversations from the cache. "
            "\\[default: sem, ft_closed and ft_all; --quick: sem]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="A thief's budget; may be given several times. ft_closed and ft_all run at the largest two. "
            "\\[default: 2048, 8192, 32768 and, without --quick, 131072]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Runs per budget. \\[default: 2; --quick: 1]", min=1, max=100, show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimiser steps of a run; few flatter the plan. \\[default: 600; --quick: 200]",
            min=1,
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="What to ask and to mark with: plain text, or JSONL with a field text; best what the customer's own "
            "prompts look like. Without, the model writes some."
        ),
    ] = None,
    public_base: Annotated[
        str | None,
        typer.Option(help="Public model of the same shapes that this one was made from: a thief starts there as well."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in minutes; what holds in it shows little.")] = (
        False
    ),
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; float32 with --keys, else the bundle's own."),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Attack a bundle through its enclave: how many tokens buy a copy, and what is a lease to allow?

    With a head that is not open, --keys must be the vendor's, as the audit writes itself a lease to mark with; --lease
    then says what the thief may do, by default what `lease new` gives: tokens, no logits.

    Writes report.html (one page, for people), report.json and outcomes.jsonl. Every claim gets a verdict: it holds,
    it is broken, or it is not shown. A broken claim is a result, not an error: the exit status is 0.

    Example: semiopen audit my-bundle --keys vendor-keys --quick --out first-look

    Example: semiopen audit my-bundle --keys vendor-keys --texts texts.jsonl --tokens 4096 --tokens 65536 --out audit
    """
    _check_enclave_given(keys, enclave)
    _settle_threads(threads)
    with err.status("Preparing ..."):
        from semiopen.audit.report import HTML_NAME
        from semiopen.audit.run import AuditOptions
        from semiopen.audit.run import audit as run_audit

    options = AuditOptions.of([one.value for one in attack or ()], tokens, seeds, steps, quick)
    if Attack.base_graft in (attack or ()) and public_base is None:
        raise SemiopenError("base_graft puts a public relative's layers in place; give it as --public-base MODEL.")
    words: list[object] = ["semiopen", "audit", bundle, *(("--keys", keys) if keys else ("--enclave", enclave))]
    words += [word for budget in tokens or () for word in ("--tokens", budget)]
    given = {
        "--lease": lease,
        "--seeds": seeds,
        "--steps": steps,
        "--texts": texts,
        "--public-base": public_base,
        "--dtype": dtype,
    }
    words += [word for name, value in given.items() if value is not None for word in (name, value)]
    words += ["--quick"] if quick else []
    try:
        with _work() as report:
            result = run_audit(
                bundle,
                to,
                options,
                keys,
                None if keys else enclave,
                dtype=dtype,
                threads=threads,
                texts=texts,
                public_base=public_base,
                lease=lease,
                command=tuple(str(word) for word in words),
                progress=report,
                say=lambda line: err.print(_plain(line), soft_wrap=True),
            )
    except KeyboardInterrupt:
        err.print(f"\nStopped. What is done is kept in {_plain(str(to))}; the same command goes on.", soft_wrap=True)
        raise
    colours = {"holds": "green", "broken": "red", "not shown": "yellow"}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for verdict in result.verdicts:
        table.add_row(f"[{colours[verdict.status]}]{verdict.status}[/]", _plain(verdict.claim))
    out.print(table)
    out.print(f"\n{_plain(result.verdicts[0].words)}", soft_wrap=True)
    err.print(f"The whole report: {_plain(str(to / HTML_NAME))}", soft_wrap=True)


def _check_enclave_given(keys: Path | None, enclave: Path | None) -> None:
    if keys is None and enclave is None:
        raise SemiopenError("Give --keys FOLDER to start a dev enclave, or --enclave SOCKET of a running one.")


@contextlib.contextmanager
def _extra(what: str, name: str) -> Iterator[None]:
    """Where an import needs packages that only `semiopen[name]` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("semiopen"):
            raise
        raise SemiopenError(
            f"{what} needs the package {error.name}; install it with: pip install 'semiopen[{name}]'"
        ) from None


def _settle_threads(threads: int) -> None:
    """Set what is read when torch is imported. Threads that spin between steps take the enclave's cores."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _load(
    bundle: Path,
    keys: Path | None,
    enclave: Path | None,
    dtype: str | None,
    threads: int,
    adapter: Path | None = None,
    lease: Path | None = None,
) -> "PreTrainedModel":
    _check_enclave_given(keys, enclave)
    with err.status("Starting the enclave and opening the bundle ..."):
        from semiopen.host.load import load
        from semiopen.host.tuning.adapter_files import check_adapter

        if adapter is not None:
            check_adapter(adapter, bundle)
        _settle_threads(threads)
        model = load(bundle, keys=keys, enclave=None if keys else enclave, dtype=dtype, threads=threads, lease=lease)
        if adapter is not None:
            from semiopen.host.tuning.adapters import put_adapter

            model = put_adapter(model, adapter)
    client = _client(model)
    _banner(client.welcome.enclave, client.welcome.measures, False)
    _lease_banner(client)
    return model


def _client(model: "PreTrainedModel") -> "EnclaveClient":
    from semiopen.host.modeling import session_of

    return session_of(model).client


def _welcome(model: "PreTrainedModel") -> "Welcome":
    return _client(model).welcome


def _lease_banner(client: "EnclaveClient") -> None:
    """For whom the enclave has a lease, until when, and what is left of it."""
    lease = client.welcome.lease
    if lease is None:
        return
    from semiopen.bundle.lease import words_of

    left = "no limit of tokens" if lease.tokens is None else f"{client.status().left:,} of {lease.tokens:,} tokens left"
    rate = "" if lease.rate is None else f", {lease.rate:,} a minute"
    err.print(f"Lease of {_plain(lease.customer)} to {words_of(lease.ends)}, {left}{rate}", soft_wrap=True)


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
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """As `_progress`, counting steps; a bar that is done goes, as plans have many."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err, transient=True
    ) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)
            if done >= total:
                bars.remove_task(tasks.pop(what))

        yield report


@contextlib.contextmanager
def _work() -> Iterator[Callable[[str, float, float], None]]:
    """One bar over many things, with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[float, Any] = {}

        def report(what: str, done: float, total: float) -> None:
            if total not in tasks:
                for task in tasks.values():
                    bars.remove_task(task)
                tasks.clear()
                tasks[total] = bars.add_task("", total=total)
            bars.update(tasks[total], completed=done, description=_plain(what))

        yield report


@contextlib.contextmanager
def _progress(*counts: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is done; `counts` say how far it is, by default in bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), *(counts or (DownloadColumn(),)))
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


if __name__ == "__main__":
    main()
