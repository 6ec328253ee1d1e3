"""Attacks on a real enclave process: what it inherits, how it starts, how it ends, and everything else once more.

The attacks of the other files run against the server in a thread; here the same bytes meet the hardened process,
where a first import or a file opened by an error path would fail.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import semiopen
from semiopen.bundle.keys import load_sealing_key
from semiopen.errors import EnclaveError
from semiopen.host import enclave_process
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.protocol.messages import Hello, Status, StatusIs, Welcome
from tests.adversary.conftest import Sealed, until
from tests.adversary.lying_host import (
    BAD_PAYLOADS,
    BAD_STREAMS,
    HISTORY,
    NEXT,
    STEP_ATTACKS,
    LyingHost,
    code_of,
    honest_states,
)
from tests.adversary.test_framing import STATUS
from tests.adversary.test_shared_memory import Rewriter, steps_over_moving_memory

SECRET = "secret-of-the-parent-4711"
GREEDY = {"max_new_tokens": 20, "do_sample": False}
PROMPT = torch.tensor([[5, 17, 120, 44, 9, 30]])


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary folder of everything in this file: what is left in it is seen."""
    folder = tmp_path_factory.mktemp("t")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = before


def start_with_secrets_around(sealed: Sealed) -> EnclaveProcess:
    """Start an enclave whose parent holds secrets in its environment and descriptors that children inherit."""
    read_end, write_end = os.pipe()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        for name in ("API_TOKEN", "LD_AUDIT_TOKEN", "PYTHONSTARTUP", "SEMIOPEN_SEALING_KEY", "HOME"):
            patch.setenv(name, SECRET)
        for descriptor in (read_end, write_end, file.fileno()):
            os.set_inheritable(descriptor, True)
        enclave = EnclaveProcess(sealed.bundle, sealed.keys, threads=1)
    enclave.wait_ready()
    os.close(write_end)
    os.set_blocking(read_end, False)
    assert os.read(read_end, 1) == b"", "the enclave holds its parent's pipe"
    os.close(read_end)
    return enclave


@pytest.fixture(scope="module")
def started() -> Iterator[list[EnclaveProcess]]:
    """Enclaves of this file, the last of which may be running."""
    enclaves: list[EnclaveProcess] = []
    yield enclaves
    for enclave in enclaves:
        enclave.close()


@pytest.fixture
def process(sealed, temporary, started) -> EnclaveProcess:
    """An enclave that the tests of this file share, until one of them ends it."""
    if not started or not started[-1].running():
        started.append(start_with_secrets_around(sealed))
    return started[-1]


def proc(pid: int, name: str) -> bytes:
    """A file of a process in /proc; the test is skipped where this user may not read it."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except PermissionError:
        pytest.skip(f"/proc/PID/{name} of the enclave is readable by root only")


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def resident(pid: int) -> int:
    """Bytes of memory that a process really uses."""
    return int(proc(pid, "statm").split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors(pid: int) -> list[str]:
    """What kinds of things a process's descriptors are, sorted."""
    try:
        targets = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except PermissionError:
        pytest.skip("/proc/PID/fd of the enclave is readable by root only")
    return sorted(target.partition(":")[0] for target in targets)


# Standard output and error; the selector; the lifeline; the listener. A connection is one socket more.
IDLE = ["/dev/null", "/dev/null", "anon_inode", "pipe", "socket"]


def files_in(folder: Path) -> list[Path]:
    """All that lies in a folder, at any depth, but folders."""
    return [path for path in folder.rglob("*") if not path.is_dir()]


# --- What it inherits and shows ---


def test_environment_is_not_inherited(process):
    environment = proc(process.pid, "environ")
    assert SECRET.encode() not in environment
    names = {variable.partition(b"=")[0] for variable in environment.split(b"\0") if variable}
    assert names <= {b"PATH", b"LANG", b"GOMP_SPINCOUNT", b"HF_HUB_OFFLINE", b"OMP_NUM_THREADS", b"GLIBC_TUNABLES"}


def test_descriptors_are_not_inherited(process):
    until(lambda: descriptors(process.pid) == IDLE, "the enclave holds other descriptors than its own", 5)


def test_no_secret_in_arguments_or_environment(process, sealed):
    key = load_sealing_key(sealed.keys)
    weights = sealed.original.model.layers[0].mlp.down_proj.weight.detach().numpy().tobytes()
    shown = proc(process.pid, "cmdline") + proc(process.pid, "environ")
    for secret in (key, key.hex().encode(), weights[:16], weights[-16:], str(sealed.keys).encode()):
        assert secret not in shown


