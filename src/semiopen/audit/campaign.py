"""A campaign: many attacks on one victim, at several budgets and seeds; one line on disk for each that is done."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from semiopen.audit.attacks import base_graft, ft_all, ft_closed, sem
from semiopen.audit.score import Exam, Score, score
from semiopen.audit.thief import Theft, start_model, upper_part
from semiopen.audit.training import Report, Settings
from semiopen.audit.victim import Informed, Remembering, Victim
from semiopen.errors import SemiopenError

AttackName = Literal["none", "sem", "ft_closed", "ft_all", "base_graft", "head"]
LabelName = Literal["none", "states", "soft", "hard"]
StartName = Literal["noise", "base"]

Progress = Callable[[str, int, int], None]  # which attack runs, its optimiser steps done, in all


class Job(BaseModel):
    """One attack to run. `queries` counts sequences; `control` marks a run that the attack must win.

    `head` is run as a control alone: all others learn a head that is not open besides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    attack: AttackName
    labels: LabelName
    start: StartName
    queries: int
    seed: int
    control: bool = False

    def __str__(self) -> str:
        words = [self.attack, *([self.labels] if self.labels not in ("none", "states") else [])]
        words += ["from the base"] if self.start == "base" else []
        words += ["(control)"] if self.control else []
        return f"{' '.join(words)}, {self.queries} queries, seed {self.seed}"


class Outcome(BaseModel):
    """What one attack ended with: the one result type of all attacks.

    Attributes:
        job: which.
        sealed: the sealed layers in words.
        tokens: that the sealed layers were asked.
        steps, rate, seconds: of its training.
        score: see `audit.score.Score`.
        skills: scores of skills by name, where the caller had some.
        answers: that a head which is not open was asked: tokens, rows of logits, words named.
        head: agreement of the head that was found, on the true states; None where the head is open, or none was found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    job: Job
    sealed: str
    tokens: int
    steps: int
    rate: float | None
    seconds: float
    score: dict[str, float]
    skills: dict[str, float] = {}
    answers: int = 0
    head: float | None = None


@dataclass(frozen=True)
class FoundHead:
    """What a thief has of a head that is not open.

    Attributes:
        tensors: under the whole model's names; none where nothing was given out.
        told: [N, T] the tokens that it gave for the queries, where they are all that he learns from.
        answers: that he asked for.
        steps: of training.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    told: torch.Tensor | None = None
    answers: int = 0
    steps: int = 0


class HeadAttack(Protocol):
    """How a head that is not open is attacked; see `audit.heads`."""

    def find(
        self,
        victim: Victim,
        queries: torch.Tensor,
        seed: int,
        base: Mapping[str, torch.Tensor] | None,
        report: Report | None,
    ) -> FoundHead:
        """What a thief has of it after these queries [N, T]."""
        ...

    def control(
        self, victim: Victim, queries: torch.Tensor, exam: Exam, seed: int, report: Report | None
    ) -> tuple[Score, int]:
        """How the same attack does on a head that must be found, and its optimiser steps."""
        ...


