"""`semiopen audit` of bundles whose head is not open, and of files without their enclave: by the rights of a lease."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import semiopen as package
from semiopen.audit import heads, opening
from semiopen.audit.campaign import FoundHead, Job, LabelName
from semiopen.audit.heads import EnclaveHead, HeadSearch, few_words
from semiopen.audit.report import AuditReport, read_report, render
from semiopen.audit.run import AuditOptions, jobs_of, rights_in_words
from semiopen.audit.run import audit as run_audit
from semiopen.audit.score import Exam, score
from semiopen.audit.thief import upper_part
from semiopen.audit.verdicts import head_verdict
from semiopen.audit.victim import Informed, PlainVictim, Remembering, SealedSet
from semiopen.audit.weights.layout import HEAD, NORM
from semiopen.audit.weights.outcomes import WeightOutcome, WeightSection
from semiopen.audit.weights.section import weights_verdict
from semiopen.bundle.lease import Rights
from semiopen.errors import EnclaveError, LeaseError, UnsupportedModelError
from semiopen.host.client import EnclaveClient
from semiopen.host.modeling import session_of
from semiopen.vendor.lease import new_lease
from tests.audit.test_report import LOSING, evidence, made_up, outcome, report_of
from tests.models import FAMILIES, VOCAB, save_random_model
from tests.test_cli import semiopen

FULL, TOP = Rights(logits="full"), Rights(logits="top-k", top_k=5)


class Vendor:
    """A vendor's bundles, opened in this process: no enclave has to be spawned."""

    def __init__(self, folder: Path, keys: Path, threads) -> None:
        self.folder, self.keys, self._threads = folder, keys, threads
        self.model = save_random_model("llama", folder / "model")
        self.leases: list[Path | None] = []
        self._texts: dict[Path, Path] = {}

    def seal(self, name: str, **plan) -> Path:
        if not (bundle := self.folder / name).exists():
            package.seal(self.folder / "model", bundle, self.keys, **plan)
        return bundle

    def start(self, bundle: Path, rights: Rights) -> Path:
        lease = new_lease(bundle, self.keys, "acme", rights)
        return self._threads.start(bundle, self.keys, lease=lease).path

    def load(self, bundle, keys=None, enclave=None, dtype=None, threads=0, lease=None):
        """Takes the place of `semiopen.load`."""
        if enclave is None:
            self.leases.append(lease)
            text = None if lease is None else lease.read_text().strip()
            enclave = self._threads.start(bundle, keys, lease=text).path
        return package.load(bundle, enclave=enclave, dtype=dtype)

    def audit(self, bundle: Path, out: Path, attacks=("sem",), lease=None, base=False, **options) -> AuditReport:
        chosen = AuditOptions.of(attacks, options.pop("tokens", [512, 1024]), steps=options.pop("steps", 2), quick=True)
        if bundle in self._texts:
            out.mkdir()
            shutil.copy(self._texts[bundle], out)
        report = run_audit(
            bundle,
            out,
            chosen,
            self.keys,
            lease=lease,
            public_base=str(self.folder / "model") if base else None,
            command=("semiopen", "audit", "bundle"),
            **options,
        )
        self._texts.setdefault(bundle, out / "sampled.safetensors")  # written once
        return report


