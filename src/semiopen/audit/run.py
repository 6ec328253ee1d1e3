"""The audit of a bundle: attacks it through its enclave, and writes down what that shows.

Covered: the bundle's own plan, its own enclave, thieves who ask texts of their own and train. Not covered: see
`verdicts.untested`, which every report repeats.
"""

import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from semiopen.audit.bundle_victim import BundleVictim, attention_in_order
from semiopen.audit.campaign import (
    AttackName,
    Campaign,
    HeadAttack,
    Job,
    LabelName,
    Log,
    kept_section,
    plan_jobs,
    run_all,
)
from semiopen.audit.curves import curves_of
from semiopen.audit.kv.findings import CacheSection
from semiopen.audit.opening import Parties, open_parties
from semiopen.audit.report import AuditReport, BundleFacts, Counted, Method, TextFacts, write_report
from semiopen.audit.score import Exam, score
from semiopen.audit.texts import SEQUENCE_TOKENS, read_apart, sample_texts
from semiopen.audit.thief import start_model, upper_part
from semiopen.audit.training import Settings
from semiopen.audit.verdicts import UNREAD, Evidence, Verdict, untested, verdicts
from semiopen.audit.victim import Informed, OpenPart, Victim
from semiopen.audit.weights.layout import check as check_layout
from semiopen.audit.weights.outcomes import WeightSection
from semiopen.bundle.files import check_is_bundle
from semiopen.bundle.lease import Rights
from semiopen.bundle.manifest import Manifest
from semiopen.bundle.reader import read_files
from semiopen.errors import SemiopenError
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
CACHE_NAME, WEIGHTS_NAME = "kv.json", "weights.json"


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
        weights: whether the bundle's files are attacked by themselves as well.
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
    weights: bool = False

    @classmethod
    def of(
        cls,
        attacks: Sequence[AttackName | Literal["kv", "weights"]] | None = None,
        tokens: Sequence[int] | None = None,
        seeds: int | None = None,
        steps: int | None = None,
        quick: bool = False,
    ) -> "AuditOptions":
        """Options with what is None left at the defaults, which `quick` makes smaller."""
        plain = cls(attacks=("sem",), seeds=1, steps=200, rates=(1e-3, 3e-3), exam=32, quick=True) if quick else cls()
        cache, weights = ("kv" in (attacks or ()), "weights" in (attacks or ()))
        chosen: list[AttackName] = [a for a in dict.fromkeys(attacks or ()) if a not in ("kv", "weights")]
        if (cache or weights) and not chosen:
            tokens = tokens or (_FOR_CACHE,)
        return cls(
            cache=cache,
            weights=weights,
            attacks=tuple(chosen) if attacks else plain.attacks,
            tokens=tuple(sorted(set(tokens))) if tokens else None,
            seeds=seeds or plain.seeds,
            steps=steps or plain.steps,
            rates=plain.rates,
            exam=plain.exam,
            quick=quick,
        )

    @property
    def named(self) -> tuple[AttackName | Literal["kv", "weights"], ...]:
        """All that is run, as the command names it."""
        return (*self.attacks, *(("kv",) if self.cache else ()), *(("weights",) if self.weights else ()))

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

    @property
    def pairs(self) -> torch.Tensor:
        """[N, T] of them that the attacks on the cache learn from."""
        return self.queries[: _FOR_CACHE // SEQUENCE_TOKENS, :_CONVERSATION_TOKENS]


class _Metered(BundleVictim):
    """A bundle as victim that remembers all it was asked, by thieves and auditor alike."""

    asked = 0

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        self.asked += ids.numel()
        return super().query(ids)

    def next_states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """See `Growable.next_states`."""
        before = self.spent.tokens
        states = super().next_states(known, candidates)
        self.asked += self.spent.tokens - before
        return states


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
        lease: file of a lease, where the enclave is started here and the bundle needs one; see `open_parties`.
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
    parties = open_parties(bundle, keys, None if keys else enclave, dtype, threads, lease)
    try:
        clients = parties.clients
        welcome = clients[0].welcome
        counted, used = sum(client.status().tokens for client in clients), clients[0].status().used
        say(welcome.enclave)
        if welcome.context < SEQUENCE_TOKENS:
            raise SemiopenError(
                f"The model's context is {welcome.context} tokens; the audit asks in sequences of {SEQUENCE_TOKENS}."
            )
        manifest = read_files(bundle, welcome.bundle_digest, only=()).manifest
        metered = _Metered(parties.thief, bundle, manifest)
        if options.cache or options.weights:
            check_layout(metered.config)
        ordered = attention_in_order(metered, clients[0])
        victim = Informed(metered, ordered) if ordered else metered
        if parties.rights is not None:
            say(f"The thief's rights to the {manifest.plan.head} head: {rights_in_words(parties.rights)}.")
        before = sum(client.status().tokens for client in clients)
        found = _texts(parties.auditor, bundle, out, welcome.bundle_digest, options, texts, progress, say)
        sampled = sum(client.status().tokens for client in clients) - before
        relative = _relative(public_base) if public_base is not None else None
        turned, rotation = _in_basis(relative, victim, manifest) if relative is not None else (None, None)
        base = _base(turned, victim) if turned is not None else None
        heads = _heads(parties, victim, found, options, manifest, relative, rotation)
        campaign, control_start, open_end = _campaign(victim, found, options, base, heads)
        subject: dict[str, Any] = {
            "bundle": welcome.bundle_digest,
            "dtype": welcome.dtype,
            "texts": found.key,
            "exam": len(found.exam),
            "steps": options.steps,
            "rates": list(options.rates),
            "base": _digest(base) if base is not None else None,
        }
        if parties.rights is not None:
            subject["rights"] = parties.rights.model_dump()
        log = Log(out / LOG_NAME, subject)
        labels = _labels(manifest, parties.rights)
        jobs = jobs_of(
            options, len(found.queries), base is not None, campaign.control is not None, labels, heads is not None
        )
        if (left_out := _left_out(labels, options)) is not None:
            say(left_out)
        done = len(log.outcomes)
        _run(campaign, jobs, log, manifest, options, progress, say)
        new = log.outcomes[done:]
        asked, answers = sum(outcome.tokens for outcome in new), sum(outcome.answers for outcome in new)
        earlier = sum(outcome.tokens for outcome in log.outcomes[:done])
        cache = weights = None
        if options.cache:
            attack = functools.partial(_attack_cache, metered, bundle, found, relative, manifest, say)
            about = {**subject, "pairs": len(found.pairs)}
            cache, is_new = kept_section(out / CACHE_NAME, about, CacheSection, attack)
            asked, earlier = (asked + cache.asked, earlier) if is_new else (asked, earlier + cache.asked)
        if options.weights:
            attack = functools.partial(_attack_weights, victim, campaign, manifest, relative, say)
            weights, is_new = kept_section(out / WEIGHTS_NAME, subject, WeightSection, attack)
            asked, earlier = (asked + weights.asked, earlier) if is_new else (asked, earlier + weights.asked)
            answers += weights.answers if is_new else 0
        evidence = Evidence(
            prefix=manifest.plan.prefix,
            num_layers=manifest.num_layers,
            open_embedding=manifest.open_embedding,
            chance=_chance(campaign.exam),
            open_end=open_end,
            control_start=control_start,
            outcomes=log.outcomes,
            command=command,
            head=manifest.plan.head,
            rights=parties.rights,
            attention_ordered=bool(ordered),
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
            verdicts=(
                *verdicts(evidence),
                *_weights_verdict(weights, evidence),
                *_cache_verdict(cache, evidence),
            ),
            curves=tuple(curves_of(log.outcomes)),
            outcomes=tuple(log.outcomes),
            chance=evidence.chance,
            open_end=open_end,
            control_start=control_start,
            untested=tuple(line for line in untested(evidence) if cache is None or line != UNREAD),
            cache=cache,
            weights=weights,
            texts=found.facts,
            method=Method(
                steps=options.steps,
                rates=options.rates,
                batch=campaign.settings.batch,
                exam_sequences=len(found.exam),
                public_base=public_base,
                quick=options.quick,
                rights=None if parties.rights is None else rights_in_words(parties.rights),
                lease=None if parties.rights is None else _lease_in_words(keys, lease),
                left_out=left_out,
            ),
            counted=Counted(
                attacks=asked,
                auditor=metered.asked - asked,
                sampling=sampled,
                enclave=sum(client.status().tokens for client in clients) - counted,
                earlier=earlier,
                answers=answers,
                used=clients[0].status().used - used if parties.rights is not None else None,
            ),
            command=evidence.repeat(*options.named),
            seconds=round(time.monotonic() - started, 1),
            versions=_versions(),
        )
    finally:
        parties.close()
    write_report(report, out)
    return report


def jobs_of(
    options: AuditOptions,
    queries: int,
    has_base: bool,
    has_control: bool,
    labels: tuple[LabelName, ...] = ("soft", "hard"),
    head: bool = False,
) -> list[Job]:
    """What an audit runs; the attacks that train through all blocks only at the largest budgets.

    Args:
        options: see there.
        queries: that are at hand; default budgets above are cut.
        has_base, has_control, labels, head: see `plan_jobs`.
    """
    budgets = [budget for budget in options.budgets if budget <= queries]
    seeds = list(range(options.seeds))
    jobs = []
    for attack in ("none", *options.attacks):
        largest = budgets if attack in ("none", "sem") else budgets[-_FINE_TUNED:]
        jobs += plan_jobs([attack], largest, seeds, has_base, has_control, labels, head)
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
    steps = campaign.settings.total
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
    if job.attack == "head":
        return 1.0
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
    return attack_cache(victim, conversations, texts.pairs, relative, manifest.plan, _decoder(bundle))


def _attack_weights(
    victim: Victim,
    campaign: Campaign,
    manifest: Manifest,
    relative: Mapping[str, torch.Tensor] | None,
    say: Callable[[str], None],
) -> WeightSection:
    _need_audit_extra()
    from semiopen.audit.weights.section import attack_weights

    say("Attacking the bundle's files.")
    return attack_weights(victim, campaign.exam, manifest.plan, relative, campaign.head)


def _weights_verdict(weights: WeightSection | None, evidence: Evidence) -> list[Verdict]:
    if weights is None:
        return []
    from semiopen.audit.weights.section import weights_verdict

    return [weights_verdict(weights, evidence.repeat("weights"))]


def _need_audit_extra() -> None:
    try:
        import scipy.optimize  # noqa: F401 - what the attacks on weights need
    except ModuleNotFoundError as error:
        raise SemiopenError(
            f"The attacks on weights and heads need {error.name}; install the extra: pip install 'semiopen[audit]'"
        ) from None


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


@dataclass(frozen=True)
class _Heads:
    """A head that is not open.

    Attributes:
        attack: of the thief.
        upper: what makes the model's own logits of the sealed layers' states, for the auditor.
        true: the head's tensors, as the auditor knows them, for controls.
    """

    attack: HeadAttack
    upper: Callable[[torch.Tensor], torch.Tensor]
    true: Mapping[str, torch.Tensor]


def _heads(
    parties: Parties,
    victim: Victim,
    texts: _Texts,
    options: AuditOptions,
    manifest: Manifest,
    relative: Mapping[str, torch.Tensor] | None,
    rotation: torch.Tensor | None,
) -> _Heads | None:
    """What thief and auditor have of a head that is not open; None where it is."""
    kind = manifest.plan.head
    if kind == "open":
        return None
    _need_audit_extra()
    from semiopen.audit import heads

    heads.check_readable(victim.config)
    for_thief, for_auditor = (heads.EnclaveHead(client) for client in (parties.clients[0], parties.clients[-1]))
    true = heads.true_head(victim, kind, for_auditor, torch.cat([texts.exam, texts.queries])).tensors
    ordered = None
    if kind == "shuffled" and relative is not None:
        ordered = heads.by_rows(victim, relative, rotation)
    # Under a keyed fold a tied head is a matrix of its own.
    tied = manifest.open_embedding and manifest.plan.fold != "keyed"
    attack = heads.HeadSearch(kind, for_thief, options.steps, ordered, tied)
    upper = heads.TrueUpper(victim, for_auditor) if kind == "sealed" else upper_part(Informed(victim, true))
    return _Heads(attack, upper, true)


def _labels(manifest: Manifest, rights: Rights | None) -> tuple[LabelName, ...]:
    """What a thief can train a whole model on."""
    if manifest.plan.head != "sealed" or rights is None or rights.all_logits:
        return ("soft", "hard")
    return ("hard",) if rights.generate or rights.top_k else ()


def _left_out(labels: tuple[LabelName, ...], options: AuditOptions) -> str | None:
    """Which kinds of training a head that gives less than all logits leaves no room for, and why."""
    whole = [attack for attack in options.attacks if attack in ("ft_closed", "ft_all")]
    if not whole or "soft" in labels:
        return None
    if labels:
        return "Soft labels are left out: they are all probabilities, and the lease gives no logits of all words."
    return "FT-closed and FT-all are left out: the lease gives neither tokens nor logits to train a whole model on."


def rights_in_words(rights: Rights) -> str:
    """What a head that is not open gives."""
    tokens = "tokens" if rights.generate else "no tokens"
    if rights.all_logits:
        return f"{tokens} and all logits"
    if rights.top_k:
        return f"{tokens} and log-probabilities of the {rights.top_k} likeliest"
    return f"{tokens}, no logits"


def _lease_in_words(keys: Path | None, lease: Path | None) -> str:
    if keys is None:
        return "as the running enclave's lease allows"
    return "as a lease allows by default" if lease is None else f"as {lease.name} allows"


def _campaign(
    victim: Victim,
    texts: _Texts,
    options: AuditOptions,
    base: Mapping[str, torch.Tensor] | None,
    heads: _Heads | None,
) -> tuple[Campaign, float | None, float | None]:
    """What all jobs share, and agreement on the control of fresh weights and of the true ones."""
    known = victim if heads is None else Informed(victim, heads.true)
    control = OpenPart(known) if victim.sealed.stop < victim.config.num_hidden_layers else None
    control_exam = Exam.of(control, texts.exam) if control is not None else None
    control_start = open_end = None
    exam = Exam.of(victim, texts.exam, None if heads is None else heads.upper)
    if control is not None and control_exam is not None:
        control_start = score(start_model(control, 0), control_exam).agreement
        open_end = score(start_model(control, 0, _open_weights(known)), control_exam).agreement
    if heads is not None:  # the auditor's head must be the one that the enclave has
        same = score(upper_part(known).model, exam.below_the_head()).agreement
        open_end = same if open_end is None else min(open_end, same)
    campaign = Campaign(
        victim=victim,
        queries=texts.queries,
        exam=exam,
        settings=Settings(steps=options.steps, rates=options.rates),
        base=base,
        control=control,
        control_exam=control_exam,
        head=None if heads is None else heads.attack,
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


def _in_basis(
    relative: Mapping[str, torch.Tensor], victim: Victim, manifest: Manifest
) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None]:
    """A relative in the basis of the bundle, and that basis; None where it is the plain one.

    Unless a keyed one is found out first, the relative would look like a stranger.
    """
    if manifest.plan.fold != "keyed":
        return relative, None
    _need_audit_extra()
    from semiopen.audit.weights import align

    found = align.run(victim, relative)
    assert found.key is not None, "that is what it finds"
    return {**relative, **{name: tensor.float() for name, tensor in found.tensors.items()}}, found.key.rotation


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
