"""Verdicts say what the outcomes say, and the page holds all of it and asks for nothing."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from semiopen.audit.campaign import Job, Outcome, plan_jobs
from semiopen.audit.curves import LEVELS, curves_of, isotonic, point_of, tokens_for
from semiopen.audit.plots import short
from semiopen.audit.report import (
    AuditReport,
    BundleFacts,
    Counted,
    Method,
    TextFacts,
    read_report,
    render,
    write_report,
)
from semiopen.audit.verdicts import Evidence, untested, verdicts
from semiopen.model.plan import Plan

BUDGETS = [16, 64, 256, 1024]  # queries of 128 tokens
CONTROL = {"sem": 0.97, "ft_closed": 0.93, "ft_all": 0.95}


def outcome(job: Job, agreement: float, width: float = 0.02) -> Outcome:
    return Outcome(
        job=job,
        sealed="embedding and blocks 1 to 2",
        tokens=job.queries * 128,
        steps=600 if job.queries else 0,
        rate=0.003 if job.queries else None,
        seconds=10.0,
        score={
            "agreement": agreement,
            "agreement_low": agreement - width,
            "agreement_high": agreement + width,
            "kl": 4 * (1 - agreement),
            "loss": 2 + 5 * (1 - agreement),
            "victim_loss": 2.0,
        },
    )


def made_up(reached: dict, attacks=("sem", "ft_closed", "ft_all"), base: float | None = None, control=CONTROL):
    """Outcomes in which each attack's agreement is `reached`, by its name, at growing budgets."""
    found = []
    for job in plan_jobs(list(attacks), BUDGETS, [0, 1], has_base=base is not None):
        if job.attack == "none":
            found.append(outcome(job, 0.03))
        elif job.attack == "base_graft":
            found.append(outcome(job, base or 0.0))
        elif job.control:
            found.append(outcome(job, control[job.attack]))
        else:
            at = reached[job.attack][BUDGETS.index(job.queries)]
            found.append(outcome(job, at - (0.1 if job.labels == "hard" else 0) + 0.002 * job.seed))
    return found


LOSING = {"sem": (0.25, 0.3, 0.35, 0.45), "ft_closed": (0.1, 0.15, 0.2, 0.3), "ft_all": (0.1, 0.15, 0.2, 0.3)}
WINNING = {**LOSING, "sem": (0.3, 0.6, 0.85, 0.97)}


def evidence(outcomes, **changes) -> Evidence:
    facts = {
        "prefix": 2,
        "num_layers": 8,
        "open_embedding": False,
        "chance": 0.06,
        "open_end": 1.0,
        "control_start": 0.6,
        "command": ("semiopen", "audit", "my bundle", "--keys", "keys"),
    }
    return Evidence(outcomes=outcomes, **{**facts, **changes})  # type: ignore[arg-type]


def judged(outcomes, **changes):
    return {verdict.id: verdict for verdict in verdicts(evidence(outcomes, **changes))}


def report_of(outcomes, **changes) -> AuditReport:
    found = evidence(outcomes)
    facts = {
        "made": "2030-01-02T03:04:05+00:00",
        "bundle": BundleFacts(
            name="<b>bundle</b>",
            digest="ab" * 32,
            bundle_id="cd" * 16,
            architecture="LlamaForCausalLM",
            plan=Plan(prefix=2),
            num_layers=8,
            sealed_bytes=10,
            open_bytes=2_000_000,
            open_embedding=False,
            enclave="dev enclave: not a TEE",
            dtype="float32",
        ),
        "verdicts": tuple(verdicts(found)),
        "curves": tuple(curves_of(outcomes)),
        "outcomes": tuple(outcomes),
        "chance": 0.06,
        "open_end": 1.0,
        "control_start": 0.6,
        "untested": tuple(untested(found)),
        "texts": TextFacts(source="sampled", name=None, queries=1024, exam=64),
        "method": Method(steps=600, rates=(0.001,), batch=16, exam_sequences=64, public_base=None, quick=False),
        "counted": Counted(attacks=100, auditor=20, sampling=3, enclave=123, earlier=0),
        "command": "semiopen audit",
        "seconds": 12.0,
        "versions": {"semiopen": "0.1.0", "torch": "2.13"},
    }
    return AuditReport(**{**facts, **changes})  # type: ignore[arg-type]


