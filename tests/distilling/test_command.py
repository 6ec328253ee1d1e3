"""`semiopen distil`, as a person runs it; and a real kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM

from tests.distilling.conftest import llama, write_data, write_student
from tests.test_cli import semiopen


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plain):
    folder = tmp_path_factory.mktemp("distil")
    write_data(folder / "private.jsonl")
    write_student(folder / "small")
    assert semiopen("keygen", "keys", cwd=folder).returncode == 0
    assert semiopen("seal", plain, "--out", "bundle", "--keys", "keys", "--prefix", "1", cwd=folder).returncode == 0
    return folder


DISTIL = [
    "distil", "bundle", "--keys", "keys", "--student", "small", "--data", "private.jsonl", "--epochs", "12",
    "--lr", "1e-2", "--batch-size", "4", "--top-k", "20", "--truth", "0.1", "--save-every", "10", "--threads", "1",
]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_student(folder):
    done = semiopen(*DISTIL, "--out", "whole", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["student"] == "whole"
    assert result["enclave_tokens"] == result["tokens"] > 0
    assert result["divergence_after"] < 0.7 * result["divergence_before"]
    assert "dev enclave: not a TEE" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / "whole").config.num_hidden_layers == 1

    environment = {name: value for name, value in os.environ.items() if name != "SEMIOPEN_ENCLAVE"}
    command = [sys.executable, "-m", "semiopen.cli", *DISTIL, "--out", "cut"]
    child = subprocess.Popen(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 180
    while not list((folder / "cut.work" / "checkpoints").glob("checkpoint-*/complete")) and time.monotonic() < end:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "cut").exists()
    assert "give --resume to go on" in semiopen(*DISTIL, "--out", "cut", cwd=folder).stderr
    done = semiopen(*DISTIL, "--out", "cut", "--resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "enclave    0 tokens, metered; " in done.stdout
    assert not (folder / "cut.work").exists()
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_mistakes_are_said(folder):
    write_student(folder / "larger", llama(vocab_size=256))
    for arguments, message in [
        (["--student", "none"], "none has no config.json"),
        (["--student", "larger"], "resize_token_embeddings(199)"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--out", "small"], "small exists already"),
        (["--beta", "1.5"], "beta must lie between 0 and 1"),
    ]:
        done = semiopen(*DISTIL, "--out", "new", *arguments, cwd=folder)
        assert done.returncode == 1
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert not (folder / "new").exists()
    done = semiopen("distil", "bundle", "--student", "small", "--data", "private.jsonl", "--out", "new", cwd=folder)
    assert "Give --keys FOLDER" in done.stderr
