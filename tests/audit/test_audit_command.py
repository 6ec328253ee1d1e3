"""`semiopen audit`, as a person runs it: on a real bundle, through an enclave that counts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import semiopen as package
from semiopen.audit.campaign import Campaign
from semiopen.audit.report import read_report
from semiopen.audit.texts import read_apart
from semiopen.errors import SemiopenError
from tests.models import save_random_model
from tests.test_cli import MODEL, semiopen

QUICK = ("--quick", "--tokens", "512", "--tokens", "1024", "--steps", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, keys, enclave_threads):
    """model/, bundle/ with two of its four blocks sealed, and the socket of its enclave."""
    folder = tmp_path_factory.mktemp("audit")
    save_random_model("llama", folder / "model")
    package.seal(folder / "model", folder / "bundle", keys, prefix=2)
    return folder, enclave_threads.start(folder / "bundle", keys).path


def audit(folder, out, *more, sampled=None):
    """Run it; with the texts of an earlier report, sampled only once."""
    place, socket = folder
    if sampled is not None:
        out.mkdir()
        shutil.copy(sampled[0] / "sampled.safetensors", out)
    return semiopen("audit", place / "bundle", "--enclave", socket, *QUICK, *more, "--out", out)


@pytest.fixture(scope="module")
def audited(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    return out, audit(folder, out)


def test_it_writes_a_report(folder, audited):
    out, done = audited
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "outcomes.jsonl",
        "report.html",
        "report.json",
        "sampled.safetensors",
    ]
    report = read_report(out)
    assert "not a TEE" in report.bundle.enclave
    assert report.bundle.plan.prefix == 2
    assert report.texts.source == "sampled"
    assert report.method.quick
    assert [(o.job.attack, o.job.queries, o.job.control) for o in report.outcomes] == [
        ("none", 0, False),
        ("sem", 8, True),
        ("sem", 4, False),
        ("sem", 8, False),
    ]
    assert report.open_end == 1.0
    for verdict in report.verdicts:
        assert verdict.status in done.stdout
    assert report.verdicts[0].words in done.stdout.replace("\n", " ")
    assert "report.html" in done.stderr
    assert f"--enclave {folder[1]} --tokens 512 --tokens 1024 --steps 2 --quick --attack sem" in report.command


def test_the_enclaves_own_counter_agrees(audited):
    counted = read_report(audited[0]).counted
    assert counted.attacks == (8 + 4 + 8) * 128  # the control's queries go through the enclave too
    assert counted.enclave == counted.here
    assert counted.sampling == 2 * 64 * 127  # the last token of a text is never asked
    assert counted.earlier == 0


def test_no_text_is_in_the_report(audited):
    ids = load_file(audited[0] / "sampled.safetensors")["ids"]
    assert ids.shape == (128, 128)
    for name in ("report.html", "report.json", "outcomes.jsonl"):
        text = (audited[0] / name).read_text()
        assert ", ".join(map(str, ids[0, 1:5].tolist())) not in text


def test_the_same_command_again_runs_nothing(folder, audited, monkeypatch):
    out, _ = audited
    before = (out / "outcomes.jsonl").read_text()
    monkeypatch.setattr(Campaign, "run", lambda *_: pytest.fail("all is done"))
    done = audit(folder, out)
    assert done.returncode == 0, done.stderr
    assert "0 attacks to run, 0 optimiser steps; 4 are done already." in done.stderr
    assert (out / "outcomes.jsonl").read_text() == before
    report = read_report(out)
    assert (report.counted.attacks, report.counted.sampling) == (0, 0)
    assert report.counted.earlier == (8 + 4 + 8) * 128


def test_an_interrupted_audit_goes_on(folder, audited, tmp_path, monkeypatch):
    """The exit status is that of Ctrl-C, the person is told how to go on, and nothing done is done again."""
    out, ran, run = tmp_path / "out", [], Campaign.run

    def interrupted(self, job, report=None):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job)
        return run(self, job, report)

    monkeypatch.setattr(Campaign, "run", interrupted)
    done = audit(folder, out, sampled=audited)
    assert done.returncode == 130
    assert f"What is done is kept in {out}; the same command goes on." in done.stderr
    assert not (out / "report.html").exists()

    again = []
    monkeypatch.setattr(Campaign, "run", lambda self, job, report=None: again.append(job) or run(self, job, report))
    done = audit(folder, out)
    assert done.returncode == 0, done.stderr
    assert "2 attacks to run" in done.stderr
    assert not set(again) & set(ran)
    whole = read_report(audited[0])
    resumed = read_report(out)
    assert [o.model_copy(update={"seconds": 0}) for o in resumed.outcomes] == [
        o.model_copy(update={"seconds": 0}) for o in whole.outcomes
    ]
    assert resumed.curves[0].prices == whole.curves[0].prices


def test_a_larger_budget_later_keeps_what_was_done(folder, audited, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("outcomes.jsonl", "sampled.safetensors"):
        (out / name).write_bytes((audited[0] / name).read_bytes())
    done = audit(folder, out, "--tokens", "2048")
    assert done.returncode == 0, done.stderr
    assert "2 attacks to run" in done.stderr  # and its control
    assert {o.job.queries for o in read_report(out).outcomes} == {0, 4, 8, 16}


def test_a_public_base_that_is_the_model_breaks_the_claim(folder, audited, tmp_path):
    more = ("--attack", "base_graft", "--public-base", folder[0] / "model")
    done = audit(folder, tmp_path / "out", *more, sampled=audited)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    graft = next(o for o in report.outcomes if o.job.attack == "base_graft")
    assert graft.score["agreement"] == 1.0
    assert graft.tokens == 0
    found = {verdict.id: verdict.status for verdict in report.verdicts}
    assert found["prefix"] == found["lease"] == found["base"] == "broken"


def test_a_key_folder_starts_an_enclave(folder, audited, keys, tmp_path):
    place, _ = folder
    (tmp_path / "out").mkdir()
    shutil.copy(audited[0] / "sampled.safetensors", tmp_path / "out")
    done = semiopen(
        "audit", place / "bundle", "--keys", keys, *QUICK, "--attack", "none", "--threads", 1, "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "out").bundle.enclave == "dev enclave: not a TEE"
    assert "dev enclave: not a TEE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tokens", "100"), "fewer than 512 tokens trains nothing"),
        (("--attack", "base_graft"), "--public-base MODEL"),
        (("--public-base", MODEL), "give a relative of the model"),
        (("--public-base", "/nowhere/at/all"), "cannot be loaded"),
        (("--texts", "nowhere.txt"), "leave --texts"),  # this bundle has no tokenizer
        (("--steps", "3"), "other settings; give another --out"),
    ],
)
def test_what_is_refused(folder, audited, tmp_path, arguments, reason):
    if arguments[0] == "--steps":
        done = audit(folder, audited[0], *arguments)
    else:
        done = audit(folder, tmp_path / "out", *arguments, sampled=audited)
    assert done.returncode == 1
    assert reason in done.stderr.replace("\n", " ")


def test_a_folder_with_other_files_is_left_alone(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    done = audit(folder, tmp_path)
    assert done.returncode == 1
    assert "has other files in it" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_texts_of_another_bundle_are_not_taken(folder, audited, tmp_path, keys, enclave_threads):
    place, _ = folder
    package.seal(place / "model", tmp_path / "other", keys, prefix=1)
    socket = enclave_threads.start(tmp_path / "other", keys).path
    done = semiopen("audit", tmp_path / "other", "--enclave", socket, *QUICK, "--out", audited[0])
    assert done.returncode == 1
    assert "another bundle" in done.stderr


def test_an_enclave_must_be_named(folder, tmp_path):
    done = semiopen("audit", folder[0] / "bundle", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "--keys FOLDER" in done.stderr


def test_help_teaches():
    done = semiopen("audit", "--help")
    text = " ".join(done.stdout.split())
    assert "Example: semiopen audit my-bundle --keys vendor-keys --quick --out first-look" in text
    assert "A broken claim is a result, not an error" in text


def documents(count: int) -> list[str]:
    return [f"Story {number} is about the number {number}. " * 60 for number in range(count)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_queries_and_exam_share_no_document(tmp_path):
    texts = documents(12)
    path = write(tmp_path / "texts.jsonl", [*texts, *texts])  # each twice
    queries, exam = read_apart(path, MODEL, 10**6, 10**6, 0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    told = [{int(n) for n in _numbers(tokenizer.decode(part.flatten()))} for part in (queries, exam)]
    assert all(told)
    assert not told[0] & told[1]
    fewer, smaller = read_apart(path, MODEL, 3, 2, 0)
    assert torch.equal(fewer, queries[:3])
    assert torch.equal(smaller, exam[:2])
    assert not torch.equal(read_apart(path, MODEL, 3, 2, 1)[0], fewer)


def _numbers(text: str) -> list[str]:
    """Of documents whose beginning is there, as a number that is cut off is another."""
    return [part.split(" ")[0] for part in text.split("Story ")[1:-1]]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(SemiopenError, match="too little text"):
        read_apart(write(tmp_path / "one.jsonl", documents(1)), MODEL, 10, 10, 0)
    with pytest.raises(SemiopenError, match="too little text"):
        read_apart(write(tmp_path / "short.jsonl", ["a", "b"]), MODEL, 10, 10, 0)