@dataclass(frozen=True)
class Campaign:
    """What all jobs share.

    Attributes:
        victim: what is attacked.
        queries: [N, T] token ids that a thief may ask, in this order; a smaller budget asks the first of them.
        exam: what the results are marked with; shares no document with `queries`.
        settings: optimiser steps and learning rates, the same for every budget.
        base: weights of a public relative, under the victim's names.
        skills: further marks of a thief's model, by name.
        control: plays the victim of jobs marked so; see `audit.victim.OpenPart`.
        head: how its head is attacked, where it is not open.
    """

    victim: Victim
    queries: torch.Tensor
    exam: Exam
    settings: Settings
    base: Mapping[str, torch.Tensor] | None = None
    skills: Callable[[PreTrainedModel], dict[str, float]] | None = None
    control: Victim | None = None
    control_exam: Exam | None = None
    head: HeadAttack | None = None

    def run(self, job: Job, report: Report | None = None) -> Outcome:
        """Run one attack from its start."""
        if job.attack == "head":
            return self._run_head_control(job, report)
        started = time.monotonic()
        victim, exam, queries = self.victim, self.exam, self.queries[: job.queries]
        if job.control:
            assert self.control is not None and self.control_exam is not None, "a control needs its victim"
            victim, exam = self.control, self.control_exam
        before = victim.spent.tokens
        found = FoundHead()
        if self.head is not None and not job.control and job.attack != "none":
            victim = Remembering(victim)
            base = self.base if job.start == "base" else None
            found = self.head.find(victim, queries, job.seed, base, _half(report, 0))
            report = _half(report, 1)
        theft = _attack(job, victim, queries, self.settings, self.base, report, found)
        fit = theft.fit
        return Outcome(
            job=job,
            sealed=str(victim.sealed),
            tokens=victim.spent.tokens - before,
            steps=(fit.steps if fit else 0) + found.steps,
            rate=fit.rate if fit else None,
            seconds=round(time.monotonic() - started, 2),
            score=score(theft.model, exam).to_dict(),
            skills=self.skills(theft.model) if self.skills and not job.control else {},
            answers=found.answers,
            head=self._mark_head(found) if found.tensors else None,
        )

    def _mark_head(self, found: FoundHead) -> float:
        """Agreement of whoever is given all that lies below the head."""
        upper = upper_part(Informed(self.victim, found.tensors))
        return score(upper.model, self.exam.below_the_head()).agreement

    def _run_head_control(self, job: Job, report: Report | None) -> Outcome:
        assert self.head is not None and job.control, "the head is attacked by itself as a control alone"
        started, before = time.monotonic(), self.victim.spent.tokens
        marks, steps = self.head.control(self.victim, self.queries[: job.queries], self.exam, job.seed, report)
        return Outcome(
            job=job,
            sealed="a head made for this",
            tokens=self.victim.spent.tokens - before,
            steps=steps,
            rate=None,
            seconds=round(time.monotonic() - started, 2),
            score=marks.to_dict(),
        )


def _half(report: Report | None, part: int) -> Report | None:
    """Reports of one of two trainings as those of a half."""
    return report and (lambda done, total: report(done + part * total, 2 * total))


def _attack(
    job: Job,
    victim: Victim,
    queries: torch.Tensor,
    settings: Settings,
    base: Mapping[str, torch.Tensor] | None,
    report: Report | None,
    found: FoundHead,
) -> Theft:
    start = base if job.start == "base" else None
    if job.start == "base" and base is None:
        raise SemiopenError("This attack starts from a public relative; give one.")
    if job.attack == "none":
        return Theft(start_model(victim, job.seed))
    informed = Informed(victim, found.tensors)
    if job.attack == "base_graft":
        return base_graft.run(informed, start or {})
    if job.attack == "sem":
        return sem.run(informed, queries, settings, job.seed, start, report)
    run = ft_closed.run if job.attack == "ft_closed" else ft_all.run
    labels = "hard" if job.labels == "hard" else "soft"
    if found.told is None:  # the head is open, or as good as open
        return run(informed, queries, settings, job.seed, start, report, labels)
    return run(victim, queries, settings, job.seed, start, report, labels, found.tensors, found.told)


def plan_jobs(
    attacks: list[AttackName],
    budgets: list[int],
    seeds: list[int],
    has_base: bool,
    control: bool = True,
    labels: tuple[LabelName, ...] = ("soft", "hard"),
    head: bool = False,
) -> list[Job]:
    """All jobs of a campaign, cheap ones first.

    Args:
        attacks: which; the zero budget ("none") always comes with them.
        budgets: in queries.
        seeds: of fresh weights and orders of queries.
        has_base: whether a public relative is at hand; each attack is then also started from it.
        control: whether each attack with training is also run against a victim that it must win.
        labels: what a thief has to train a whole model on; with none, the attacks that do are left out.
        head: whether the head is attacked too, and so wants a control.
    """
    jobs = [Job(attack="none", labels="none", start="noise", queries=0, seed=seed) for seed in seeds]
    if has_base:
        jobs.append(Job(attack="base_graft", labels="none", start="base", queries=0, seed=0))
    trained: list[AttackName] = [attack for attack in attacks if attack not in ("none", "base_graft")]
    trained = [attack for attack in trained if _labels(attack, labels)]
    if head and trained:
        jobs.append(Job(attack="head", labels="none", start="noise", queries=max(budgets), seed=0, control=True))
    if control:
        jobs += [
            Job(
                attack=attack,
                labels=_labels(attack, labels)[0],
                start="noise",
                queries=max(budgets),
                seed=0,
                control=True,
            )
            for attack in trained
        ]
    jobs += [
        Job(attack=attack, labels=kind, start=start, queries=budget, seed=seed)
        for attack in trained
        for budget in sorted(budgets)
        for seed in seeds
        for start in (("noise", "base") if has_base else ("noise",))
        for kind in _labels(attack, labels)
    ]
    return jobs


def _labels(attack: AttackName, given: tuple[LabelName, ...]) -> tuple[LabelName, ...]:
    return ("states",) if attack == "sem" else given


class Log:
    """Outcomes in a JSONL file: a campaign that was interrupted goes on where it stopped."""

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        """Open or make the file.

        Args:
            path: where.
            subject: what is attacked, with what; a file about something else is refused.

        Raises:
            SemiopenError: the file is about something else, or damaged.
        """
        self._path = path
        self.outcomes: list[Outcome] = []
        head = json.dumps({"subject": subject}, sort_keys=True)
        if not path.exists():
            path.write_text(head + "\n")
            return
        first, *lines = path.read_text().splitlines() or [""]
        if first != head:
            raise SemiopenError(
                f"{path} holds results of another bundle, other texts or other settings; give another --out, or "
                "delete that file."
            )
        for number, line in enumerate(lines, 2):
            try:
                self.outcomes.append(Outcome.model_validate_json(line))
            except ValidationError:
                if number != len(lines) + 1:  # the last line may have been cut off
                    raise SemiopenError(f"{path}, line {number}, is damaged; delete the file.") from None
        whole = path.with_suffix(".partial")  # without the line that was cut off
        whole.write_text("\n".join([head, *(outcome.model_dump_json() for outcome in self.outcomes), ""]))
        whole.replace(path)

    def add(self, outcome: Outcome) -> None:
        """Write one outcome, at once."""
        self.outcomes.append(outcome)
        with self._path.open("a") as file:
            file.write(outcome.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def left(self, jobs: list[Job]) -> list[Job]:
        """Those that are not done."""
        done = [outcome.job for outcome in self.outcomes]
        return [job for job in jobs if job not in done]


SectionT = TypeVar("SectionT", bound=BaseModel)


def kept_section(
    path: Path, subject: dict[str, Any], kind: type[SectionT], attack: Callable[[], SectionT]
) -> tuple[SectionT, bool]:
    """A part of an audit that runs as one: from its file, if that is about the same; else run, and written there.

    Returns:
        The part, and whether it was run now.
    """
    head = json.dumps({"subject": subject}, sort_keys=True)
    if path.exists():
        first, _, rest = path.read_text().partition("\n")
        if first == head:
            with contextlib.suppress(ValidationError):  # damaged: run again
                return kind.model_validate_json(rest), False
    section = attack()
    partial = path.with_suffix(".partial")
    partial.write_text(f"{head}\n{section.model_dump_json()}\n")
    partial.replace(path)
    return section, True


def run_all(campaign: Campaign, jobs: list[Job], log: Log, progress: Progress) -> Iterator[Outcome]:
    """Run what is left of the jobs, one by one; each outcome is in the log before it is given out."""
    for job in log.left(jobs):
        name = str(job)
        progress(name, 0, 1)
        outcome = campaign.run(job, lambda done, total, name=name: progress(name, done, total))
        log.add(outcome)
        yield outcome