def test_prices_are_interpolated_in_the_logarithm():
    assert tokens_for(0.5, [0, 128, 384], [0.1, 0.4, 0.6]) == math.floor(128 * (math.sqrt(8) - 1))
    assert tokens_for(0.4, [0, 128, 384], [0.1, 0.4, 0.6]) == 128
    assert tokens_for(0.1, [0, 128], [0.1, 0.4]) == 0
    assert tokens_for(0.7, [0, 128], [0.1, 0.4]) == math.inf
    assert isotonic([0.1, 0.5, 0.3, 0.6]) == [0.1, 0.4, 0.4, 0.6]


def test_a_curve_has_a_price_with_an_interval():
    curve = next(curve for curve in curves_of(made_up(WINNING)) if curve.attack == "sem")
    assert [point.tokens for point in curve.points] == [0, *(128 * budget for budget in BUDGETS)]
    assert [price.agreement for price in curve.prices] == list(LEVELS)
    price = curve.price(0.8)
    assert price.low is not None and price.tokens is not None and price.high is not None
    assert 8192 < price.low < price.tokens < price.high < 32768
    wide = [outcome(o.job, o.score["agreement"], 0.1) for o in made_up(WINNING)]
    wider = next(curve for curve in curves_of(wide) if curve.attack == "sem").price(0.8)
    assert wider.low is not None and wider.low < price.low
    assert next(curve for curve in curves_of(made_up(LOSING)) if curve.attack == "sem").price(0.5).tokens is None


def test_seeds_widen_an_interval():
    jobs = [Job(attack="sem", labels="states", start="noise", queries=16, seed=seed) for seed in range(3)]
    close = point_of([outcome(job, 0.5) for job in jobs])
    apart = point_of([outcome(job, 0.5 + 0.1 * (job.seed - 1)) for job in jobs])
    assert close.agreement == apart.agreement == pytest.approx(0.5)
    assert apart.low < close.low < 0.5 < close.high < apart.high


def test_an_attack_that_wins_breaks_the_claim():
    found = judged(made_up(WINNING))
    assert found["prefix"].status == found["sem"].status == "broken"
    assert "Sealing a prefix of 2 blocks and the embedding protects about" in found["prefix"].words
    assert "95% interval" in found["prefix"].words
    assert found["ft_closed"].status == found["ft_all"].status == "holds"
    assert [figure.name for figure in found["prefix"].figures[:4]] == [
        "50% agreement",
        "80% agreement",
        *("90% agreement", "95% agreement"),
    ]
    assert found["lease"].status == "holds"
    lease = int(re.search(r"Lease at most ([\d,]+) tokens", found["lease"].words)[1].replace(",", ""))  # type: ignore[index]
    low = next(curve for curve in curves_of(made_up(WINNING)) if curve.attack == "sem").price(0.8).low
    assert low is not None and 0.9 * low <= lease <= low


def test_attacks_that_fail_and_pass_their_control_leave_the_claim_standing():
    found = judged(made_up(LOSING))
    assert found["prefix"].status == "holds"
    assert "more than the 131,072 tokens that were tried" in found["prefix"].words
    assert "more than was tried" in found["prefix"].figures[1].value
    assert {found[name].status for name in ("sem", "ft_closed", "ft_all", "lease", "strongest")} == {"holds"}


def test_an_attack_that_fails_its_control_proves_nothing():
    found = judged(made_up(LOSING, control={**CONTROL, "ft_all": 0.7}))
    assert found["ft_all"].status == "not shown"
    assert "prove nothing" in found["ft_all"].words
    assert "70.0%" in found["ft_all"].words
    assert found["prefix"].status == found["lease"].status == found["strongest"].status == "not shown"
    assert found["sem"].status == "holds"


def test_a_control_that_fresh_weights_pass_proves_nothing():
    """A block more or less changes little in some models: then 93% is no success."""
    assert judged(made_up(LOSING), control_start=0.92)["ft_closed"].status == "not shown"
    assert judged(made_up(LOSING), control_start=0.80)["ft_closed"].status == "holds"


def test_success_needs_no_control():
    found = judged(made_up(WINNING, control={**CONTROL, "sem": 0.5}))
    assert found["sem"].status == found["prefix"].status == "broken"
    assert "takes nothing from its success" in found["sem"].words


def test_without_a_control_nothing_holds():
    outcomes = [one for one in made_up(LOSING) if not one.job.control]
    found = judged(outcomes, open_end=None, control_start=None)
    assert {found[name].status for name in ("sem", "prefix", "scale")} == {"not shown"}
    assert "no open block is left" in found["sem"].words