def test_socket_is_for_this_user_alone(process):
    assert stat.S_IMODE(process.socket_path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(process.socket_path.parent.stat().st_mode) == 0o700


def test_only_the_socket_lies_on_the_disk(process, temporary):
    assert files_in(temporary) == [process.socket_path]


# --- The attacks of the other files ---


def test_bad_messages_and_streams(process, unharmed):
    with LyingHost(process.socket_path) as host:
        for payload in BAD_PAYLOADS.values():
            assert code_of(host.ask(payload)) == "message"
    for stream in BAD_STREAMS.values():
        with LyingHost(process.socket_path) as host:
            host.send(stream)
            assert code_of(host.replies()[-1]) == "frame"
    unharmed(process.socket_path)


def test_hostile_steps(process, unharmed):
    with LyingHost(process.socket_path) as host:
        host.open().states(HISTORY)
        honest = host.states(NEXT)
        host.close()
    with LyingHost(process.socket_path) as host:
        host.open().states(HISTORY)
        for code, attack in STEP_ATTACKS.values():
            assert code_of(host.step(attack)) == code
        assert torch.equal(host.states(NEXT), honest)
    unharmed(process.socket_path)


def test_flood_and_storm(process, unharmed):
    for _ in range(100):
        LyingHost(process.socket_path).close()
    with LyingHost(process.socket_path) as host, pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(1000):
            host.socket.sendall(STATUS * 1000)
    unharmed(process.socket_path)


def test_memory_rewritten_while_steps_run(process, exact, unharmed):
    """Here the two sides really run at the same time."""
    with LyingHost(process.socket_path) as host:
        host.open().states(HISTORY)
        taken = refused = 0
        with Rewriter(host):
            for _ in range(5):
                more = steps_over_moving_memory(host, 60)
                taken, refused = taken + more[0], refused + more[1]
                assert torch.equal(honest_states(process.socket_path), exact)
        assert refused > 20
    unharmed(process.socket_path)


def test_descriptors_pressed_on_the_enclave_are_not_taken(process, unharmed):
    with LyingHost(process.socket_path) as host:
        for _ in range(10):
            socket.send_fds(host.socket, [STATUS], [host.socket.fileno()] * 100)
            assert isinstance(host.reply(), StatusIs)
        until(lambda: descriptors(process.pid) == [*IDLE, "socket"], "the enclave took a descriptor", 5)
    unharmed(process.socket_path)


def test_bytes_on_the_lifeline_are_ignored(process, unharmed):
    process._process.stdin.write(b"\0" * 100 + BAD_STREAMS["HTTP"])
    process._process.stdin.flush()
    unharmed(process.socket_path)


def test_memory_and_descriptors_do_not_grow(process, unharmed):
    """Sessions of 1000 blocks, whose ledger alone is 128 KB: half of them kept would show."""

    def cycle() -> None:
        with LyingHost(process.socket_path) as host:
            host.open(blocks=1000).states(HISTORY)
            host.step(STEP_ATTACKS["read of blocks never written"][1])

    for _ in range(20):
        cycle()
    before = resident(process.pid)
    for _ in range(200):
        cycle()
    unharmed(process.socket_path)
    assert resident(process.pid) - before < 10 * 2**20
    until(lambda: descriptors(process.pid) == IDLE, "the enclave keeps descriptors of hosts that are gone", 5)


# --- How it starts ---


def refused_start(bundle: Path, keys: Path) -> str:
    """Start an enclave that must refuse; return its one sentence."""
    enclave = EnclaveProcess(bundle, keys, threads=1)
    with pytest.raises(EnclaveError) as caught:
        enclave.wait_ready()
    assert not enclave.running()
    assert is_gone(enclave.pid)
    assert caught.value.code == "start"
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    enclave.close()  # safe to call again
    return message


def test_wrong_sealing_key(sealed, process, temporary, tmp_path):
    keys = tmp_path / "keys"
    shutil.copytree(sealed.keys, keys)
    wrong = os.urandom(32).hex()
    (keys / "sealing.key").write_text(wrong)
    message = refused_start(sealed.bundle, keys)
    assert "sealed/prefix-00001" in message
    for secret in (wrong, load_sealing_key(sealed.keys).hex()):
        assert secret not in message
    assert files_in(temporary) == [process.socket_path]


def test_damaged_bundle(sealed, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(sealed.bundle, bundle)
    (file,) = (bundle / "sealed").iterdir()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert f"sealed/{file.name}" in refused_start(bundle, sealed.keys)


class DiesAtOnce(subprocess.Popen):
    """A Python that is broken, and gone before anyone can write to it."""

    def __init__(self, _: list[str], **options: object) -> None:
        super().__init__([sys.executable, "-I", "-S", "-c", "raise SystemExit('it is broken')"], **options)
        self.wait()


def test_process_that_dies_at_once(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(enclave_process.subprocess, "Popen", DiesAtOnce)
    enclave = EnclaveProcess(sealed.bundle, sealed.keys)
    try:
        with pytest.raises(EnclaveError, match=r"ended with status 1 before it was ready: it is broken\.$"):
            enclave.wait_ready()
        assert list(tmp_path.iterdir()) == []
    finally:
        for stream in (enclave._process.stdout, enclave._messages):
            stream.close()


def test_temporary_folder_with_too_long_a_name(sealed, tmp_path, monkeypatch):
    """The name of a Unix socket has at most 107 bytes."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(EnclaveError, match="cannot listen at") as caught:
        EnclaveProcess(sealed.bundle, sealed.keys)
    assert "None" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_socket_path_that_is_taken(sealed, tmp_path):
    """Nothing that lies there is removed or replaced."""
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(EnclaveError, match="cannot listen at"):
        EnclaveProcess(sealed.bundle, sealed.keys, socket_path=taken)
    assert taken.read_text() == "mine"


# --- How it ends ---


class AfterFiveTokens:
    """A transformers streamer that tells when generation is under way, and slows it down."""

    def __init__(self) -> None:
        self.reached, self._count = threading.Event(), 0

    def put(self, _: torch.Tensor) -> None:
        self._count += 1
        if self._count > 5:
            self.reached.set()
            time.sleep(0.01)

    def end(self) -> None:
        self.reached.set()


def result_of(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run a call in a thread; the list gets its result or its exception."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_killed_while_generating_then_loaded_again(sealed, process, temporary):
    original = sealed.original.generate(PROMPT, **GREEDY)
    enclave = EnclaveProcess(sealed.bundle, sealed.keys, threads=1)
    enclave.wait_ready()
    model = semiopen.load(sealed.bundle, enclave=enclave.socket_path)
    streamer = AfterFiveTokens()
    long = {**GREEDY, "max_new_tokens": 240, "eos_token_id": None}
    thread, found = result_of(lambda: model.generate(PROMPT, **long, streamer=streamer))
    assert streamer.reached.wait(20)
    os.kill(enclave.pid, signal.SIGKILL)
    thread.join(20)
    (error,) = found
    assert isinstance(error, EnclaveError)
    assert error.code == "gone"
    assert "stopped" in str(error)
    with pytest.raises(EnclaveError, match="stopped"):
        model.generate(PROMPT, **GREEDY)
    model.enclave.close()
    enclave.close()

    again = semiopen.load(sealed.bundle, keys=sealed.keys, threads=1)
    beside = semiopen.load(sealed.bundle, enclave=process.socket_path)  # two models, two enclaves, at once
    for _ in range(2):
        assert torch.equal(again.generate(PROMPT, **GREEDY), original)
        assert torch.equal(beside.generate(PROMPT, **GREEDY), original)
    again.enclave.close()
    assert torch.equal(beside.generate(PROMPT, **GREEDY), original)
    beside.enclave.close()
    assert files_in(temporary) == [process.socket_path]


def test_lifeline_closed_with_a_session_open(process):
    client = EnclaveClient(process.socket_path)
    with LyingHost(process.socket_path) as host:
        host.open().states(HISTORY)
        process._process.stdin.close()
        until(lambda: not process.running(), "the enclave outlives its lifeline")
        assert process._process.returncode == 0
        assert host.reply() is None
    with pytest.raises(EnclaveError, match="stopped"):
        client.status()
    client.close()
    process.close()
    assert not process.socket_path.parent.exists()


PARENT = """
import sys, time
from pathlib import Path
from semiopen.host.enclave_process import EnclaveProcess
bundle, keys = map(Path, sys.argv[1:])
enclave = EnclaveProcess(bundle, keys, threads=1)
enclave.wait_ready()
print(enclave.pid, enclave.socket_path, flush=True)
time.sleep(600)
"""


def test_parent_killed(sealed, tmp_path):
    """Nobody is left to close anything."""
    command = [sys.executable, "-c", PARENT, str(sealed.bundle), str(sealed.keys)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        pid, path = parent.stdout.readline().decode().split()
        with LyingHost(Path(path)) as host:
            assert isinstance(host.ask(Hello()), Welcome)
            assert isinstance(host.ask(Status()), StatusIs)
            parent.kill()
            assert host.reply() is None
        until(lambda: is_gone(int(pid)), "the enclave outlives its parent")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
