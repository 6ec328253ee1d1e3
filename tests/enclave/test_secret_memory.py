"""Secrets stay out of Python's heap, dumps, copies, children and messages, and are gone after `wipe`."""

import copy
import ctypes
import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semiopen.enclave import secret_memory
from semiopen.enclave.secret_memory import SecretBytes, read_secret
from semiopen.errors import EnclaveError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory is Linux's")

CONTENT = b"correct horse battery staple 32!"


@pytest.fixture(params=["best", "fallback", "unlocked"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The best memory of this kernel, and the two that stand in where it is refused."""
    if request.param != "best":
        monkeypatch.setattr(secret_memory, "_map_memfd_secret", lambda size: None)
    if request.param == "unlocked":
        monkeypatch.setattr(secret_memory._libc, "mlock", lambda address, size: -1)
    return request.param


def secret_with(content: bytes = CONTENT) -> SecretBytes:
    secret = SecretBytes(len(content))
    secret.view()[:] = content
    return secret


def address_of(secret: SecretBytes) -> int:
    assert secret._array is not None
    return ctypes.addressof(secret._array)


def mapping_at(address: int) -> str:
    """The flags of the mapping there, empty where nothing is mapped."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        start, end = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return block.split("VmFlags:")[1].split("\n")[0]
    return ""


def pipe_with(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def test_kind_says_which_memory(memory: str) -> None:
    with SecretBytes(32) as secret:
        if memory == "best":
            assert secret.kind in ("memfd_secret", "locked", "not locked")
        else:
            assert secret.kind in (("locked", "not locked") if memory == "fallback" else ("not locked",))


def test_starts_as_zeros_and_holds_what_is_written(memory: str) -> None:
    with SecretBytes(5000) as secret:
        assert len(secret) == len(secret.view()) == 5000
        assert secret.view() == bytes(5000)
        secret.view()[4990:4995] = b"hello"
        assert secret.view()[4990:4995] == b"hello"


def test_memory_is_left_out_of_dumps(memory: str) -> None:
    with SecretBytes(32) as secret:
        flags = mapping_at(address_of(secret)).split()
        assert "dd" in flags
        assert ("lo" in flags) == (secret.kind != "not locked")


def test_wipe_clears_the_content_and_unmaps(memory: str) -> None:
    secret = secret_with()
    address, view = address_of(secret), secret.view()
    assert view == CONTENT  # the control
    secret.wipe()
    assert view == bytes(len(CONTENT))
    assert mapping_at(address)  # a held view is never left dangling
    view.release()
    gc.collect()
    assert not mapping_at(address)
    secret.wipe()  # again does nothing


def test_wipe_overwrites_physically() -> None:
    # Read past Python, in the fallback: the kernel refuses /proc/self/mem for memfd_secret.
    code = """
import os, ctypes
from semiopen.enclave import secret_memory
secret_memory._map_memfd_secret = lambda size: None
secret = secret_memory.SecretBytes.copy_of(b"s3cret")
address, view = ctypes.addressof(secret._array), secret.view()
memory = os.open("/proc/self/mem", os.O_RDONLY)
before = os.pread(memory, 6, address).decode()
secret.wipe()
tell([before, list(os.pread(memory, 6, address))])
"""
    assert in_child(code) == ["s3cret", [0] * 6]


def test_memfd_secret_is_refused_to_proc_mem() -> None:
    secret = secret_with()
    if secret.kind != "memfd_secret":
        pytest.skip("this kernel has no memfd_secret")
    ordinary = ctypes.create_string_buffer(CONTENT)
    with Path("/proc/self/mem").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), len(CONTENT), ctypes.addressof(ordinary)) == CONTENT  # the control
        with pytest.raises(OSError):
            os.pread(file.fileno(), len(CONTENT), address_of(secret))
    secret.wipe()


def test_context_manager_wipes(memory: str) -> None:
    with secret_with() as secret:
        view = secret.view()
    assert view == bytes(len(CONTENT))
    with pytest.raises(ValueError, match="wiped"):
        secret.view()


def test_forgotten_secret_is_unmapped(memory: str) -> None:
    secret = secret_with()
    address = address_of(secret)
    del secret
    gc.collect()
    assert not mapping_at(address)


def test_no_descriptor_stays_open(memory: str) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with SecretBytes(32):
        assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_texts_do_not_show_the_content(memory: str) -> None:
    secret = secret_with()
    for text in (repr(secret), str(secret), f"{secret}", f"{secret!r:>80}", "%s" % secret):  # noqa: UP031
        assert "correct" not in text and CONTENT.hex() not in text
    assert repr(secret) == f"<SecretBytes: 32 bytes, {secret.kind}>"
    secret.wipe()
    assert repr(secret) == "<SecretBytes: 32 bytes, wiped>"


@pytest.mark.parametrize("action", [copy.copy, copy.deepcopy, pickle.dumps, bytes, list, json.dumps, vars])
def test_copies_are_refused(action: Any) -> None:
    with secret_with() as secret, pytest.raises(TypeError) as refusal:
        action(secret)
    assert "correct" not in str(refusal.value)


@pytest.mark.parametrize("length", [0, -1])
def test_length_must_be_positive(length: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        SecretBytes(length)


def test_copy_of_takes_bytes_of_a_library(memory: str) -> None:
    with SecretBytes.copy_of(CONTENT) as secret:
        assert secret.view() == CONTENT


def test_ciphers_take_the_view_without_a_copy() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    with secret_with() as secret:
        sealed = AESGCM(secret.view()).encrypt(bytes(12), b"text", None)
    assert AESGCM(CONTENT).decrypt(bytes(12), sealed, None) == b"text"


# --- From a pipe --------------------------------------------------------------------------------------------


def test_read_secret_takes_exactly_the_length(memory: str) -> None:
    reading = pipe_with(CONTENT + b"next")
    with read_secret(reading, len(CONTENT), close=False) as secret:
        assert secret.view() == CONTENT
    assert os.read(reading, 10) == b"next"
    os.close(reading)


def test_read_secret_waits_for_all_parts() -> None:
    code = """
import os, time
from semiopen.enclave.secret_memory import read_secret
reading, writing = os.pipe()
if os.fork() == 0:
    for part in (b"one", b"two", b"three"):
        os.write(writing, part)
        time.sleep(0.02)
    os._exit(0)
os.close(writing)
with read_secret(reading, 11) as secret:
    tell(bytes(secret.view()).decode())
"""
    assert in_child(code) == "onetwothree"


def test_short_input_is_refused_without_its_content(memory: str) -> None:
    reading = pipe_with(b"hunter2")
    with pytest.raises(EnclaveError, match=r"ended after 7 of 32 bytes; send all") as refusal:
        read_secret(reading, 32)
    assert refusal.value.code == "secret"
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(OSError):
        os.fstat(reading)  # closed also on failure


def test_unreadable_descriptor_is_refused() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with pytest.raises(EnclaveError, match="could not be read: Bad file descriptor"):
            read_secret(writing, 32)
    finally:
        with pytest.raises(OSError):
            os.close(writing)


# --- A forked child -----------------------------------------------------------------------------------------


def in_child(code: str) -> Any:
    prelude = "import json, os\ndef tell(result): os.write(1, json.dumps(result).encode())\n"
    child = subprocess.run([sys.executable, "-I", "-c", prelude + code], capture_output=True, timeout=100)
    assert child.returncode == 0, child.stderr.decode()
    return json.loads(child.stdout)


FORK = """
import gc, signal
from semiopen.enclave import secret_memory
if {fallback}:
    secret_memory._map_memfd_secret = lambda size: None
ordinary = bytearray(b"s3cret")
secret = secret_memory.SecretBytes.copy_of(ordinary)
view = secret.view()
reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        secret.view()
    except ValueError:
        os.write(writing, b"refused,")
    secret.wipe()
    os.write(writing, b"wiped," + bytes(ordinary) + b",")
    os.write(writing, view.tobytes())
    os._exit(0)
status = os.waitpid(pid, 0)[1]
os.close(writing)
child = os.read(reading, 100).decode()
tell([child, os.WTERMSIG(status), bytes(view).decode(), secret.kind])
"""


@pytest.mark.parametrize("fallback", [False, True])
def test_forked_child_gets_nothing(fallback: bool) -> None:
    child, killed_by, in_parent, kind = in_child(FORK.format(fallback=fallback))
    assert child.startswith("refused,wiped,s3cret,")  # the ordinary copy went along: the control
    in_child_view = child.split(",")[3]
    if kind == "memfd_secret":
        assert (killed_by, in_child_view) == (signal.SIGSEGV, "")  # not mapped there
    else:
        assert (killed_by, in_child_view) == (0, "\0" * 6)
    assert in_parent == "s3cret"  # the child's wipe did not reach the parent


def test_works_after_both_stages_of_hardening() -> None:
    code = """
from semiopen.enclave import hardening
from semiopen.enclave.secret_memory import SecretBytes, read_secret
out = os.dup(1)
reading, writing = os.pipe()
os.write(writing, b"s3cret")
hardening.harden_start()
hardening.harden_running()
secret = read_secret(reading, 6)
result = [secret.kind, bytes(secret.view()).decode()]
secret.wipe()
os.write(out, json.dumps(result).encode())
"""
    kind, content = in_child(code)
    with SecretBytes(1) as here:
        assert kind == here.kind
    assert content == "s3cret"
