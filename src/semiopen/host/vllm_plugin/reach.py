"""How vLLM's processes reach the enclave, and what its lease allows, as far as vLLM's settings and variables say."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vllm.config.load import LoadConfig

from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.lease import EVERYTHING, Rights, verify_lease
from semiopen.bundle.reader import read_files
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import read_lease
from semiopen.host.load import ENCLAVE_SETTING

# Environment variables: key folder, for a dev enclave that starts with the engine, and its lease.
KEYS_SETTING, LEASE_SETTING = "SEMIOPEN_KEYS", "SEMIOPEN_LEASE"


@dataclass(frozen=True)
class Reach:
    """What was said.

    Attributes:
        enclave: socket of a running enclave; else
        keys: key folder, to start a dev enclave,
        lease: its lease's file,
        threads: its CPU threads.
        tells_refusals: see `SealedPrefix.ask`.
        rest: further settings, vLLM's own.
    """

    enclave: str | None
    keys: str | None
    lease: str | None
    threads: int
    tells_refusals: bool
    rest: dict[str, Any]

    @classmethod
    def of(cls, load_config: LoadConfig) -> "Reach":
        """Read vLLM's settings, else the environment.

        Raises:
            EnclaveError: they do not say how to reach an enclave, or in two ways.
        """
        extra = dict(cast(dict[str, Any], load_config.model_loader_extra_config or {}))
        enclave, keys, lease = (extra.pop(name, None) for name in ("enclave", "keys", "lease"))
        if not enclave and not keys:
            enclave, keys = os.environ.get(ENCLAVE_SETTING), os.environ.get(KEYS_SETTING)
        if bool(enclave) == bool(keys):
            raise EnclaveError(
                f"Say how to reach the enclave: {ENCLAVE_SETTING}=SOCKET names one that 'semiopen enclave' started, "
                f"{KEYS_SETTING}=FOLDER starts a dev enclave; give one of them."
            )
        if enclave and lease:
            raise EnclaveError("A running enclave has its own lease; give --lease to `semiopen enclave` instead.")
        if keys and not lease:
            lease = os.environ.get(LEASE_SETTING)
        return cls(enclave, keys, lease, int(extra.pop("threads", 0)), bool(extra.pop("tells_refusals", False)), extra)

    def rights(self, bundle: Path) -> Rights:
        """What the lease of this bundle allows.

        Raises:
            BundleError, EnclaveError, KeyFolderError, LeaseError: see there.
        """
        if self.enclave:
            client = EnclaveClient(self.enclave)
            client.close()
            return client.welcome.rights
        if not self.lease:
            return EVERYTHING
        vendor_key = load_vendor_key(Path(cast(str, self.keys)))
        manifest = read_files(bundle, vendor_key, only=()).manifest
        return verify_lease(read_lease(Path(self.lease)), vendor_key, manifest.bundle_id, time.time()).rights
