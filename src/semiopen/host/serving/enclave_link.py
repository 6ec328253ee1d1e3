"""How an engine reaches its enclave: at the start, and again after the enclave has gone."""

from collections.abc import Callable
from pathlib import Path

from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.protocol.messages import Welcome


class EnclaveLink:
    """Connects to a running enclave, or to a dev enclave (not a TEE) that it starts, and starts again when it ended."""

    def __init__(self, start: Callable[[], EnclaveProcess] | None = None, socket: Path | None = None) -> None:
        """Start the enclave, if it is ours to start; does not wait for it.

        Args:
            start: spawns a dev enclave; None to use one that runs.
            socket: where one listens that runs; None to start one.

        Raises:
            KeyFolderError, EnclaveError: it cannot be started.
        """
        assert (start is None) != (socket is None), "one of the two"
        self._start = start
        self._socket = socket
        self._process = start() if start else None
        self._loading = True  # nobody has waited for this process yet
        self._client: EnclaveClient | None = None
        self.check: Callable[[Welcome], object] = lambda welcome: None

    def connect(self) -> EnclaveClient:
        """A new connection, to a new enclave where ours has ended; `check` has looked at its welcome.

        Raises:
            EnclaveError: there is none, it refused its bundle, or it is not the one wanted; try again later.
            ProtocolError: what answers is no enclave of this version.
        """
        self._disconnect()
        if self._start is not None and self._process is not None:
            if not self._process.running():
                self._process.close()
                self._process, self._loading = self._start(), True
            if self._loading:
                self._process.wait_ready()
                self._loading = False
        path = self._process.socket_path if self._process else self._socket
        assert path is not None
        self._client = EnclaveClient(path)
        self.check(self._client.welcome)
        return self._client

    def close(self) -> None:
        """End the connection, and the enclave if it was started here. Safe to call again."""
        self._disconnect()
        if self._process is not None:
            self._process.close()

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
