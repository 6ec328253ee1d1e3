"""Keys, sealed models and enclaves for the tests.

`inprocess_enclave` runs the enclave's own server in a thread behind a real socket: quick, without the hardening of
a process. Tests of the process itself start one with `semiopen.host.enclave_process`.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from transformers import PreTrainedModel
from transformers.utils import logging

import semiopen
from semiopen.bundle.keys import load_sealing_key, load_vendor_key
from semiopen.enclave.__main__ import _build
from semiopen.enclave.secret_memory import SecretBytes
from semiopen.enclave.server import Server
from semiopen.protocol.messages import Provision
from semiopen.vendor.keys import generate_keys
from tests.models import save_random_model

logging.disable_progress_bar()
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vendor's key folder."""
    folder = tmp_path_factory.mktemp("vendor") / "keys"
    generate_keys(folder)
    return folder


@dataclass
class InProcessEnclave:
    """A server thread, the socket it listens on, and the server itself for a test to look into."""

    path: Path
    server: Server


class EnclaveThreads:
    """Starts enclaves in threads and ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[InProcessEnclave] = []
        self._ends: list[tuple[int, threading.Thread, socket.socket]] = []

    def start(
        self,
        bundle: Path,
        keys: Path,
        dtype: torch.dtype = torch.float32,
        max_kv_tokens: int = 65536,
        lease: str | None = None,
        meter: Path | None = None,
    ) -> InProcessEnclave:
        provision = Provision(
            bundle=str(bundle),
            vendor_key=load_vendor_key(keys).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type] - checked there
            threads=0,
            max_kv_tokens=max_kv_tokens,
            lease=lease,
            meter=None if meter is None else str(meter),
        )
        server, _ = _build(provision, SecretBytes.copy_of(load_sealing_key(keys)))
        server.welcome = server.welcome.model_copy(update={"enclave": "in-process test enclave: not a TEE"})
        path = self._folder / f"{len(self._ends)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(16)
        read_end, write_end = os.pipe()
        thread = threading.Thread(target=server.serve, args=(listener, read_end), daemon=True)
        thread.start()
        self._ends.append((write_end, thread, listener))
        self.started.append(InProcessEnclave(path, server))
        return self.started[-1]

    def close(self) -> None:
        for write_end, thread, listener in self._ends:
            os.close(write_end)
            thread.join(10)
            listener.close()


@pytest.fixture(scope="session")
def enclave_threads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnclaveThreads]:
    """Starter of in-process enclaves; all end with the test session."""
    folder = tmp_path_factory.mktemp("s")
    threads = EnclaveThreads(folder)
    yield threads
    threads.close()


Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="session")
def sealed_pair(
    tmp_path_factory: pytest.TempPathFactory, keys: Path, enclave_threads: EnclaveThreads
) -> Iterator[Callable[[str, int], Pair]]:
    """(family, prefix) -> (original, protected) in fp32; made once per session."""
    made: dict[tuple[str, int], Pair] = {}
    folders: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(family: str, prefix: int) -> Pair:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family] = (folder, save_random_model(family, folder / "model"))
        folder, original = folders[family]
        if (family, prefix) not in made:
            bundle = folder / f"bundle-{prefix}"
            semiopen.seal(folder / "model", bundle, keys, prefix=prefix)
            enclave = enclave_threads.start(bundle, keys)
            made[family, prefix] = (original, semiopen.load(bundle, enclave=enclave.path))
        return made[family, prefix]

    yield make
    for _, protected in made.values():
        protected.enclave.close()
