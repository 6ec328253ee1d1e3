"""How vLLM loads a bundle: check its signature, reach the enclave, load the open blocks."""

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
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.host.opening import check_match
from semiopen.host.vllm_plugin import choice, unmixing, wiping
from semiopen.host.vllm_plugin.reach import Reach
from semiopen.protocol.messages import DType


class BundleLoader(DefaultModelLoader):
    """Loads the open blocks as vLLM loads any model, and ties them to the enclave.

    The enclave is named by `--model-loader-extra-config '{"enclave": SOCKET}'` or the environment variable
    SEMIOPEN_ENCLAVE; `{"keys": FOLDER}` or SEMIOPEN_KEYS starts a dev enclave (not a TEE) for this engine.
    `{"threads": N}` sets the threads of that one, `{"lease": FILE}` or SEMIOPEN_LEASE its lease. With
    `{"tells_refusals": true}` requests that the lease refuses get a token outside the vocabulary, as
    `SealedPrefix.ask` says.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._reach = Reach.of(load_config)
        super().__init__(replace(load_config, load_format="safetensors", model_loader_extra_config=self._reach.rest))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Load a bundle; the enclave starts while the open blocks are read.

        Raises:
            BundleError: a file of the bundle is not what the vendor signed.
            EnclaveError: no enclave, or it holds another bundle or computes in another dtype.
        """
        wiping.install()
        choice.install()
        folder = Path(model_config.model)
        dtype = str(model_config.dtype).removeprefix("torch.")
        reach = self._reach
        with ExitStack() as cleanup:
            client = process = None
            if reach.keys:
                keys = Path(reach.keys)
                lease = Path(reach.lease) if reach.lease else None
                process = EnclaveProcess(folder, keys, cast(DType, dtype), reach.threads, lease=lease)
                cleanup.callback(process.close)
                verified = read_files(folder, load_vendor_key(keys))
            else:
                client = EnclaveClient(cast(str, reach.enclave))
                cleanup.callback(client.close)
                verified = read_files(folder, client.welcome.bundle_digest)
            model = super().load_model(vllm_config, model_config, prefix)
            if process is not None:
                process.wait_ready()
                client = EnclaveClient(process.socket_path)
                cleanup.callback(client.close)
            client = cast(EnclaveClient, client)
            check_match(client.welcome, verified, dtype)
            sealed_prefix = cast(Any, model).sealed_prefix
            sealed_prefix.attach(client)
            if client.welcome.mixed_blocks:
                unmixing.pass_through(sealed_prefix, vllm_config)
            sealed_prefix.tells_refusals = reach.tells_refusals
            weakref.finalize(model, cleanup.pop_all().close)
        return model
