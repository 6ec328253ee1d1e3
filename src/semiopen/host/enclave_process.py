"""Starting a dev enclave: the only code that knows how to spawn one. It never imports it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from semiopen.bundle.keys import load_sealing_key, load_vendor_key
from semiopen.bundle.lease import LONGEST_LEASE
from semiopen.errors import EnclaveError, LeaseError
from semiopen.protocol.framing import FrameDecoder, encode_frame
from semiopen.protocol.messages import START_REPLY, DType, Failed, Provision, dump, parse

DEFAULT_MAX_KV_TOKENS = 1 << 24  # memory is taken only as they are used


class EnclaveProcess:
    """A dev enclave (not a TEE) that lives as long as this object, or as this process."""

    def __init__(
        self,
        bundle: Path,
        keys: Path,
        dtype: DType | None = None,
        threads: int = 0,
        socket_path: Path | None = None,
        max_kv_tokens: int = DEFAULT_MAX_KV_TOKENS,
        lease: Path | None = None,
        meter: Path | None = None,
    ) -> None:
        """Spawn an enclave and hand it the sealing key over its standard input; does not wait for it to load.

        Args:
            bundle: folder of the bundle that it shall open.
            keys: key folder; its sealing key and vendor key go to the enclave, by pipe.
            dtype: dtype to compute in; the bundle's own when None.
            threads: CPU threads of the enclave; 0 for torch's choice.
            socket_path: where it shall listen; a private temporary path when None.
            max_kv_tokens: tokens that the KV caches of all its sessions may hold.
            lease: file of the vendor's lease, for bundles that need one.
            meter: file in which the enclave counts the use of the lease over restarts; LEASE.used when None.

        Raises:
            KeyFolderError: the keys are not usable.
            LeaseError: the lease's file cannot be read.
            EnclaveError: the socket path is taken.
        """
        sealing_key = load_sealing_key(keys)
        vendor_key = load_vendor_key(keys).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        permission = None if lease is None else read_lease(lease)
        if lease is not None and meter is None:
            meter = lease.with_name(lease.name + ".used")
        self._folder = None if socket_path else Path(tempfile.mkdtemp(prefix="semiopen-"))
        self.socket_path = socket_path or Path(self._folder or "", "enclave.sock")
        try:
            listener = _listen(self.socket_path)
        except EnclaveError:
            if self._folder is not None:
                self._folder.rmdir()
            raise
        # In memory, not a pipe: nobody reads it while the enclave starts, and a full pipe would stop it.
        self._messages = os.fdopen(os.memfd_create("semiopen-start-messages"), "rb")
        with listener:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "semiopen.enclave", str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                env=_environment(threads),
                pass_fds=(listener.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is the host's to handle
            )
        provision = Provision(
            bundle=str(bundle.resolve()),
            vendor_key=vendor_key,
            dtype=dtype,
            threads=threads,
            max_kv_tokens=max_kv_tokens,
            lease=permission,
            meter=None if meter is None else str(meter.resolve()),
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(sealing_key)
            self._process.stdin.write(encode_frame(dump(provision)))
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it died at once; wait_ready says why

    @property
    def pid(self) -> int:
        """Process id of the enclave."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the enclave has loaded its bundle.

        Raises:
            EnclaveError: it refused the bundle or the key, or died.
        """
        assert self._process.stdout is not None
        decoder = FrameDecoder()
        while data := os.read(self._process.stdout.fileno(), 65536):
            for payload in decoder.feed(data):
                reply = parse(START_REPLY, payload)
                if isinstance(reply, Failed):
                    self.close()
                    raise EnclaveError(reply.message, "start")
                self._process.stdout.close()
                self._messages.close()  # the enclave has given its own end up by now
                return
        self._messages.seek(0)
        last = self._messages.read().decode(errors="replace").strip().splitlines()
        status = self._process.wait()
        self.close()
        why = f": {last[-1]}" if last else ""
        raise EnclaveError(f"The enclave ended with status {status} before it was ready{why}.", "start")

    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the enclave and remove its socket. Safe to call again."""
        for stream in (self._process.stdin, self._process.stdout, self._messages):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):  # it died before it took what is still buffered
                    stream.close()  # the end of standard input ends the enclave
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.socket_path.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def read_lease(path: Path) -> str:
    """The text of a lease's file.

    Raises:
        LeaseError: it cannot be read, or is too large to be a lease.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_LEASE + 1)
        text = data.decode("ascii").strip()
    except OSError as error:
        raise LeaseError(f"The lease {path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise LeaseError(f"{path} is no lease; give the file that `semiopen lease new` wrote.") from None
    if len(text) > LONGEST_LEASE:
        raise LeaseError(f"{path} is far too large to be a lease; give the file that `semiopen lease new` wrote.")
    return text


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # the socket is for this user alone
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise EnclaveError(
            f"The enclave cannot listen at {path} ({error.strerror or error}); give another path."
        ) from None
    finally:
        os.umask(previous)
    listener.listen(16)
    return listener


def _environment(threads: int) -> dict[str, str]:
    """All that the enclave inherits: nothing of the caller's, whose variables may hold secrets."""
    variables = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        # Between steps OpenMP's threads spin, by default for milliseconds, on cores that are the host's then.
        "GOMP_SPINCOUNT": "10000",
        # Weights in large pages, where the system allows programs to ask: each step reads all of them.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables
