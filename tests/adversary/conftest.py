"""One sealed model for all attacks, an enclave in a thread, and the proof that it still serves honest hosts."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import semiopen
from tests.adversary.lying_host import PATIENCE, expected_states, honest_states, status
from tests.conftest import EnclaveThreads, InProcessEnclave
from tests.models import save_random_model

PREFIX = 2


@dataclass(frozen=True)
class Sealed:
    """A bundle, the keys that open it, and the model that it was made of."""

    bundle: Path
    keys: Path
    original: PreTrainedModel


@pytest.fixture(autouse=True)
def _no_test_waits_forever() -> Iterator[None]:
    """An enclave that hangs fails a test, and does not stop the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    yield
    socket.setdefaulttimeout(before)


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Sealed:
    """A tiny random model, two of its four blocks sealed."""
    folder = tmp_path_factory.mktemp("adversary")
    original = save_random_model("llama", folder / "model")
    semiopen.seal(folder / "model", folder / "bundle", keys, prefix=PREFIX)
    return Sealed(folder / "bundle", keys, original)


@pytest.fixture(scope="module")
def enclave(enclave_threads: EnclaveThreads, sealed: Sealed) -> InProcessEnclave:
    """An enclave in a thread, shared by the attacks of one file."""
    return enclave_threads.start(sealed.bundle, sealed.keys)


@pytest.fixture(scope="session")
def exact(enclave_threads: EnclaveThreads, sealed: Sealed) -> torch.Tensor:
    """What `honest_states` must return, bit for bit: an untouched enclave's answer, itself held to the original."""
    states = honest_states(enclave_threads.start(sealed.bundle, sealed.keys).path)
    torch.testing.assert_close(states, expected_states(sealed.original, PREFIX), atol=1e-4, rtol=1e-4)
    return states


Unharmed = Callable[[Path], None]


@pytest.fixture(scope="session")
def unharmed(exact: torch.Tensor) -> Unharmed:
    """Fails unless the enclave at a path serves an honest host exactly, and holds no session of anybody else."""

    def check(path: Path) -> None:
        assert torch.equal(honest_states(path), exact)
        until(lambda: status(path).sessions == 0, "the enclave keeps sessions of hosts that are gone")
        assert status(path).kv_tokens == 0

    return check


def until(condition: Callable[[], bool], failure: str, seconds: float = PATIENCE) -> None:
    """Wait for something that another process or thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)
