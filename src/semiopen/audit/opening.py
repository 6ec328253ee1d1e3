"""Opening a bundle for an audit: as a thief may use it, and as the auditor must, who needs the model's own answers.

A head that is not open answers as a lease allows. So the vendor, who has the keys, gets two enclaves: one with the
rights of a customer, and one with all logits. Both leases are written here, have no budget, and are gone in the end.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from semiopen.bundle.keys import load_signing_key, load_vendor_key
from semiopen.bundle.lease import Rights, sign_lease, verify_lease
from semiopen.bundle.reader import read_files
from semiopen.errors import SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import read_lease
from semiopen.host.load import load
from semiopen.host.modeling import session_of

_VALID = 365 * 86400  # seconds; an audit is stopped and gone on with in less


@dataclass(frozen=True)
class Parties:
    """One bundle, opened.

    Attributes:
        thief: the model, with the rights of a customer.
        auditor: the model with all logits; the same one where the thief may have them, too.
        rights: of the thief to a head that is not open; None where it is open.
    """

    thief: PreTrainedModel
    auditor: PreTrainedModel
    rights: Rights | None
    _clean: Callable[[], object] = lambda: None

    @property
    def clients(self) -> list[EnclaveClient]:
        """Connections to the enclaves, the thief's first; one or two."""
        models = [self.thief] if self.auditor is self.thief else [self.thief, self.auditor]
        return [session_of(model).client for model in models]

    def close(self) -> None:
        """End the enclaves that were started, and remove their leases."""
        for model in (self.thief, self.auditor):
            model.enclave.close()  # type: ignore[operator]
        self._clean()


def open_parties(
    bundle: Path,
    keys: Path | None,
    enclave: Path | None,
    dtype: str | None,
    threads: int,
    lease: Path | None,
) -> Parties:
    """Open a bundle.

    Args:
        bundle: its folder.
        keys: key folder of the vendor, which starts dev enclaves; or
        enclave: socket of a running one.
        dtype: of the computation; float32 when None and `keys` are given, else the bundle's own.
        threads: CPU threads of an enclave; 0 for torch's choice.
        lease: what a thief may do. Where the head is not open only its rights matter, nothing of it is used up, and
            None is what `semiopen lease new` gives by default.

    Raises:
        SemiopenError: the head is not open, and neither keys nor the running enclave give the model's own answers.
        LeaseError: the lease is not valid for this bundle.
        BundleError, EnclaveError, KeyFolderError: see `semiopen.load`.
    """
    if keys is None:
        model = load(bundle, enclave=enclave, dtype=dtype, threads=threads, lease=lease)
        welcome = session_of(model).client.welcome
        if welcome.head == "open":
            return Parties(model, model, None)
        if welcome.rights.all_logits:
            return Parties(model, model, welcome.rights)
        model.enclave.close()  # type: ignore[operator]
        raise SemiopenError(
            f"The head of this bundle is {welcome.head} and the running enclave's lease does not allow all logits, so "
            "that no copy can be compared with the model's own answers; give --keys FOLDER, with which the audit "
            "writes itself a lease for that, or start the enclave with a lease of `--logits full`."
        )
    vendor_key, dtype = load_vendor_key(keys), dtype or "float32"
    manifest = read_files(bundle, vendor_key, only=()).manifest
    if manifest.plan.head == "open":
        model = load(bundle, keys=keys, dtype=dtype, threads=threads, lease=lease)
        return Parties(model, model, None)
    rights = Rights()
    if lease is not None:
        rights = verify_lease(read_lease(lease), vendor_key, manifest.bundle_id, time.time()).rights
    folder = Path(tempfile.mkdtemp(prefix="semiopen-audit-"))
    opened: list[PreTrainedModel] = []
    try:
        for name, its in (("thief", rights), ("auditor", Rights(logits="full"))):
            if not (opened and rights.all_logits):
                path = _write_lease(folder / f"{name}.jwt", keys, manifest.bundle_id, its)
                opened.append(load(bundle, keys=keys, dtype=dtype, threads=threads, lease=path))
    except BaseException:
        for model in opened:
            model.enclave.close()  # type: ignore[operator]
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Parties(opened[0], opened[-1], rights, lambda: shutil.rmtree(folder, ignore_errors=True))


def _write_lease(path: Path, keys: Path, bundle_id: str, rights: Rights) -> Path:
    now = int(time.time())
    text = sign_lease(
        load_signing_key(keys),
        bundle_id=bundle_id,
        customer="semiopen audit",
        issued=now,
        begins=now,
        ends=now + _VALID,
        tokens=None,
        rate=None,
        rights=rights,
    )
    path.write_text(text + "\n")
    return path