def test_a_stronger_attack_than_sem_is_named():
    found = judged(made_up({**LOSING, "ft_closed": (0.1, 0.2, 0.5, 0.7)}))
    assert found["strongest"].status == "broken"
    assert "FT-closed, soft labels is" in found["strongest"].words


def test_labels():
    assert judged(made_up(LOSING))["labels"].status == "holds"
    assert judged(made_up(LOSING, attacks=("sem",)))["labels"].status == "not shown"


def test_a_relative_that_is_enough_breaks_its_claim():
    found = judged(made_up(LOSING, base=0.91))
    assert found["base"].status == "broken"
    assert found["prefix"].status == "broken"
    assert "protects nothing: without one query" in found["prefix"].words
    assert found["lease"].status == "broken"
    assert judged(made_up(LOSING, base=0.2))["base"].status == "holds"
    without = judged(made_up(LOSING))["base"]
    assert without.status == "not shown"
    assert "--public-base MODEL" in without.words


def test_the_two_ends():
    found = judged(made_up(LOSING))
    assert found["start"].status == found["scale"].status == "holds"
    assert judged(made_up(LOSING), open_end=0.99)["scale"].status == "broken"
    high = [outcome(one.job, 0.5) if one.job.attack == "none" else one for one in made_up(LOSING)]
    assert judged(high)["start"].status == "broken"


def test_the_zero_budget_alone():
    found = judged(made_up({}, attacks=()))
    assert {verdict.status for name, verdict in found.items() if name not in ("start", "scale")} == {"not shown"}
    assert "<svg" not in render(report_of(made_up({}, attacks=())))


def test_every_verdict_has_a_command_that_quotes_what_it_must():
    for verdict in judged(made_up(WINNING)).values():
        assert verdict.command.startswith("semiopen audit 'my bundle' --keys keys --attack ")
        assert verdict.words.endswith(".")
        assert verdict.claim.endswith(".")


class Page(HTMLParser):
    """What a browser would fetch, run, or need to tell cells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else():
    page = render(report_of(made_up(WINNING, base=0.3)))
    parser = Page()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form"}
    for _, attributes in parser.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    headers = [attributes for tag, attributes in parser.tags if tag == "th"]
    assert headers
    assert all(attributes.get("scope") in ("col", "row") for attributes in headers)
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_shows_what_was_found_and_escapes_it():
    report = report_of(made_up(WINNING))
    page = render(report)
    assert "<b>bundle</b>" not in page
    assert "&lt;b&gt;bundle&lt;/b&gt;" in page
    plain = page.replace("&#39;", "'").replace("&#34;", '"')
    for verdict in report.verdicts:
        assert verdict.claim in plain
        assert verdict.words in plain
        assert verdict.command in plain
    assert page.count('<tr class="control">') == 3
    assert "dev enclave: not a TEE" in page
    assert "at temperature 1" in page
    assert report.bundle.digest in page
    assert "A quick look" not in page
    quick = report.method.model_copy(update={"quick": True})
    assert "A quick look" in render(report.model_copy(update={"method": quick}))


def test_the_plots_are_whole_svg_with_words():
    page = render(report_of(made_up(WINNING)))
    drawings = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'role="img"' in svg]
    assert len(drawings) == 4  # two plots, wide and narrow
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width = float(root.attrib["viewBox"].split()[2])
        space = "{http://www.w3.org/2000/svg}"
        assert root.find(f"{space}title") is not None
        assert root.find(f"{space}desc") is not None
        for circle in root.iter(f"{space}circle"):
            assert 0 < float(circle.attrib["cx"]) < width
        assert len(list(root.iter(f"{space}circle"))) == 5 + 2 * 5  # SEM; soft labels of two attacks
    assert [short(n) for n in (0, 512, 2048, 8192, 131072, 1_500_000)] == ["0", "512", "2k", "8.2k", "131k", "1.5M"]


def test_the_json_is_versioned_and_holds_what_the_page_shows(tmp_path):
    report = report_of(made_up(WINNING))
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read_report(tmp_path) == report
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["format"] == 1
    assert render(read_report(tmp_path)) == (tmp_path / "report.html").read_text()
    document["format"] = 2
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="format"):
        read_report(tmp_path)


def test_what_was_not_tested_is_told():
    assert any("FT-closed, FT-all" in line for line in untested(evidence(made_up(LOSING, attacks=("sem",)))))
    assert any("public relative" in line for line in untested(evidence(made_up(LOSING))))
    assert not any("public relative" in line for line in untested(evidence(made_up(LOSING, base=0.3))))
