"""The audit of a bundle: attacks it through its enclave, and writes down what that shows.

Covered: the bundle's own plan, its own enclave, thieves who ask texts of their own and train. Not covered: see
`verdicts.untested`, which every report repeats.
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from semiopen.audit.bundle_victim import BundleVictim
from semiopen.audit.campaign import AttackName, Campaign, Job, Log, plan_jobs, run_all
from semiopen.audit.curves import curves_of
from semiopen.audit.kv.findings import CacheSection
from semiopen.audit.report import AuditReport, BundleFacts, Counted, Method, TextFacts, write_report
from semiopen.audit.score import Exam, score
from semiopen.audit.texts import SEQUENCE_TOKENS, read_apart, sample_texts
from semiopen.audit.thief import start_model
from semiopen.audit.training import Settings
from semiopen.audit.verdicts import UNREAD, Evidence, Verdict, untested, verdicts
from semiopen.audit.victim import OpenPart, Victim
from semiopen.audit.weights.layout import check as check_layout
from semiopen.bundle.files import check_is_bundle
from semiopen.bundle.manifest import Manifest
from semiopen.bundle.reader import read_files
from semiopen.errors import SemiopenError
from semiopen.host.load import load
from semiopen.host.modeling import session_of
from semiopen.model.families import FAMILIES
from semiopen.model.parts import rename
from semiopen.version import VERSION

Progress = Callable[[str, float, float], None]  # what runs, work done, work in all; a unit is one block's forward step

_SAMPLED_AT_ONCE = 64  # sequences
_LEAST_QUERIES = 4
_FOR_CACHE = 8192  # tokens of queries that the attacks on the cache make pairs of
_CONVERSATIONS, _CONVERSATION_TOKENS = 2, 64  # whose cache is attacked
_FINE_TUNED = 2  # largest budgets at which the attacks that train through all blocks are run
LOG_NAME, SAMPLES_NAME = "outcomes.jsonl", "sampled.safetensors"


@dataclass(frozen=True)
class AuditOptions:
    """What to run.

    Attributes:
        attacks: which; the zero budget always comes with them, the base graft where a base is given.
        tokens: budgets; None for `default_tokens`, which texts from a file may cut short.
        seeds: runs per budget.
        steps: optimiser steps of one run, without the trials of learning rates.
        rates: learning rates that are tried.
        exam: sequences to mark with.
        quick: whether this is a first look, which the report then says.
        seed: of the texts; seeds of the attacks count from 0.
        cache: whether the cache of conversations is attacked as well.
    """

    attacks: tuple[AttackName, ...] = ("sem", "ft_closed", "ft_all")
    tokens: tuple[int, ...] | None = None
    seeds: int = 2
    steps: int = 600
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    exam: int = 64
    quick: bool = False
    seed: int = 0
    cache: bool = False

    @classmethod
    def of(
        cls,
        attacks: Sequence[AttackName | Literal["kv"]] | None = None,
        tokens: Sequence[int] | None = None,
        seeds: int | None = None,
        steps: int | None = None,
        quick: bool = False,
    ) -> "AuditOptions":
        """Options with what is None left at the defaults, which `quick` makes smaller."""
        plain = cls(attacks=("sem",), seeds=1, steps=200, rates=(1e-3, 3e-3), exam=32, quick=True) if quick else cls()
        cache = "kv" in (attacks or ())
        chosen: list[AttackName] = [attack for attack in dict.fromkeys(attacks or ()) if attack != "kv"]
        if cache and not chosen:
            tokens = tokens or (_FOR_CACHE,)
        return cls(
            cache=cache,
            attacks=tuple(chosen) if attacks else plain.attacks,
            tokens=tuple(sorted(set(tokens))) if tokens else None,
            seeds=seeds or plain.seeds,
            steps=steps or plain.steps,
            rates=plain.rates,
            exam=plain.exam,
            quick=quick,
        )

    @property
    def budgets(self) -> list[int]:
        """In queries, growing."""
        given = self.tokens or ((2048, 8192, 32768) if self.quick else (2048, 8192, 32768, 131072))
        return sorted({-(-tokens // SEQUENCE_TOKENS) for tokens in given})


@dataclass(frozen=True)
class _Texts:
    """Token ids [N, T] to ask and to mark with, and where they are from."""

    queries: torch.Tensor
    exam: torch.Tensor
    facts: TextFacts
    key: str


class _Metered(BundleVictim):
    """A bundle as victim that remembers all it was asked, by thieves and auditor alike."""

    asked = 0

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        self.asked += ids.numel()
        return super().query(ids)


def audit(
    bundle: Path,
    out: Path,
    options: AuditOptions,
    keys: Path | None = None,
    enclave: Path | None = None,
    dtype: str | None = None,
    threads: int = 0,
    texts: Path | None = None,
    public_base: str | None = None,
    lease: Path | None = None,
    command: tuple[str, ...] = (),
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> AuditReport:
    """Attack a bundle and write `report.html`, `report.json` and `outcomes.jsonl` into a folder.

    A folder that an interrupted audit left behind is gone on with.

    Args:
        bundle: folder of the bundle.
        out: folder to write to.
        options: see there.
        keys: key folder, which starts a dev enclave; or
        enclave: socket of a running one.
        dtype: of the computation; float32 when None and `keys` are given, else the bundle's own.
        threads: CPU threads; 0 for torch's choice.
        texts: file of texts; the model's own when None.
        public_base: folder or hub id of a public relative.
        lease: file of a lease, where the enclave is started here and the bundle needs one.
        command: words of the command line that did this, without attacks and `--out`, for the report to repeat.
        progress: called as work goes on.
        say: called with sentences for a person.

    Raises:
        BundleError, EnclaveError, KeyFolderError: see `semiopen.load`.
        SemiopenError: texts, base or folder are not usable.
    """
    check_is_bundle(bundle)
    _check(options)
    _make_folder(out)
    started = time.monotonic()
    model = load(
        bundle,
        keys=keys,
        enclave=None if keys else enclave,
        dtype=dtype or ("float32" if keys else None),
        threads=threads,
        lease=lease,
    )
    try:
        client = session_of(model).client
        counted = client.status().tokens
        welcome = client.welcome
        say(welcome.enclave)
        if welcome.context < SEQUENCE_TOKENS:
            raise SemiopenError(
                f"The model's context is {welcome.context} tokens; the audit asks in sequences of {SEQUENCE_TOKENS}."
            )
        manifest = read_files(bundle, welcome.bundle_digest, only=()).manifest
        if manifest.plan.head != "open":
            raise SemiopenError(
                "The audit attacks bundles with an open head only; what is known of other heads is in "
                "docs/results/locked_weights.md."
            )
        victim = _Metered(model, bundle, manifest)
        if options.cache:
            check_layout(victim.config)
        found = _texts(model, bundle, out, welcome.bundle_digest, options, texts, progress, say)
        sampled = client.status().tokens - counted if texts is None else 0
        relative = _relative(public_base) if public_base is not None else None
        base = _base(_in_basis(relative, victim, manifest), victim) if relative is not None else None
        campaign, control_start, open_end = _campaign(victim, found, options, base)
        subject = {
            "bundle": welcome.bundle_digest,
            "dtype": welcome.dtype,
            "texts": found.key,
            "exam": len(found.exam),
            "steps": options.steps,
            "rates": list(options.rates),
            "base": _digest(base) if base is not None else None,
        }
        log = Log(out / LOG_NAME, subject)
        jobs = jobs_of(options, len(found.queries), base is not None, campaign.control is not None)
        earlier = sum(outcome.tokens for outcome in log.outcomes)
        _run(campaign, jobs, log, manifest, options, progress, say)
        asked = sum(outcome.tokens for outcome in log.outcomes) - earlier
        cache = _attack_cache(victim, bundle, found, relative, manifest, say) if options.cache else None
        asked += cache.asked if cache is not None else 0
        evidence = Evidence(
            prefix=manifest.plan.prefix,
            num_layers=manifest.num_layers,
            open_embedding=manifest.open_embedding,
            chance=_chance(campaign.exam),
            open_end=open_end,
            control_start=control_start,
            outcomes=log.outcomes,
            command=command,
        )
        report = AuditReport(
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            bundle=BundleFacts(
                name=bundle.absolute().name,
                digest=welcome.bundle_digest,
                bundle_id=manifest.bundle_id,
                architecture=manifest.architecture,
                plan=manifest.plan,
                num_layers=manifest.num_layers,
                sealed_bytes=manifest.sealed_bytes,
                open_bytes=manifest.open_bytes,
                open_embedding=manifest.open_embedding,
                enclave=welcome.enclave,
                dtype=welcome.dtype,
            ),
            verdicts=(*verdicts(evidence), *_cache_verdict(cache, evidence)),
            curves=tuple(curves_of(log.outcomes)),
            outcomes=tuple(log.outcomes),
            chance=evidence.chance,
            open_end=open_end,
            control_start=control_start,
            untested=tuple(line for line in untested(evidence) if cache is None or line != UNREAD),
            cache=cache,
            texts=found.facts,
            method=Method(
                steps=options.steps,
                rates=options.rates,
                batch=campaign.settings.batch,
                exam_sequences=len(found.exam),
                public_base=public_base,
                quick=options.quick,
            ),
            counted=Counted(
                attacks=asked,
                auditor=victim.asked - asked,
                sampling=sampled,
                enclave=client.status().tokens - counted,
                earlier=earlier,
            ),
            command=evidence.repeat(*options.attacks, *(("kv",) if options.cache else ())),
            seconds=round(time.monotonic() - started, 1),
            versions=_versions(),
        )
    finally:
        model.enclave.close()  # type: ignore[operator]
    write_report(report, out)
    return report


def jobs_of(options: AuditOptions, queries: int, has_base: bool, has_control: bool) -> list[Job]:
    """What an audit runs; the attacks that train through all blocks only at the largest budgets.

    Args:
        options: see there.
        queries: that are at hand; default budgets above are cut.
        has_base, has_control: see `plan_jobs`.
    """
    budgets = [budget for budget in options.budgets if budget <= queries]
    seeds = list(range(options.seeds))
    jobs = []
    for attack in ("none", *options.attacks):
        largest = budgets if attack in ("none", "sem") else budgets[-_FINE_TUNED:]
        jobs += plan_jobs([attack], largest, seeds, has_base, has_control)
    return list(dict.fromkeys(jobs))


def _check(options: AuditOptions) -> None:
    if options.budgets[0] < _LEAST_QUERIES:
        raise SemiopenError(
            f"A budget of fewer than {_LEAST_QUERIES * SEQUENCE_TOKENS} tokens trains nothing; give larger --tokens. "
            "The zero budget is always part of the audit."
        )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SemiopenError(f"{out} cannot be made ({error.strerror}); give another --out.") from None
    if any(out.iterdir()) and not any((out / name).exists() for name in (LOG_NAME, SAMPLES_NAME)):
        raise SemiopenError(f"{out} has other files in it; give a new folder, or one of an earlier audit, as --out.")


def _run(
    campaign: Campaign,
    jobs: list[Job],
    log: Log,
    manifest: Manifest,
    options: AuditOptions,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Run what is left, telling how much of the work is done."""
    left = log.left(jobs)
    steps = options.steps + len(options.rates) * max(20, options.steps // 10)  # rates are tried first
    work = {job: steps * _weight(job, manifest) for job in left}
    total, done = sum(work.values()), 0.0
    trained = sum(1 for job in left if job.queries)
    say(
        f"{len(left)} attacks to run, {trained * steps:,} optimiser steps"
        + (f"; {len(jobs) - len(left)} are done already." if len(jobs) > len(left) else ".")
    )
    numbers = {str(job): number for number, job in enumerate(left, 1)}
    running = iter(left)
    current: Job | None = None

    def report(name: str, steps_done: int, steps_total: int) -> None:
        nonlocal current, done
        if current is None or str(current) != name:
            done += work[current] if current else 0.0
            current = next(running)
        progress(f"{numbers[name]}/{len(left)} {name}", done + work[current] * steps_done / steps_total, total)

    for _ in run_all(campaign, left, log, report):
        pass


def _weight(job: Job, manifest: Manifest) -> float:
    """Work of one optimiser step, in forward passes of one block; a backward pass is two of them."""
    if not job.queries:
        return 0.01
    sealed, total = max(1, manifest.plan.prefix), manifest.num_layers
    if job.attack == "sem":
        return 3.0 if job.control else 3.0 * sealed
    return 4.0 * (total - sealed) if job.control else 4.0 * total - sealed


def _texts(
    model: PreTrainedModel,
    bundle: Path,
    out: Path,
    digest: str,
    options: AuditOptions,
    texts: Path | None,
    progress: Progress,
    say: Callable[[str], None],
) -> _Texts:
    wanted = max(options.budgets)
    if texts is None:
        exam, queries = _sampled(model, out, digest, options, wanted, progress)
        facts = TextFacts(source="sampled", name=None, queries=len(queries), exam=len(exam))
        return _Texts(queries, exam, facts, f"sampled, seed {options.seed}")
    queries, exam = read_apart(texts, bundle, wanted, options.exam, options.seed)
    if len(queries) < wanted:
        has = f"{texts} has texts for {len(queries) * SEQUENCE_TOKENS:,} tokens of queries"
        if options.tokens is not None or len(queries) < options.budgets[0]:
            raise SemiopenError(f"{has}; give smaller --tokens, or more texts.")
        say(f"{has}; larger budgets are left out.")
    facts = TextFacts(source="file", name=texts.name, queries=len(queries), exam=len(exam))
    return _Texts(queries, exam, facts, f"sha256 {hashlib.sha256(texts.read_bytes()).hexdigest()}, seed {options.seed}")


def _sampled(
    model: PreTrainedModel, out: Path, digest: str, options: AuditOptions, wanted: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences to mark with, then to ask. Kept in the folder, as a larger budget later needs the same and more."""
    path, about = out / SAMPLES_NAME, {"bundle": digest, "seed": str(options.seed)}
    for_exam = -(-options.exam // _SAMPLED_AT_ONCE)
    parts = for_exam + -(-wanted // _SAMPLED_AT_ONCE)
    ids = _read_samples(path, about)
    done = len(ids) // _SAMPLED_AT_ONCE
    for part in range(done, parts):
        progress("sampling texts", part, parts)
        new = sample_texts(model, _SAMPLED_AT_ONCE, options.seed * 1_000_003 + part)
        ids = torch.cat([ids, new])
        beside = path.with_suffix(".part")
        save_file({"ids": ids}, beside, about)
        beside.replace(path)
    start = for_exam * _SAMPLED_AT_ONCE
    return ids[: options.exam], ids[start : start + wanted]


def _read_samples(path: Path, about: dict[str, str]) -> torch.Tensor:
    if not path.exists():
        return torch.empty(0, SEQUENCE_TOKENS, dtype=torch.int64)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, ids = file.metadata(), file.get_tensor("ids")
    except SafetensorError:
        raise SemiopenError(f"{path} is damaged; delete the file.") from None
    if metadata != about:
        raise SemiopenError(f"{path} holds texts of another bundle or seed; give another --out, or delete that file.")
    return ids


def _attack_cache(
    victim: BundleVictim,
    bundle: Path,
    texts: _Texts,
    relative: Mapping[str, torch.Tensor] | None,
    manifest: Manifest,
    say: Callable[[str], None],
) -> CacheSection:
    try:
        from semiopen.audit.kv.section import attack_cache
    except ModuleNotFoundError as error:
        raise SemiopenError(
            f"The attacks on the cache need {error.name}; install the extra: pip install 'semiopen[audit]'"
        ) from None
    say("Attacking the cache of conversations.")
    conversations = texts.exam[:_CONVERSATIONS, :_CONVERSATION_TOKENS]
    pairs = texts.queries[: _FOR_CACHE // SEQUENCE_TOKENS, :_CONVERSATION_TOKENS]
    return attack_cache(victim, conversations, pairs, relative, manifest.plan, _decoder(bundle))


def _cache_verdict(cache: CacheSection | None, evidence: Evidence) -> list[Verdict]:
    if cache is None:
        return []
    from semiopen.audit.kv.section import cache_verdict

    return [cache_verdict(cache, evidence.repeat("kv"))]


def _decoder(bundle: Path) -> Callable[[list[int]], str]:
    """Ids to text; to themselves where the bundle has no tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(bundle).decode
    except Exception:  # whatever a folder without a usable tokenizer makes transformers raise
        return lambda ids: " ".join(map(str, ids))


def _campaign(
    victim: BundleVictim, texts: _Texts, options: AuditOptions, base: Mapping[str, torch.Tensor] | None
) -> tuple[Campaign, float | None, float | None]:
    """What all jobs share, and agreement on the control of fresh weights and of the true ones."""
    control = OpenPart(victim) if victim.sealed.stop < victim.config.num_hidden_layers else None
    control_exam = Exam.of(control, texts.exam) if control is not None else None
    control_start = open_end = None
    if control is not None and control_exam is not None:
        control_start = score(start_model(control, 0), control_exam).agreement
        open_end = score(start_model(control, 0, _open_weights(victim)), control_exam).agreement
    campaign = Campaign(
        victim=victim,
        queries=texts.queries,
        exam=Exam.of(victim, texts.exam),
        settings=Settings(steps=options.steps, rates=options.rates),
        base=base,
        control=control,
        control_exam=control_exam,
    )
    return campaign, control_start, open_end


def _open_weights(victim: Victim) -> dict[str, torch.Tensor]:
    """All weights of the model that `OpenPart` makes of a victim, under their names there."""
    family, start = FAMILIES[victim.config.model_type], victim.sealed.stop
    lead = next(name.split(f".{family.layers}.")[0] for name in victim.open_tensors if f".{family.layers}." in name)
    return {rename(name, f"{lead}.{family.layers}", -start): tensor for name, tensor in victim.open_tensors.items()}


@torch.inference_mode()
def _chance(exam: Exam) -> float:
    """Agreement of whoever always guesses the commonest of the model's likeliest tokens."""
    likeliest = torch.cat([exam.upper(states).argmax(-1).flatten() for states in exam.states.split(16)])
    return float(likeliest.bincount().max()) / len(likeliest)


def _relative(public_base: str) -> dict[str, torch.Tensor]:
    """All weights of a public relative, fp32."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(public_base, dtype=torch.float32))
    except (OSError, ValueError) as error:
        raise SemiopenError(
            f"The public base {public_base} cannot be loaded ({type(error).__name__}); give a model folder or a hub id."
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.state_dict()


def _in_basis(relative: Mapping[str, torch.Tensor], victim: Victim, manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """A relative in the basis of the bundle. Unless a keyed one is found out first, it would look like a stranger."""
    if manifest.plan.fold != "keyed":
        return relative
    from semiopen.audit.weights import align  # needs SciPy, of the extra "audit"

    return {**relative, **{name: tensor.float() for name, tensor in align.run(victim, relative).tensors.items()}}


def _base(relative: Mapping[str, torch.Tensor], victim: Victim) -> dict[str, torch.Tensor]:
    """Those weights of it that stand where the victim's are sealed."""
    weights = {name: tensor for name, tensor in relative.items() if name not in victim.open_tensors}
    start_model(victim, 0, weights)  # refuses other shapes, before any work
    return weights


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hex."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode())
        whole.update(weights[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def _versions() -> dict[str, str]:
    return {
        "semiopen": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
    }
