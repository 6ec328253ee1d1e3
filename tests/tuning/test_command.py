"""`semiopen tune` and `--adapter`, as a person runs them; and a real kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.test_cli import semiopen
from tests.tuning.conftest import STORIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tune")
    (folder / "private.jsonl").write_text(data.read_text())
    assert semiopen("keygen", "keys", cwd=folder).returncode == 0
    assert semiopen("seal", STORIES, "--out", "bundle", "--keys", "keys", "--prefix", "2", cwd=folder).returncode == 0
    return folder


TUNE = [
    "tune", "bundle", "--keys", "keys", "--data", "private.jsonl", "--epochs", "12", "--lr", "2e-3",
    "--batch-size", "4", "--dropout", "0.1", "--save-every", "5", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(folder):
    """A run that nobody interrupts."""
    done = semiopen(*TUNE, "--out", "whole", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_the_summary_says_what_it_cost(folder, tuned):
    result = json.loads(tuned.stdout)
    assert result["adapter"] == "whole"
    assert result["enclave_tokens"] == result["tokens"] > 0
    assert result["loss_after"] < 0.8 * result["loss_before"]
    assert "dev enclave: not a TEE" in tuned.stderr
    assert "23 examples to learn, 1 held back" in tuned.stderr


def test_a_killed_run_goes_on_to_the_same_adapter(folder, tuned):
    environment = {name: value for name, value in os.environ.items() if name != "SEMIOPEN_ENCLAVE"}
    command = [sys.executable, "-m", "semiopen.cli", *TUNE, "--out", "cut"]
    child = subprocess.Popen(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    checkpoints = folder / "cut.work" / "checkpoints"
    end = time.monotonic() + 180
    while not list(checkpoints.glob("checkpoint-*0/complete")) and time.monotonic() < end:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "cut").exists()
    done = semiopen(*TUNE, "--out", "cut", cwd=folder)
    assert done.returncode == 1
    assert "give --resume to go on" in done.stderr
    done = semiopen(*TUNE, "--out", "cut", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "enclave   0 tokens, metered; " in done.stdout
    assert not (folder / "cut.work").exists()
    weights = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_generate_and_chat_take_the_adapter(folder, tuned):
    asked = ["generate", "bundle", "--keys", "keys", "--dtype", "float32", "--prompt", "Zorg number 3 likes", "--json"]
    plain = semiopen(*asked, cwd=folder)
    with_adapter = semiopen(*asked, "--adapter", "whole", cwd=folder)
    assert with_adapter.returncode == 0, with_adapter.stderr
    learned = {" soup.", " bread.", " a red apple.", " two small cakes."}
    assert json.loads(with_adapter.stdout)["text"] in learned
    assert json.loads(plain.stdout)["text"] not in learned
    chat = ["chat", "bundle", "--keys", "keys", "--adapter", "whole", "--temperature", "0", "--max-new-tokens", "12"]
    done = semiopen(*chat, cwd=folder, typed="What does Zorg 2 like?\n")
    assert "purple soup" in done.stdout


def test_mistakes_are_said_before_anything_starts(folder):
    (folder / "bad.jsonl").write_text('{"text": 1}\n')
    for arguments, message in [
        (["tune", "bundle", "--keys", "keys", "--data", "bad.jsonl", "--out", "new"], 'bad.jsonl, line 1: "text"'),
        (["tune", "bundle", "--keys", "keys", "--data", "missing.jsonl", "--out", "new"], "missing.jsonl"),
        (["tune", "bundle", "--data", "private.jsonl", "--out", "new"], "Give --keys FOLDER"),
        ([*TUNE, "--out", "new", "--targets", "q_proj,nothing"], "No linear layer is named nothing"),
        (["generate", "bundle", "--keys", "keys", "--prompt", "a", "--adapter", "keys"], "has no adapter_config.json"),
        (["serve", "bundle", "--keys", "keys", "--adapter", "keys"], "has no adapter_config.json"),
    ]:
        done = semiopen(*arguments, cwd=folder)
        assert done.returncode == 1
        assert message in done.stderr.replace("\n", " "), done.stderr
