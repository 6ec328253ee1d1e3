"""Leases on the command line, as vendor and customer run them."""

import json
import time

import pytest

from semiopen.bundle.files import MANIFEST_NAME
from tests.test_cli import MODEL, bad, semiopen, story  # noqa: F401 - a fixture

PROMPT = ("--keys", "keys", "--prompt", "Once upon a time", "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """keys/ and bundle/ with a sealed head, and acme.jwt for 60 tokens."""
    folder = tmp_path_factory.mktemp("lease")
    assert semiopen("keygen", "keys", cwd=folder).returncode == 0
    done = semiopen("seal", MODEL, "--out", "bundle", "--keys", "keys", "--prefix", "1", "--head", "sealed", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "only with a lease; make one with: semiopen lease new" in done.stderr
    done = new(folder, "acme.jwt", "--tokens", "60", "--rate", "6000")
    assert done.returncode == 0, done.stderr
    return folder


def new(folder, name, *options):
    return semiopen(
        *("lease", "new", "--bundle", "bundle", "--keys", "keys", "--customer", "acme", "--out", name, *options),
        cwd=folder,
    )


def test_a_lease_is_issued_and_shown(folder):
    shown = semiopen("lease", "show", "acme.jwt", "--vendor-key", "keys/vendor.pub", cwd=folder)
    assert shown.returncode == 0
    words = " ".join(shown.stdout.split())
    assert "customer acme" in words
    assert "tokens 60 " in words
    assert "rate 6,000 tokens a minute" in words
    assert "rights choose tokens signature verified, vendor key" in words
    assert "(ended)" not in words
    unchecked = semiopen("lease", "show", "acme.jwt", cwd=folder).stdout
    assert "not verified: give --vendor-key" in unchecked


def test_every_option_reaches_the_lease(folder):
    options = (
        "--lasts",
        "2h",
        "--begins",
        "2099-02-03",
        "--logits",
        "top-k",
        "--top-k",
        "7",
        "--tune",
        "--no-generate",
    )
    done = new(folder, "rich.jwt", *options)
    words = " ".join(done.stdout.split())
    assert "valid 2099-02-03 00:00:00 UTC to 2099-02-03 02:00:00 UTC tokens" in words, done.stderr
    assert "tokens no limit rate no limit" in words
    assert "rights log-probabilities of the 7 likeliest, tune (all logits, gradients) signature" in words
    assert "choose tokens" not in words
    done = new(folder, "most.jwt", "--logits", "full", "--distil")
    assert "choose tokens, all logits, distil (all logits)" in " ".join(done.stdout.split())


def test_what_cannot_be_issued_or_read_is_one_sentence(folder, tmp_path):
    semiopen("keygen", tmp_path / "other")
    make = ("lease", "new", "--bundle", "bundle", "--customer", "acme", "--out", tmp_path / "no.jwt")
    own = (*make, "--keys", "keys")
    bad("vendor", *make, "--keys", tmp_path / "other", cwd=folder)
    bad("--top-k N goes with --logits top-k", *own, "--top-k", "5", cwd=folder)
    bad("--top-k N goes with --logits top-k", *own, "--logits", "top-k", cwd=folder)
    bad("write 90s, 45m, 12h or 30d", *own, "--lasts", "3 weeks", cwd=folder)
    bad("give a later end", *own, "--begins", "2001-02-03", "--lasts", "1h", cwd=folder)
    assert not (tmp_path / "no.jwt").exists()
    before = (folder / "acme.jwt").read_bytes()
    bad("each lease a file of its own", *own[:-3], folder / "acme.jwt", "--keys", "keys", cwd=folder)
    assert (folder / "acme.jwt").read_bytes() == before
    bad("not signed by the vendor", "lease", "show", "acme.jwt", "--vendor-key", tmp_path / "other", cwd=folder)
    bad("This is no lease", "lease", "show", "keys/vendor.pub", cwd=folder)
    bad("cannot be read", "lease", "show", "nowhere.jwt", cwd=folder)


def test_inspect_says_what_is_needed(folder):
    words = " ".join(semiopen("inspect", "bundle", cwd=folder).stdout.split())
    assert "head sealed fold none" in words
    assert "lease needed: --lease FILE" in words
    assert json.loads(semiopen("inspect", "bundle", "--json", cwd=folder).stdout)["lease_required"] is True


def test_generating_until_the_lease_is_used_up(folder, story):  # noqa: F811
    bad("needs a lease of the vendor's; give it with --lease FILE", "generate", "bundle", *PROMPT, cwd=folder)
    run = ("generate", "bundle", *PROMPT, "--lease", "acme.jwt", "--json", "--max-new-tokens")
    done = semiopen(*run, 20, cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["tokens"] == story
    assert "Lease of acme to 20" in done.stderr
    assert "60 of 60 tokens left, 6,000 a minute" in done.stderr
    used = answer["prompt_tokens"] + 19
    assert json.loads((folder / "acme.jwt.used").read_text())["tokens"] == used
    done = semiopen(*run, 60, cwd=folder)
    assert done.returncode == 1
    assert f"{60 - used} of 60 tokens left, 6,000 a minute" in done.stderr  # counted over the restart
    assert "Error: The lease has 0 of 60 tokens left and this needs more; ask the vendor" in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_proves_a_sealed_head(folder):
    assert new(folder, "compare.jwt").returncode == 0
    done = semiopen(
        *("compare", "bundle", MODEL, "--keys", "keys", "--lease", "compare.jwt", "--max-new-tokens", "8"), cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tokens equal; no sealed weight in plain form." in done.stdout


def test_a_lease_is_the_enclaves_not_the_clients(folder):
    bad(
        "give --lease to `semiopen enclave` instead",
        *("generate", "bundle", "--enclave", "no.sock", "--prompt", "Hi", "--lease", "acme.jwt"),
        cwd=folder,
    )


def test_an_ended_lease_is_refused(folder):
    done = new(folder, "short.jwt", "--lasts", "1s")
    assert done.returncode == 0
    time.sleep(1.1)
    assert "UTC (ended)" in semiopen("lease", "show", "short.jwt", cwd=folder).stdout
    bad("The lease ended at", "generate", "bundle", *PROMPT, "--lease", "short.jwt", cwd=folder)


@pytest.mark.parametrize(
    ("options", "head", "fold", "needed"),
    [
        (("--preset", "distillock", "--customer", "acme"), "shuffled", "keyed", True),
        (("--prefix", "1", "--require-lease"), "open", "none", True),
        (("--prefix", "1"), "open", "none", False),
        (("--prefix", "1", "--head", "shuffled"), "shuffled", "none", True),
    ],
    ids=str,
)
def test_seal_places_the_head(folder, tmp_path, options, head, fold, needed):
    done = semiopen("seal", MODEL, "--out", tmp_path / "b", "--keys", "keys", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "b" / MANIFEST_NAME).read_bytes())
    assert (manifest["plan"]["head"], manifest["plan"]["fold"]) == (head, fold)
    assert manifest["lease_required"] is needed
    assert ("only with a lease" in done.stderr) is needed
