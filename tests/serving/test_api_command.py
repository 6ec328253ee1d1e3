"""`semiopen serve` as a person runs it: banner, crash of the enclave, the end; and what it refuses to begin with."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import httpx
import psutil
import pytest

from semiopen.errors import BundleError, SemiopenError
from semiopen.host.serving import launch
from semiopen.host.serving.server import listen
from tests.serving.running_server import MODEL
from tests.test_cli import semiopen

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = "Once upon a time, there was a xyzzy"


class Command:
    """A running `semiopen serve`, and what it has printed so far."""

    def __init__(self, *arguments: object, env: Mapping[str, str] = ENVIRONMENT) -> None:
        command = [sys.executable, "-m", "semiopen.cli", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.printed = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.printed += line

    def url(self) -> str:
        """Where it serves, once it does."""
        end = time.monotonic() + 60
        while not (found := re.search(r"at (http://\S+)/v1", self.printed)):
            assert self.process.poll() is None and time.monotonic() < end, self.printed
            time.sleep(0.02)
        return found[1]

    def enclaves(self) -> list[psutil.Process]:
        """The enclave's process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "semiopen.enclave" in child.cmdline()]

    def end(self) -> int:
        """Ask it to end, and wait."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


def ask(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 5, **fields})


def test_serve_survives_its_enclave_and_ends_clean(stories_bundle, keys):
    command = Command(stories_bundle, "--keys", keys, "--dtype", "float32", "--grace", "5")
    try:
        with httpx.Client(base_url=command.url(), timeout=30) as client:
            before = ask(client).json()
            assert before["model"] == "bundle"
            assert re.fullmatch("fp_[0-9a-f]{16}", before["system_fingerprint"])
            assert "dev enclave: not a TEE" in command.printed
            assert "temperature 0.7" in command.printed
            with client.stream(
                "POST",
                "/v1/completions",
                json={
                    "prompt": PROMPT,
                    "max_tokens": 450,
                    "ignore_eos": True,
                    "stream": True,
                },
            ) as stream:
                lines = stream.iter_lines()
                next(lines)
                (enclave,) = command.enclaves()
                enclave.kill()
                last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
            statuses = set()
            end = time.monotonic() + 30
            while client.get("/health").status_code != 200:
                statuses.add(ask(client).status_code)
                assert time.monotonic() < end, command.printed
                time.sleep(0.05)
            assert statuses <= {200, 503}
            assert ask(client).json()["choices"] == before["choices"]
            (enclave,) = command.enclaves()
    finally:
        status = command.end()
    assert status == 128 + signal.SIGTERM
    assert not enclave.is_running()
    assert "Traceback" not in command.printed
    assert "xyzzy" not in command.printed


def test_nothing_stays_behind_when_serve_is_ended_while_it_starts(stories_bundle, keys):
    command = Command(stories_bundle, "--keys", keys)
    end = time.monotonic() + 30
    while not (enclaves := command.enclaves()):
        assert command.process.poll() is None and time.monotonic() < end, command.printed
        time.sleep(0.02)
    assert command.end() == 128 + signal.SIGTERM
    assert "Traceback" not in command.printed
    for enclave in enclaves:
        enclave.wait(10)


def test_serve_says_what_is_missing(stories_bundle, keys, tmp_path, monkeypatch):
    done = semiopen("serve", stories_bundle)
    assert done.returncode == 1
    assert "Give --keys FOLDER" in done.stderr
    done = semiopen("serve", tmp_path, "--keys", keys)
    assert "is not a bundle" in done.stderr
    for name in ("launch", "server"):
        monkeypatch.delitem(sys.modules, f"semiopen.host.serving.{name}")
        monkeypatch.delattr(f"semiopen.host.serving.{name}")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = semiopen("serve", stories_bundle, "--keys", keys)
    assert done.returncode == 1
    assert "pip install 'semiopen[serve]'" in done.stderr


def test_serve_refuses_before_the_engine_starts(stories_bundle, keys, tmp_path):
    with pytest.raises(BundleError):
        launch.prepare(launch.Options(MODEL, keys, None))
    with pytest.raises(OSError, match="No such file"):
        launch.prepare(launch.Options(stories_bundle, keys, None, chat_template=tmp_path / "none.jinja"))
    with pytest.raises(SemiopenError, match="No enclave answers"):
        launch.prepare(launch.Options(stories_bundle, None, tmp_path / "none.sock", port=0))
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="give another --port"):
            launch.prepare(launch.Options(stories_bundle, keys, None, port=taken.getsockname()[1]))


def test_help_has_an_example():
    done = semiopen("serve", "--help")
    assert "semiopen serve my-bundle --keys vendor-keys" in " ".join(done.stdout.split())


def test_api_keys_do_not_show():
    assert "hidden" not in repr(launch.Options(MODEL, None, None, api_keys=("hidden",)))


def test_the_models_sampling_defaults_are_read(tmp_path):
    assert launch.sampling_defaults(MODEL) == {"temperature": 0.7, "top_p": 0.9}
    assert launch.sampling_defaults(tmp_path) == {}
