"""Attacks through shared memory: it changes while the enclave reads it, and the host tries to take it away."""

import ctypes
import fcntl
import mmap
import os
import threading

import numpy as np
import pytest
import torch

from semiopen.enclave.prefix import Prefix
from semiopen.enclave.trusted_state import Limits, check_step
from semiopen.protocol.channel import Layout, SharedArrays, create_shared_memory
from semiopen.protocol.messages import Failed, Step, Stepped
from tests.adversary.lying_host import (
    HISTORY,
    NEXT,
    SEQUENCES,
    STEP_ATTACKS,
    STEP_TOKENS,
    LyingHost,
    honest_states,
)

LAYOUT = Layout(STEP_TOKENS, SEQUENCES, 16, False, 1, 256, 32, torch.float32)
LIMITS = Limits(
    max_kv_tokens=65536,
    max_step_tokens=8192,
    max_sequences=512,
    max_sessions=64,
    context=256,
    vocab_size=199,
    windows=(0,),
    head="open",
    max_rows=512,
    max_logits=1 << 26,
    max_history=1 << 22,
)
INPUTS = ("token_ids", "query_start", "seq_lens", "block_tables", "copies")
CHECKED_CODES = {"shape", "token", "context", "block", "position"}


class ChangesAfterOneLook:
    """Shared memory of a host with perfect timing: each array is honest when first looked at, hostile after."""

    def __init__(self, honest: SharedArrays, late: str) -> None:
        self._honest, self._late, self.looks = honest, late, dict.fromkeys(INPUTS, 0)

    def __getattr__(self, name: str) -> np.ndarray:
        array = getattr(self._honest, name)
        self.looks[name] += 1
        if name == self._late and self.looks[name] > 1:
            return np.full_like(array, 2**31 - 1)
        return array


@pytest.mark.parametrize("late", INPUTS)
def test_each_array_is_read_once(late):
    descriptor = create_shared_memory(LAYOUT)
    arrays = SharedArrays(descriptor, LAYOUT)
    os.close(descriptor)
    host = LyingHost.__new__(LyingHost)
    host.arrays = arrays
    step = NEXT.but(copies=[(0, 3)])
    host.lay_out(step)
    request = Step(**{k: v for k, v in step.message().items() if k != "kind"})
    changing = ChangesAfterOneLook(arrays, late)
    checked = check_step(request, changing, LAYOUT, LIMITS, blocks=8)  # type: ignore[arg-type]
    assert changing.looks == dict.fromkeys(INPUTS, 1)
    for name in INPUTS:
        assert not np.shares_memory(getattr(checked, name), getattr(arrays, name))


def test_arrays_that_change_between_check_and_use(enclave, unharmed, monkeypatch):
    """The host rewrites everything at the worst moment: after the check, before the first layer."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        honest = host.states(NEXT)
        run = Prefix.run

        def rewrite_then_run(self, step, cache):
            for name in (*INPUTS, "hidden"):
                getattr(host.arrays, name)[...] = 2**31 - 1
            return run(self, step, cache)

        monkeypatch.setattr(Prefix, "run", rewrite_then_run)
        assert torch.equal(host.states(NEXT), honest)
        monkeypatch.undo()
        assert torch.equal(host.states(NEXT), honest)
    unharmed(enclave.path)


class Rewriter:
    """A thread that writes honest and hostile values over all inputs in shared memory until it is stopped."""

    def __init__(self, host: LyingHost) -> None:
        self._host, self._stop = host, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        random = np.random.default_rng(3)
        attacks = [attack for _, attack in STEP_ATTACKS.values()]
        arrays = self._host.arrays
        assert arrays is not None
        while not self._stop.is_set():
            match random.integers(3):
                case 0:
                    self._host.lay_out(NEXT)
                case 1:
                    self._host.lay_out(attacks[random.integers(len(attacks))])
                case 2:
                    array = getattr(arrays, INPUTS[random.integers(len(INPUTS))])
                    array[...] = random.integers(-(2**31), 2**31, size=array.shape)


def steps_over_moving_memory(host: LyingHost, count: int) -> tuple[int, int]:
    """Send steps while the memory is rewritten; return how many were taken and how many refused."""
    taken = refused = 0
    for _ in range(count):
        reply = host.ask(NEXT.message())
        if isinstance(reply, Failed):
            assert reply.code in CHECKED_CODES, reply
            refused += 1
        else:
            assert isinstance(reply, Stepped)
            taken += 1
    return taken, refused


def test_memory_rewritten_while_steps_run(enclave, exact, unharmed):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        taken = refused = 0
        with Rewriter(host):
            for _ in range(8):
                more = steps_over_moving_memory(host, 60)
                taken, refused = taken + more[0], refused + more[1]
                assert torch.equal(honest_states(enclave.path), exact)
        assert refused > 50
    unharmed(enclave.path)


def test_result_is_in_nobody_elses_memory(enclave, unharmed):
    """A session's memory starts as zeros, and a step writes its own rows of `hidden` and nothing else."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
    with LyingHost(enclave.path) as host:
        host.open()
        assert host.arrays is not None
        for name in (*INPUTS, "hidden"):
            assert not getattr(host.arrays, name).any()
        host.arrays.hidden[...] = 7
        host.states(HISTORY)
        assert (host.arrays.hidden[len(HISTORY.token_ids) :] == 7).all()
    unharmed(enclave.path)


