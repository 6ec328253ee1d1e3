"""Opening a bundle on the host: start or find the enclave, verify the files, build the model around it."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from semiopen.auto_classes import SemiopenConfig
from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.manifest import MANIFEST_NAME
from semiopen.bundle.reader import VerifiedBundle, read_files
from semiopen.errors import BundleError, EnclaveError
from semiopen.host.client import EnclaveClient
from semiopen.host.embedding import EnclaveSession
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.host.modeling import host_class
from semiopen.model.split import causal_lm_class

ENCLAVE_SETTING = "SEMIOPEN_ENCLAVE"  # environment variable: socket of a running enclave
DEFAULT_KV_TOKENS = 1 << 16


def load(
    bundle: str | Path,
    keys: str | Path | None = None,
    enclave: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    vendor_key: str | Path | None = None,
    kv_tokens: int = DEFAULT_KV_TOKENS,
    threads: int = 0,
    **kwargs: Any,
) -> PreTrainedModel:
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
        kwargs: for transformers' `from_pretrained`, such as `device_map` or `attn_implementation`.

    Returns:
        A model of the family, with `generate`. `model.enclave.close()` ends its session at once, else it ends with
        the model.

    Raises:
        BundleError: a file of the bundle is not what the vendor signed.
        EnclaveError: no enclave, or it refuses.
        KeyFolderError: the keys are not usable.
    """
    folder = Path(bundle)
    if not (folder / MANIFEST_NAME).is_file():
        raise BundleError(f"{folder} has no {MANIFEST_NAME}, so it is not a bundle; make one with 'semiopen seal'.")
    enclave = enclave or (None if keys else os.environ.get(ENCLAVE_SETTING))
    if (keys is None) == (enclave is None):
        raise EnclaveError(
            "Say how to reach the enclave: keys=FOLDER starts a dev enclave; enclave=SOCKET, or the environment "
            f"variable {ENCLAVE_SETTING}, names one that 'semiopen enclave' started."
        )
    with contextlib.ExitStack() as cleanup:
        process = None
        if keys is not None:
            trusted = load_vendor_key(Path(vendor_key or keys))
            name = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
            process = EnclaveProcess(folder, Path(keys), name, threads)  # type: ignore[arg-type]
            cleanup.callback(process.close)
            verified = read_files(folder, trusted)  # while the enclave loads
            model = _build(folder, dtype, kwargs)
            process.wait_ready()
            client = EnclaveClient(process.socket_path)
            cleanup.callback(client.close)
        else:
            assert enclave is not None
            client = EnclaveClient(enclave)
            cleanup.callback(client.close)
            told = client.welcome.bundle_digest
            verified = read_files(folder, load_vendor_key(Path(vendor_key)) if vendor_key else told)
            model = _build(folder, dtype, kwargs)
        _check_match(client, verified, model)
        session = EnclaveSession(client, kv_tokens)
        closer = weakref.finalize(model, cleanup.pop_all().close)
        model.enclave.attach(session, closer)  # type: ignore[operator, union-attr]
    return model


def _build(folder: Path, dtype: torch.dtype | str | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    config = cast(PreTrainedConfig, cast(SemiopenConfig, SemiopenConfig.from_pretrained(folder)).text_config)
    with _quiet():
        loaded = host_class(causal_lm_class(config)).from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype is not None else config.dtype,
            output_loading_info=True,
            **kwargs,
        )
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if info["missing_keys"] or info["mismatched_keys"]:
        # transformers would go on with random weights in their place.
        lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})[0]
        raise BundleError(f"The open tensors of {folder} do not fit config.json ({lacking}); seal the model again.")
    model.config.name_or_path = str(folder)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bar, which says nothing about this model's parts."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_match(client: EnclaveClient, verified: VerifiedBundle, model: PreTrainedModel) -> None:
    welcome = client.welcome
    if welcome.bundle_digest != verified.digest:
        raise EnclaveError("The enclave holds another bundle; start one with this bundle.")
    wanted = str(model.dtype).removeprefix("torch.")
    if welcome.dtype != wanted:
        raise EnclaveError(
            f"The enclave computes in {welcome.dtype}, this model in {wanted}; give both the same dtype."
        )
