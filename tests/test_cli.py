"""The commands, as a person runs them: what is printed, what is refused, and that nothing is left behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from semiopen.cli import main

MODEL = Path(__file__).parent.parent / "lab" / "models" / "stories-4m"
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "SEMIOPEN_ENCLAVE"}, "OMP_NUM_THREADS": "1"}


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def semiopen(*arguments: object, cwd: Path | None = None, typed: str = "") -> Done:
    """Run a command in this process, which has paid for its imports already."""
    streams = io.StringIO(), io.StringIO()
    status = 0
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["semiopen", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.delenv("SEMIOPEN_ENCLAVE", raising=False)
        if cwd is not None:
            patch.chdir(cwd)
            (Path(cwd) / "tmp").mkdir(exist_ok=True)
            patch.setenv("TMPDIR", str(Path(cwd) / "tmp"))  # other tests leave plain models in the common one,
            patch.setattr(tempfile, "tempdir", None)  # where `compare` would find them
        stack.enter_context(redirect_stdout(streams[0]))
        stack.enter_context(redirect_stderr(streams[1]))
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, streams[0].getvalue(), streams[1].getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """keys/ and bundle/ of the model that the repository carries, made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    assert semiopen("keygen", "keys", cwd=folder).returncode == 0
    done = semiopen("seal", MODEL, "--out", "bundle", "--keys", "keys", "--prefix", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Sealed 2 of 8 blocks and the embedding into bundle." in done.stderr
    return folder


@pytest.fixture(scope="module")
def story():
    """What the original writes."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    return model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


def test_keys_are_private(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder / "keys", *(folder / "keys").iterdir()]}
    assert modes["keys"] == 0o700
    assert modes["signing.key"] == modes["sealing.key"] == 0o600


def test_generate_gives_the_original_tokens(folder, story):
    command = ["generate", "bundle", "--keys", "keys", "--prompt", "Once upon a time", "--max-new-tokens", "20"]
    done = semiopen(*command, "--dtype", "float32", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["tokens"] == story
    assert answer["enclave"] == "dev enclave: not a TEE"
    assert "dev enclave: not a TEE" in done.stderr
    streamed = semiopen(*command, "--dtype", "float32", cwd=folder)
    assert streamed.stdout.strip() == "Once upon a time" + answer["text"].rstrip()


def test_chat_keeps_the_conversation(folder):
    lines = "Tell me a story about a cat.\nTell me more.\n/new\nHello\n/exit\nnever read\n"
    done = semiopen(
        "chat", "bundle", "--keys", "keys", "--max-new-tokens", "12", "--temperature", "0", cwd=folder, typed=lines
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.strip().splitlines()
    assert len(answers) >= 3
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    messages = []
    for line in lines.splitlines()[:2]:
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True).strip()})
    assert " ".join(messages[1]["content"].split()) in " ".join(done.stdout.split())
    assert " ".join(messages[3]["content"].split()) in " ".join(done.stdout.split())


def test_inspect_and_verify(folder):
    done = semiopen("inspect", "bundle", "--json", cwd=folder)
    document = json.loads(done.stdout)
    assert document["plan"]["prefix"] == 2
    assert document["signed_by"] is None
    assert document["open_embedding"] is False
    assert set(document["files"]) >= {"config.json", "model.safetensors", "semiopen.json", "tokenizer.json"}
    assert "not verified" in semiopen("inspect", "bundle", cwd=folder).stdout
    shown = semiopen("inspect", "bundle", "--vendor-key", "keys/vendor.pub", cwd=folder).stdout
    assert "2 sealed, 6 open" in shown
    assert "verified, vendor key" in shown
    done = semiopen("verify", "bundle", "--vendor-key", "keys/vendor.pub", cwd=folder)
    assert done.returncode == 0
    assert "as signed by vendor key" in done.stdout


def test_compare_proves_equality_and_secrecy(folder):
    done = semiopen("compare", "bundle", MODEL, "--keys", "keys", "--max-new-tokens", "12", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tokens equal; no sealed weight in plain form." in done.stdout


def test_compare_fails_for_another_model(folder, tmp_path):
    """The control of the proof: with a changed original it must not say equal."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(-1)
    model.save_pretrained(tmp_path / "other")
    done = semiopen(
        "compare", folder / "bundle", tmp_path / "other", "--keys", folder / "keys", "--max-new-tokens", "12"
    )
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout


def test_compare_finds_a_sealed_weight_in_plain_form(folder, tmp_path, monkeypatch):
    """The control of the search: a copy of the original that appears among temporary files is found."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shutil.copyfile(MODEL / "model.safetensors", tmp_path / "leak")
    os.utime(tmp_path / "leak", (time.time() + 3600,) * 2)
    done = semiopen("compare", folder / "bundle", MODEL, "--keys", folder / "keys", "--max-new-tokens", "2")
    (tmp_path / "leak").unlink()  # or the next person's search finds it
    assert done.returncode == 1
    assert "leak holds" in " ".join(done.stdout.split())


def test_an_enclave_serves_several_commands(folder, story):
    socket = folder / "e.sock"
    command = [sys.executable, "-m", "semiopen.cli", "enclave", "bundle", "--keys", "keys", "--socket", str(socket)]
    enclave = subprocess.Popen(
        [*command, "--dtype", "float32"], cwd=folder, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert enclave.stderr is not None
        banner = ""
        while "Listening" not in banner:
            line = enclave.stderr.readline()
            assert line, banner
            banner += line
        assert "dev enclave: not a TEE" in banner
        for _ in range(2):
            done = semiopen(
                *("generate", "bundle", "--enclave", socket, "--prompt", "Once upon a time", "--max-new-tokens", "20"),
                *("--dtype", "float32", "--json"),
                cwd=folder,
            )
            assert json.loads(done.stdout)["tokens"] == story
    finally:
        enclave.send_signal(signal.SIGINT)
        assert enclave.wait(20) == 130
        enclave.stderr.close()
    assert not socket.exists()


def bad(sentence: str, *arguments: object, cwd: Path | None = None) -> None:
    """Run a command that must fail with exactly one line that has this sentence, and no traceback."""
    done = semiopen(*arguments, cwd=cwd)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "Error:" in line]
    assert len(lines) == 1, done.stderr
    assert sentence in lines[0]
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_sentence(folder, tmp_path):
    run = ("--keys", "keys", "--prompt", "Hi")
    semiopen("keygen", tmp_path / "other")
    bad("already exists", "keygen", "keys", cwd=folder)
    bad("already exists", "seal", MODEL, "--out", "bundle", "--keys", "keys", cwd=folder)
    bad("give 0 to 8", "seal", MODEL, "--out", tmp_path / "b", "--keys", "keys", "--prefix", "9", cwd=folder)
    bad("'best' is unknown", "seal", MODEL, "--out", tmp_path / "b", "--keys", "keys", "--preset", "best", cwd=folder)
    bad("neither a folder", "seal", tmp_path / "none", "--out", tmp_path / "b", "--keys", "keys", cwd=folder)
    bad("--keys FOLDER", "generate", "bundle", "--prompt", "Hi", cwd=folder)
    bad("not a bundle", "generate", MODEL, *run, cwd=folder)
    bad("vendor", "generate", "bundle", "--keys", tmp_path / "other", "--prompt", "Hi", cwd=folder)
    bad("shorten the prompt", "generate", "bundle", "--keys", "keys", "--prompt", "word " * 600, cwd=folder)
    bad("No enclave answers", "generate", "bundle", "--enclave", tmp_path / "no.sock", "--prompt", "Hi", cwd=folder)
    bad("vendor.pub", "verify", "bundle", "--vendor-key", "keys/sealing.key", cwd=folder)
    assert not (tmp_path / "b").exists()


def test_an_edited_bundle_is_refused_by_name(folder, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "bundle", bundle)
    manifest = json.loads((bundle / "semiopen.json").read_bytes())
    (bundle / "semiopen.json").write_text(json.dumps({**manifest, "num_layers": 9}))
    bad("semiopen.json", "generate", bundle, "--keys", folder / "keys", "--prompt", "Hi")
    bad("semiopen.json", "inspect", bundle)


def test_traceback_on_request(folder):
    command = [sys.executable, "-m", "semiopen.cli", "--traceback", "keygen", "keys"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_enclave_killed_in_mid_answer(folder):
    """The answer ends with a sentence, the exit status is not zero, and the next command works."""
    command = [sys.executable, "-m", "semiopen.cli", "generate", "bundle", "--keys", "keys", "--prompt", "Once"]
    running = subprocess.Popen(
        [*command, "--max-new-tokens", "500", "--temperature", "1"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert running.stdout is not None
    running.stdout.read(5)  # the answer has begun
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "Error: The enclave has stopped" in errors
    assert "Traceback" not in errors
    assert (
        semiopen(
            "generate", "bundle", "--keys", "keys", "--prompt", "Once", "--max-new-tokens", "2", cwd=folder
        ).returncode
        == 0
    )


def test_ctrl_c_leaves_no_enclave_behind(folder):
    command = [sys.executable, "-m", "semiopen.cli", "chat", "bundle", "--keys", "keys"]
    chat = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert chat.stderr is not None
    assert chat.stdin is not None
    while "/new starts over" not in chat.stderr.readline():
        pass
    (child,) = map(int, Path(f"/proc/{chat.pid}/task/{chat.pid}/children").read_text().split())
    chat.send_signal(signal.SIGINT)
    assert chat.wait(20) == 130
    chat.stderr.close()
    chat.stdin.close()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the enclave outlived its host")