@pytest.fixture(scope="module")
def vendor(tmp_path_factory, keys, enclave_threads):
    vendor = Vendor(tmp_path_factory.mktemp("vendor"), keys, enclave_threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load", vendor.load)
        yield vendor


@pytest.fixture(scope="module")
def sealed(vendor):
    """As the preset `recommended`: blocks and head sealed, all weights keyed."""
    return vendor.seal("sealed", prefix=2, head="sealed", fold="keyed", customer="acme")


@pytest.fixture(scope="module")
def shuffled(vendor):
    """As the preset `distillock`."""
    return vendor.seal("shuffled", preset="distillock", customer="acme")


@pytest.fixture(scope="module")
def asked_by():
    """Whatever asked a head for logits, or had tokens chosen: the rights of the enclave that was asked."""
    asked: dict[str, list[Rights]] = {"logits": [], "tokens": []}
    score, choose = EnclaveClient.score, EnclaveClient.choose

    def spy_score(self, states):
        asked["logits"].append(self.welcome.rights)
        return score(self, states)

    def spy_choose(self, states, rows, order, logits=False):
        asked["logits" if logits else "tokens"].append(self.welcome.rights)
        return choose(self, states, rows, order, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnclaveClient, "score", spy_score)
        patch.setattr(EnclaveClient, "choose", spy_choose)
        yield asked


@pytest.fixture(scope="module")
def tokens_only(vendor, sealed, asked_by, tmp_path_factory):
    """The report on a sealed head under the lease that customers get by default, with all attacks that apply."""
    out = tmp_path_factory.mktemp("tokens") / "out"
    return vendor.audit(sealed, out, ("sem", "ft_closed", "weights")), out


def by_job(report: AuditReport):
    return {(o.job.attack, o.job.labels, o.job.start, o.job.queries, o.job.control): o for o in report.outcomes}


def test_a_sealed_head_is_audited_end_to_end(tokens_only):
    report, out = tokens_only
    assert read_report(out) == report
    assert report.method.rights == "tokens, no logits"
    assert report.open_end == pytest.approx(1.0)  # the auditor's head is the enclave's
    jobs = by_job(report)
    assert ("head", "none", "noise", 8, True) in jobs
    assert {job[1] for job in jobs if job[0] == "ft_closed"} == {"hard"}
    assert report.method.left_out is not None and "Soft labels are left out" in report.method.left_out
    assert {"head", "weights", "prefix", "lease"} <= {verdict.id for verdict in report.verdicts}
    page = render(report)
    assert "tokens, no logits" in page
    assert "Soft labels are left out" in page
    assert "head alone" in page
    for verdict in report.verdicts:
        assert verdict.words.endswith(".")


def test_a_thief_with_tokens_only_never_gets_logits(tokens_only, asked_by):
    """Whoever asked for logits was the auditor, with a lease of his own; the thief had tokens and learned from them."""
    report, _ = tokens_only
    assert asked_by["logits"], "the auditor marks by the model's own answers"
    assert all(rights.all_logits for rights in asked_by["logits"])
    assert asked_by["tokens"]
    assert not any(rights.all_logits or rights.top_k for rights in asked_by["tokens"])
    found = [o.head for o in report.outcomes if o.head is not None]
    assert found and max(found) < 0.9  # two steps on tokens; logits would have given 1.0, see below


def test_what_was_asked_is_what_the_enclaves_counted(tokens_only):
    report, _ = tokens_only
    counted, jobs = report.counted, by_job(report)
    for job, one in jobs.items():
        assert one.tokens == job[3] * 128, "each text once, for states and head together"
        asks = job[0] in ("sem", "ft_closed") and not job[4]
        assert one.answers == (job[3] * 128 if asks else 0)
    assert counted.enclave == counted.here
    assert report.weights is not None
    assert counted.attacks == sum(o.tokens for o in report.outcomes) + report.weights.asked
    assert counted.answers == sum(o.answers for o in report.outcomes) + report.weights.answers
    assert counted.used is not None and counted.used >= counted.answers > 0


def test_the_leases_that_the_audit_wrote_are_gone(vendor, tokens_only):
    assert len(vendor.leases) >= 2
    assert not any(
        path is not None and path.parent.exists() for path in vendor.leases if path.name in ("thief.jwt", "auditor.jwt")
    )


def test_zero_budget_is_near_chance(tokens_only):
    report, _ = tokens_only
    none = next(o for o in report.outcomes if o.job.attack == "none")
    assert none.score["agreement"] < report.chance + 0.1
    assert none.head is None


def test_granted_logits_are_the_head_and_the_customers_lease_is_not_used(vendor, sealed, tmp_path):
    lease = tmp_path / "full.jwt"
    lease.write_text(new_lease(sealed, vendor.keys, "acme", FULL, tokens=1))
    report = vendor.audit(sealed, tmp_path / "out", ("sem", "ft_closed"), lease, tokens=[512])
    assert report.method.rights == "tokens and all logits"
    assert report.method.lease == "as full.jwt allows"
    assert {o.job.labels for o in report.outcomes if o.job.attack == "ft_closed" and not o.job.control} == {
        "soft",
        "hard",
    }
    assert all(o.head > 0.99 for o in report.outcomes if o.job.attack in ("sem", "ft_closed") and not o.job.control)
    head = next(v for v in report.verdicts if v.id == "head")
    assert head.status == "broken"
    assert by_job(report)["head", "none", "noise", 4, True].score["agreement"] > 0.99
    assert not lease.with_name("full.jwt.used").exists()


def test_a_lease_for_another_bundle_is_refused(vendor, sealed, shuffled, tmp_path):
    lease = tmp_path / "other.jwt"
    lease.write_text(new_lease(shuffled, vendor.keys, "acme", FULL))
    with pytest.raises(LeaseError, match="another bundle"):
        vendor.audit(sealed, tmp_path / "out", lease=lease)


def test_a_base_that_is_the_model_gives_everything_without_a_query(vendor, sealed, shuffled, tmp_path):
    """Through the basis, for blocks and head alike: sealed by the relative's head, shuffled by its rows."""
    for name, bundle in (("sealed", sealed), ("shuffled", shuffled)):
        report = vendor.audit(bundle, tmp_path / name, ("sem", "weights"), base=True, tokens=[512])
        graft = next(o for o in report.outcomes if o.job.attack == "base_graft")
        assert (graft.tokens, graft.answers) == (0, 0)
        assert graft.score["agreement"] > 0.95, name
        assert graft.head is not None and graft.head > 0.95
        assert report.weights is not None
        found = {(o.attack, o.control): o for o in report.weights.outcomes}
        assert found["align", ""].agreement == pytest.approx(graft.score["agreement"], abs=0.02)
        assert found["no_enclave_relative", ""].agreement < 0.3
        assert found["gain_sort", ""].agreement is None  # gains are folded
        for attack in ("no_enclave_relative", "gain_sort", "arrow_match", "align", "harvest"):
            assert found[attack, "win"].right, (name, attack)
        assert found["align", "lose"].right
        verdict = next(v for v in report.verdicts if v.id == "weights")
        assert verdict.status == "broken"
        assert "Without the enclave the files are worth" in verdict.words


def test_a_shuffled_head_is_named_by_its_answers(vendor, shuffled, tmp_path):
    report = vendor.audit(shuffled, tmp_path / "out", ("sem", "weights"), tokens=[512])
    found = by_job(report)["sem", "states", "noise", 4, False]
    assert found.answers == VOCAB  # 512 tokens are more than there are words
    assert found.head == 1.0
    assert by_job(report)["head", "none", "noise", 4, True].score["agreement"] == 1.0
    assert report.weights is not None
    harvest = next(o for o in report.weights.outcomes if o.attack == "harvest" and not o.control)
    # The embedding alone is sealed, so that one question for each token is the whole model.
    assert harvest.agreement is not None and harvest.agreement > 0.99
    assert (harvest.tokens, harvest.answers) == (VOCAB, VOCAB)
    verdict = next(v for v in report.verdicts if v.id == "weights")
    assert verdict.status == "broken"
    assert "No relative was given" in verdict.words


def test_a_running_enclave_must_grant_all_logits(vendor, sealed, tmp_path):
    for rights in (Rights(), TOP):
        socket = vendor.start(sealed, rights)
        done = semiopen("audit", sealed, "--enclave", socket, "--quick", "--out", tmp_path / "out")
        assert done.returncode == 1
        assert "--keys FOLDER" in done.stderr.replace("\n", " ")
    socket = vendor.start(sealed, FULL)
    done = semiopen(
        "audit", sealed, "--enclave", socket, "--quick", "--tokens", 512, "--steps", 2, "--out", tmp_path / "granted"
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "granted")
    assert report.method.lease == "as the running enclave's lease allows"
    assert report.counted.enclave == report.counted.here


def test_a_bundle_whose_attention_passes_the_enclave(vendor, tmp_path):
    """The thief puts it in order first; else the model that he runs would not be the model."""
    bundle = vendor.seal("ordered", prefix=1, kv="enclave")
    report = vendor.audit(bundle, tmp_path / "out", ("sem",), base=True, tokens=[512])
    graft = next(o for o in report.outcomes if o.job.attack == "base_graft")
    assert graft.score["agreement"] > 0.99
    texts = load_file(tmp_path / "out" / "sampled.safetensors")["ids"][: report.texts.exam]
    with torch.inference_mode():
        said = vendor.model(texts[:, :-1]).logits.flatten(0, 1)
    true = float(torch.nn.functional.cross_entropy(said, texts[:, 1:].flatten()))
    assert graft.score["victim_loss"] == pytest.approx(true, abs=1e-3)
    assert report.counted.enclave == report.counted.here


def test_other_families_with_such_a_head_are_refused(tmp_path, vendor):
    save_random_model("gpt2", tmp_path / "model")
    package.seal(tmp_path / "model", tmp_path / "bundle", vendor.keys, prefix=1, head="sealed")
    with pytest.raises(UnsupportedModelError, match="with an open head"):
        vendor.audit(tmp_path / "bundle", tmp_path / "out")


# --- the attack on a head, on models in the clear ------------------------------------------------------------------


class Played:
    """A head in the clear with an enclave's manners; counts answers."""

    def __init__(self, tensors, rights: Rights) -> None:
        self.rights, self.answers = rights, 0
        self._head = heads.SealedHead(FAMILIES["llama"], tensors)

    def logits(self, states):
        assert self.rights.all_logits
        self.answers += len(states)
        return self._head.logits(states)

    def top(self, states, count):
        assert count <= self.rights.top_k
        self.answers += len(states)
        return self._head.top(states, count)

    def likeliest(self, states):
        assert self.rights.generate
        self.answers += len(states)
        return self._head.likeliest(states)


@pytest.fixture(scope="module")
def scene():
    """A victim whose head is sealed, texts, its exam, and its true head: one of few words, which can be learned."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).eval()
    victim = PlainVictim(model, SealedSet.prefix(1))
    ids = torch.randint(3, 190, (200, 32), generator=torch.Generator().manual_seed(1))
    states = heads.final_states(victim, ids)
    victim.open_tensors[HEAD] = few_words(heads.normalise(states.flatten(0, 1), 1e-6), VOCAB, 3)
    victim.open_tensors[NORM] = torch.ones(32)
    exam, true = Exam.of(victim, ids[192:]), {name: victim.open_tensors.pop(name) for name in (HEAD, NORM)}
    return victim, ids[:192], exam, true


def alone(found: FoundHead, victim, exam: Exam) -> float:
    return score(upper_part(Informed(victim, found.tensors)).model, exam.below_the_head()).agreement


@pytest.mark.parametrize(("rights", "needed"), [(FULL, 0.99), (TOP, 0.9), (Rights(), 0.9)])
def test_a_head_is_found_within_each_right(scene, rights, needed):
    victim, ids, exam, true = scene
    few, many = (
        HeadSearch("sealed", Played(true, rights), steps).find(Remembering(victim), texts, 0, None, None)  # type: ignore[arg-type]
        for texts, steps in ((ids[:1, :8], 1), (ids, 800))
    )
    assert alone(many, victim, exam) > needed
    assert alone(few, victim, exam) < 0.8
    assert (many.told is None) == rights.all_logits


def test_no_right_finds_nothing(scene):
    victim, ids, _, true = scene
    head = Played(true, Rights(generate=False))
    found = HeadSearch("sealed", head, 5).find(victim, ids[:2], 0, None, None)  # type: ignore[arg-type]
    assert (dict(found.tensors), found.told, found.answers, head.answers) == ({}, None, 0, 0)


def test_the_control_can_fail_and_can_succeed(scene):
    victim, ids, exam, true = scene
    search = {steps: HeadSearch("sealed", Played(true, Rights()), steps) for steps in (1, 800)}  # type: ignore[arg-type]
    for steps, texts, wins in ((800, ids, True), (1, ids[:2], False)):
        marks, taken = search[steps].control(Remembering(victim), texts, exam, 0, None)
        assert (marks.agreement >= 0.9) == wins
        assert taken > 0


def test_few_words_are_all_in_use():
    """Were one word the likeliest everywhere, a control would be won without an attack."""
    inputs = torch.randn(4000, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.01, 24) + 5
    used = (inputs @ few_words(inputs, 99, 0).T).argmax(-1).bincount(minlength=99)
    assert (used > 0).sum() == 4
    assert float(used.max()) / len(inputs) < 0.5


def test_a_text_is_asked_once_for_two_uses(scene):
    victim, ids, _, _ = scene
    keeping, before = Remembering(victim), victim.spent.tokens
    first = keeping.query(ids[:4])
    assert torch.equal(keeping.query(ids[2:6])[:2], first[2:])
    assert victim.spent.tokens - before == 6 * 32


def test_an_enclaves_head_refuses_what_the_lease_does(vendor, sealed):
    model = package.load(sealed, enclave=vendor.start(sealed, Rights()))
    head = EnclaveHead(session_of(model).client)
    states = torch.randn(3, 32)
    assert head.likeliest(states).shape == (3,)
    for ask in (lambda: head.logits(states), lambda: head.top(states, 5)):
        with pytest.raises(EnclaveError, match="does not allow logits"):
            ask()
    model.enclave.close()  # type: ignore[operator]


# --- jobs, words, verdicts -----------------------------------------------------------------------------------------


def test_which_jobs_a_lease_leaves():
    options = AuditOptions(tokens=(512,), seeds=1)
    every: tuple[LabelName, ...] = ("soft", "hard")
    for labels in (every, every[1:], ()):
        jobs = jobs_of(options, 4, has_base=False, has_control=True, labels=labels, head=True)
        assert {job.labels for job in jobs if job.attack.startswith("ft")} == set(labels)
        assert len([job for job in jobs if job.attack == "head"]) == 1
    assert not any(job.attack == "head" for job in jobs_of(options, 4, has_base=False, has_control=True))


def test_weights_alone_train_nothing():
    options = AuditOptions.of(("weights",))
    assert (options.attacks, options.weights, options.cache) == ((), True, False)
    assert AuditOptions.of(("sem", "weights", "kv")).named == ("sem", "kv", "weights")


def test_rights_in_words():
    assert rights_in_words(TOP) == "tokens and log-probabilities of the 5 likeliest"
    assert rights_in_words(Rights(generate=False)) == "no tokens, no logits"


def weight(attack: Any, agreement, tokens=0, control: Any = "", base=False) -> WeightOutcome:
    return WeightOutcome(
        attack=attack,
        base=base,
        control=control,
        needed=0.9 if control else None,
        found={"fit": 0.5},
        agreement=agreement,
        high=None if agreement is None else agreement + 0.02,
        loss=None if agreement is None else 2.0,
        victim_loss=1.0,
        tokens=tokens,
    )


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([weight("harvest", 0.3, 9), weight("harvest", 0.95, control="win")], "holds"),
        ([weight("harvest", 0.3, 9), weight("harvest", 0.5, control="win")], "not shown"),
        ([weight("harvest", 0.3, 9), weight("align", 0.95, control="lose")], "not shown"),
        ([weight("harvest", 0.9, 9), weight("harvest", 0.5, control="win")], "broken"),
        ([weight("harvest", 0.3, 9), weight("align", 0.85, base=True)], "broken"),
        ([weight("harvest", 0.3, 9), weight("align", 0.79, base=True)], "not shown"),
        ([weight("harvest", 0.3, 9), weight("gain_sort", None, base=True)], "holds"),
        ([weight("harvest", 0.3, 9), weight("gain_sort", None, control="win")], "not shown"),
    ],
)
def test_the_weights_verdict(outcomes, status):
    section = WeightSection(outcomes=(weight("no_enclave_random", 0.02), *outcomes))
    verdict = weights_verdict(section, "command")
    assert verdict.status == status
    assert ("No relative was given" in verdict.words) == (not any(one.base for one in outcomes))
    page = render(report_of(made_up(LOSING), weights=section))
    assert 'id="weights"' in page
    assert "nothing found" not in page.split('id="weights"')[1].split("</table>")[0]


@pytest.mark.parametrize(
    ("share", "control", "status"),
    [(0.5, 0.95, "holds"), (0.5, 0.5, "not shown"), (0.9, 0.5, "broken"), (0.5, None, "not shown")],
)
def test_the_head_verdict(share, control, status):
    found = [
        o.model_copy(update={"head": share}) if o.job.queries and not o.job.control else o for o in made_up(LOSING)
    ]
    if control is not None:
        job = Job(attack="head", labels="none", start="noise", queries=1024, seed=0, control=True)
        found.append(outcome(job, control))
    verdict = head_verdict(evidence(found, head="sealed", rights=Rights()))
    assert verdict.status == status
    assert verdict.words.endswith(".")


def test_the_words_say_what_is_sealed():
    assert evidence([], head="sealed").sealed == "a prefix of 2 blocks, the embedding and the head"
    assert evidence([], head="shuffled", prefix=0).sealed == "the embedding and the order of the head's words"
    assert evidence([], prefix=0).sealed == "the embedding alone"
