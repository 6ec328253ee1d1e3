"""A campaign: which jobs it has, that budgets are counted exactly, and that an interruption changes nothing."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from semiopen.audit.campaign import Campaign, Job, Log, Outcome, kept_section, plan_jobs, run_all
from semiopen.audit.kv.findings import CacheOutcome, CacheSection
from semiopen.audit.run import AuditOptions, jobs_of
from semiopen.audit.score import Exam
from semiopen.audit.training import Settings
from semiopen.audit.victim import OpenPart, PlainVictim, SealedSet
from semiopen.errors import SemiopenError
from tests.models import FAMILIES

SUBJECT = {"bundle": "abc", "steps": 3}
SEM = Job(attack="sem", labels="states", start="noise", queries=4, seed=0)


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def campaign():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).eval()
    ids = torch.randint(3, 190, (12, 16))
    victim = PlainVictim(model, SealedSet.prefix(1))
    control = OpenPart(victim)
    return Campaign(
        victim=victim,
        queries=ids[:8],
        exam=Exam.of(victim, ids[8:]),
        settings=Settings(steps=3, batch=4, rates=(1e-3,)),
        base=model.state_dict(),
        control=control,
        control_exam=Exam.of(control, ids[8:]),
    )


@pytest.fixture(scope="module")
def jobs():
    return plan_jobs(["sem", "ft_closed"], [4], [0], has_base=True)


def without_time(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome.model_copy(update={"seconds": 0.0}) for outcome in outcomes]


def test_the_jobs():
    jobs = plan_jobs(["sem", "ft_closed"], [4, 8], [0], has_base=True)
    assert len(set(jobs)) == len(jobs)
    assert [str(job) for job in jobs[:4]] == [
        "none, 0 queries, seed 0",
        "base_graft from the base, 0 queries, seed 0",
        "sem (control), 8 queries, seed 0",
        "ft_closed soft (control), 8 queries, seed 0",
    ]
    assert len(jobs) == 4 + 2 * 2 + 2 * 2 * 2
    assert not any(job.start == "base" for job in plan_jobs(["sem"], [4], [0], has_base=False))
    assert not any(job.control for job in plan_jobs(["sem"], [4], [0], has_base=False, control=False))


def test_attacks_through_all_blocks_run_at_the_largest_budgets():
    options = AuditOptions(tokens=(512, 1024, 2048, 4096), seeds=2)
    jobs = jobs_of(options, 32, has_base=False, has_control=True)
    budgets = {
        attack: sorted({job.queries for job in jobs if job.attack == attack and not job.control})
        for attack in ("none", "sem", "ft_closed", "ft_all")
    }
    assert budgets == {"none": [0], "sem": [4, 8, 16, 32], "ft_closed": [16, 32], "ft_all": [16, 32]}
    assert len(set(jobs)) == len(jobs)
    assert {job.queries for job in jobs if job.control} == {32}
    fewer = jobs_of(options, 20, has_base=False, has_control=False)
    assert max(job.queries for job in fewer) == 16
    assert not any(job.control for job in fewer)


def test_budgets_are_whole_queries():
    assert AuditOptions.of(tokens=[2048, 2049, 2048]).budgets == [16, 17]


def test_every_outcome_counts_what_was_asked(campaign, jobs):
    for job in jobs:
        outcome = campaign.run(job)
        assert outcome.tokens == job.queries * 16, str(job)
        assert outcome.steps == (3 if job.queries else 0)
        if job.attack == "base_graft":
            assert outcome.score["agreement"] == 1.0


def test_a_smaller_budget_asks_the_first_queries(campaign, monkeypatch):
    asked, inner = [], campaign.victim.query
    monkeypatch.setattr(campaign.victim, "query", lambda ids: asked.append(ids) or inner(ids))
    campaign.run(SEM)
    assert torch.equal(torch.cat(asked), campaign.queries[:4])


def test_a_resumed_campaign_equals_an_uninterrupted_one(campaign, jobs, tmp_path):
    whole = Log(tmp_path / "whole.jsonl", SUBJECT)
    list(run_all(campaign, jobs, whole, silent))

    path = tmp_path / "cut.jsonl"
    running = run_all(campaign, jobs, Log(path, SUBJECT), silent)
    for _ in range(5):
        next(running)
    running.close()
    path.write_text(path.read_text() + whole.outcomes[5].model_dump_json()[:70])  # a line that was being written

    ran = []
    again = Log(path, SUBJECT)
    assert len(again.outcomes) == 5
    list(run_all(campaign, jobs, again, lambda what, done, total: ran.append(what)))
    assert without_time(again.outcomes) == without_time(whole.outcomes)
    assert not {str(job) for job in jobs[:5]} & set(ran)
    assert without_time(Log(path, SUBJECT).outcomes) == without_time(whole.outcomes)
    assert again.left(jobs) == []
    assert list(run_all(campaign, jobs, again, lambda *_: pytest.fail("nothing is left to run"))) == []


def test_a_section_is_run_once_for_the_same_subject(tmp_path):
    path, made = tmp_path / "kv.json", []

    def attack() -> CacheSection:
        outcome = CacheOutcome(adversary="snoop", attack="collision", exact=len(made) / 8, among=0.5, rouge_l=0.25)
        made.append(CacheSection(conversations=1, tokens=64, outcomes=(outcome,), texts=()))
        return made[-1]

    assert kept_section(path, SUBJECT, CacheSection, attack) == (made[0], True)
    assert kept_section(path, SUBJECT, CacheSection, attack) == (made[0], False)
    assert kept_section(path, {**SUBJECT, "bundle": "def"}, CacheSection, attack) == (made[1], True)
    path.write_text(path.read_text()[:-40])  # damaged
    assert kept_section(path, {**SUBJECT, "bundle": "def"}, CacheSection, attack) == (made[2], True)
    assert made[0] != made[1] != made[2]


def test_the_steps_told_beforehand_are_those_taken(campaign):
    for rates in ((1e-3,), (1e-3, 3e-3), (3e-4, 1e-3, 3e-3)):
        settings = Settings(steps=30, batch=2, rates=rates)
        assert replace(campaign, settings=settings).run(SEM).steps == settings.total


def test_a_log_about_something_else_is_refused(campaign, tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, SUBJECT)
    log.add(campaign.run(SEM))
    kept = path.read_text()
    with pytest.raises(SemiopenError, match="another bundle, other texts or other settings; give another --out"):
        Log(path, {**SUBJECT, "steps": 4})
    assert path.read_text() == kept


def test_a_damaged_log_is_refused(campaign, tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, SUBJECT)
    log.add(campaign.run(SEM))
    log.add(campaign.run(replace_seed(SEM)))
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"attack":"sem"', '"attack":"luck"')
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(SemiopenError, match="line 2, is damaged"):
        Log(path, SUBJECT)


def replace_seed(job: Job) -> Job:
    return job.model_copy(update={"seed": 1})


def test_the_log_is_plain_json_lines(campaign, tmp_path):
    log = Log(tmp_path / "log.jsonl", SUBJECT)
    log.add(campaign.run(SEM))
    head, line = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(head) == {"subject": SUBJECT}
    assert json.loads(line)["job"]["attack"] == "sem"


def test_an_attack_from_a_base_needs_one(campaign):
    job = Job(attack="sem", labels="states", start="base", queries=4, seed=0)
    with pytest.raises(SemiopenError, match="public relative"):
        replace(campaign, base=None).run(job)