# --- The descriptor ---


@pytest.fixture
def host(enclave):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        yield host


def test_memory_cannot_be_resized(host, enclave, unharmed):
    """A file cut short under a mapping kills the process that touches it."""
    descriptor = host.descriptors[0]
    size = os.fstat(descriptor).st_size
    for length in (0, 1, 4096, size - 1, size + 1, size + 4096, 2**40):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, length)
    with pytest.raises(PermissionError):
        os.posix_fallocate(descriptor, size, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", size)
    path = f"/proc/self/fd/{descriptor}"
    with pytest.raises(PermissionError):
        os.open(path, os.O_RDWR | os.O_TRUNC)
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    assert os.fstat(descriptor).st_size == size
    host.states(NEXT)
    host.close()
    unharmed(enclave.path)


def test_seals_cannot_be_added(host, enclave, unharmed):
    """A seal against writing would make the enclave's next mapping or write fail."""
    descriptor = host.descriptors[0]
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == wanted
    for seal in (fcntl.F_SEAL_WRITE, 0x10):  # 0x10: F_SEAL_FUTURE_WRITE
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
    host.states(NEXT)
    host.close()
    unharmed(enclave.path)


def test_pages_punched_out_of_the_memory(host, enclave, unharmed):
    """Pages that the host gives back come again as zeros; the enclave refuses or goes on, and does not fault."""
    libc = ctypes.CDLL(None, use_errno=True)
    honest = host.states(NEXT)
    descriptor = host.descriptors[0]
    for _ in range(20):
        keep_size_and_punch = 0x01 | 0x02
        size = ctypes.c_long(os.fstat(descriptor).st_size)
        assert libc.fallocate(descriptor, keep_size_and_punch, ctypes.c_long(0), size) == 0
        reply = host.ask(NEXT.message())
        assert isinstance(reply, Failed)
        assert reply.code == "shape"
        assert torch.equal(host.states(NEXT), honest)
    host.close()
    unharmed(enclave.path)


def test_memory_unmapped_and_closed_by_the_host(host, enclave, unharmed):
    host.lay_out(NEXT)
    host.arrays = None
    os.close(host.descriptors.pop())
    assert isinstance(host.ask(NEXT.message()), Stepped)
    host.close()
    unharmed(enclave.path)


def test_memory_outlives_the_session_without_harm(enclave, unharmed):
    """A host that keeps the memory of a closed session sees nothing of later sessions in it."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        kept = os.dup(host.descriptors[0])
    with mmap.mmap(kept, os.fstat(kept).st_size) as memory:
        before = memory[:]
        unharmed(enclave.path)
        assert memory[:] == before
        memory[:] = b"\xff" * len(memory)
    os.close(kept)
    unharmed(enclave.path)
