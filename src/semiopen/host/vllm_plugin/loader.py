"""How vLLM loads a bundle: check its signature, reach the enclave, load the open blocks."""

import os
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.reader import read_files
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.host.load import ENCLAVE_SETTING
from semiopen.host.opening import check_match
from semiopen.protocol.messages import DType

KEYS_SETTING = "SEMIOPEN_KEYS"  # environment variable: key folder, for a dev enclave that starts with the engine


class BundleLoader(DefaultModelLoader):
    """Loads the open blocks as vLLM loads any model, and ties them to the enclave.

    The enclave is named by `--model-loader-extra-config '{"enclave": SOCKET}'` or the environment variable
    SEMIOPEN_ENCLAVE; `{"keys": FOLDER}` or SEMIOPEN_KEYS starts a dev enclave (not a TEE) for this engine.
    `{"threads": N}` sets the threads of that one.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(cast(dict[str, Any], load_config.model_loader_extra_config or {}))
        self._enclave = extra.pop("enclave", None)
        self._keys = extra.pop("keys", None)
        self._threads = int(extra.pop("threads", 0))
        if not self._enclave and not self._keys:
            self._enclave, self._keys = os.environ.get(ENCLAVE_SETTING), os.environ.get(KEYS_SETTING)
        if bool(self._enclave) == bool(self._keys):
            raise EnclaveError(
                f"Say how to reach the enclave: {ENCLAVE_SETTING}=SOCKET names one that 'semiopen enclave' started, "
                f"{KEYS_SETTING}=FOLDER starts a dev enclave; give one of them."
            )
        super().__init__(replace(load_config, load_format="safetensors", model_loader_extra_config=extra))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Load a bundle; the enclave starts while the open blocks are read.

        Raises:
            BundleError: a file of the bundle is not what the vendor signed.
            EnclaveError: no enclave, or it holds another bundle or computes in another dtype.
        """
        folder = Path(model_config.model)
        dtype = str(model_config.dtype).removeprefix("torch.")
        with ExitStack() as cleanup:
            client = process = None
            if self._keys:
                keys = Path(self._keys)
                process = EnclaveProcess(folder, keys, cast(DType, dtype), self._threads)
                cleanup.callback(process.close)
                verified = read_files(folder, load_vendor_key(keys))
            else:
                client = EnclaveClient(cast(str, self._enclave))
                cleanup.callback(client.close)
                verified = read_files(folder, client.welcome.bundle_digest)
            model = super().load_model(vllm_config, model_config, prefix)
            if process is not None:
                process.wait_ready()
                client = EnclaveClient(process.socket_path)
                cleanup.callback(client.close)
            client = cast(EnclaveClient, client)
            check_match(client.welcome, verified, dtype)
            cast(Any, model).sealed_prefix.attach(client)
            weakref.finalize(model, cleanup.pop_all().close)
        return model
