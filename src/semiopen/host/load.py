"""Opening a bundle on the host: start or find the enclave, then build the model around it.

Light on purpose: a dev enclave is spawned before torch and transformers are imported here, so that both processes
import them side by side.
"""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semiopen.bundle.files import check_is_bundle
from semiopen.bundle.keys import load_vendor_key
from semiopen.errors import EnclaveError
from semiopen.host.enclave_process import EnclaveProcess

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ENCLAVE_SETTING = "SEMIOPEN_ENCLAVE"  # environment variable: socket of a running enclave
DEFAULT_KV_TOKENS = 1 << 16


def load(
    bundle: str | Path,
    keys: str | Path | None = None,
    enclave: str | Path | None = None,
    dtype: "torch.dtype | str | None" = None,
    vendor_key: str | Path | None = None,
    kv_tokens: int = DEFAULT_KV_TOKENS,
    threads: int = 0,
    lease: str | Path | None = None,
    rekey_kv: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel":
    """Open a bundle as a transformers model whose embedding is the enclave.

    Args:
        bundle: folder of the bundle.
        keys: key folder; starts a dev enclave (not a TEE) that ends with the model.
        enclave: socket of a running enclave instead, default the environment variable SEMIOPEN_ENCLAVE.
        dtype: dtype of open blocks and enclave; the bundle's own when None.
        vendor_key: file of the vendor's public key, to check the signature with. Without, `keys` has one; a running
            enclave has checked the signature, and the files are checked against what it says.
        kv_tokens: tokens that all running sequences together may hold in the enclave.
        threads: CPU threads of a dev enclave started here; 0 for torch's choice.
        lease: file of the vendor's lease, for bundles that need one, where the enclave is started here. Its use is
            counted in LEASE.used.
        rekey_kv: draw a fresh basis of the KV cache, on the weights in memory (docs/kv.md). It helps only against who
            sees one dump of the cache and not the weights. Adapters of this bundle do not fit then.
        kwargs: for transformers' `from_pretrained`, such as `device_map` or `attn_implementation`.

    Returns:
        A model of the family, with `generate`. `model.enclave.close()` ends its session at once, else it ends with
        the model.

    Raises:
        BundleError: a file of the bundle is not what the vendor signed.
        EnclaveError: no enclave, or it refuses.
        KeyFolderError: the keys are not usable.
        LeaseError: the lease cannot be read.
        UnsupportedCallError: `rekey_kv`, and the bundle is one of `kv: enclave`.
    """
    folder = Path(bundle)
    check_is_bundle(folder)
    enclave = enclave or (None if keys else os.environ.get(ENCLAVE_SETTING))
    if (keys is None) == (enclave is None):
        raise EnclaveError(
            "Say how to reach the enclave: keys=FOLDER starts a dev enclave; enclave=SOCKET, or the environment "
            f"variable {ENCLAVE_SETTING}, names one that 'semiopen enclave' started."
        )
    if lease is not None and keys is None:
        raise EnclaveError("A running enclave has its own lease; give --lease to `semiopen enclave` instead.")
    trusted_key = load_vendor_key(Path(vendor_key or keys)) if vendor_key or keys else None  # type: ignore[arg-type]
    with contextlib.ExitStack() as cleanup:
        process = None
        if keys is not None:
            name = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
            permission = None if lease is None else Path(lease)
            process = EnclaveProcess(folder, Path(keys), name, threads, lease=permission)  # type: ignore[arg-type]
            cleanup.callback(process.close)

        # Only now: these import torch and transformers, while the enclave does the same.
        from semiopen.bundle.reader import read_files
        from semiopen.host.client import EnclaveClient
        from semiopen.host.opening import attach, build

        if process is not None:
            verified = read_files(folder, trusted_key)  # type: ignore[arg-type] - keys were given
            model = build(folder, dtype, kwargs)
            process.wait_ready()
            client = EnclaveClient(process.socket_path)
            cleanup.callback(client.close)
        else:
            client = EnclaveClient(enclave)  # type: ignore[arg-type] - checked above
            cleanup.callback(client.close)
            verified = read_files(folder, trusted_key or client.welcome.bundle_digest)
            model = build(folder, dtype, kwargs)
        if rekey_kv:
            from semiopen.host.kv_keys import rekey

            rekey(model)
        attach(model, client, verified, kv_tokens, cleanup.pop_all().close)
    return model
