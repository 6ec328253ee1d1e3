"""`semiopen plan`, and sealing by what it wrote, as a person runs them."""

import io
import json
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from semiopen.cli import main
from semiopen.vendor.plan_file import read_plan
from tests.models import save_random_model

MODEL = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
QUICK = ("--sequences", "2", "--draws", "2")


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def semiopen(*arguments: object) -> Done:
    """Run a command in this process."""
    streams = io.StringIO(), io.StringIO()
    status = 0
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["semiopen", *map(str, arguments)])
        patch.setattr("semiopen.cli.out.width", 150)
        stack.enter_context(redirect_stdout(streams[0]))
        stack.enter_context(redirect_stderr(streams[1]))
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(status, streams[0].getvalue(), streams[1].getvalue())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Once upon a time there were {i} cats. " * 40}) for i in range(9)))
    return path


@pytest.fixture(scope="module")
def planned(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    return path, semiopen("plan", MODEL, "--texts", texts, *QUICK, "--out", path)


def test_plan_says_what_it_measured_and_what_it_did_not(planned):
    path, done = planned
    assert done.returncode == 0, done.stderr
    document = read_plan(path)
    assert f"Plan: seal {document.plan.prefix} of 8 blocks and the embedding." in done.stdout
    (difficulty,) = document.difficulties
    assert f"{difficulty.unharmed_loss:.3f}" in done.stdout
    for harm in difficulty.table:
        assert f"{harm.loss:.3f} ± {harm.standard_error:.3f}" in done.stdout
    assert "The paper's rule, with fresh layers" in done.stdout
    assert "it is not known how many tokens this protects" in done.stdout
    assert f"semiopen seal {MODEL} --plan {path}" in done.stderr


def test_a_plan_is_sealed_and_another_models_refused(planned, tmp_path):
    path, _ = planned
    assert semiopen("keygen", tmp_path / "keys").returncode == 0
    keys = ("--keys", tmp_path / "keys")
    done = semiopen("seal", MODEL, "--out", tmp_path / "bundle", *keys, "--plan", path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "bundle" / "semiopen.json").read_bytes())
    assert manifest["plan"]["prefix"] == read_plan(path).plan.prefix
    save_random_model("llama", tmp_path / "other")
    done = semiopen("seal", tmp_path / "other", "--out", tmp_path / "no", *keys, "--plan", path)
    assert done.returncode == 1
    assert "made for a model of another shape (num_layers is 8 there and 4 here)" in done.stderr
    assert not (tmp_path / "no").exists()


def test_an_attack_from_a_base_that_is_the_model(tmp_path):
    """Both answers at once: nothing has to be bought, and the warning says so."""
    model = tmp_path / "model"
    save_random_model("llama", model)
    attack = ("--attack-budget", "512", "--attack-steps", "2", "--attack-seeds", "1", "--candidates", "1,2")
    path = tmp_path / "plan.json"
    done = semiopen("plan", model, "--public-base", model, *QUICK, *attack, "--out", path)
    assert done.returncode == 0, done.stderr
    assert "already get 100% of the tokens right" in done.stdout
    assert "No prefix tried stands up to the 512 tokens needed" in done.stdout
    assert "propose a lease of 0 tokens" in done.stdout
    document = read_plan(path)
    assert document.decided_by == "attack"
    assert [curve.prefix for curve in document.attack.curves] == [1, 2]
    assert document.attack.curves[0].start == "base"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--candidates", "1;2"), "write them as 1,2,4"),
        (("--candidates", "9", "--attack-budget", "512"), "0 to 8 blocks"),
        (("--needed-tokens", "5"), "--attack-budget too"),
        (("--texts", "nowhere.txt"), "cannot be read"),
        (("--public-base", "nowhere"), "neither a folder here"),
        (("--epsilon", "2"), "epsilon is 2.0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path):
    done = semiopen("plan", MODEL, *QUICK, *arguments, "--out", tmp_path / "plan.json")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "Error:" in line]
    assert sentence in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "plan.json").exists()


def test_a_folder_that_is_not_there_is_said_before_the_work(tmp_path):
    done = semiopen("plan", MODEL, *QUICK, "--out", tmp_path / "no" / "plan.json")
    assert done.returncode == 1
    assert "is not a folder; make it" in done.stderr
