"""Fresh keys for the KV cache at each load: the vendor's fold once more, on the host's own weights in memory."""

import secrets

import torch
from transformers import PreTrainedModel

from semiopen.bundle.primitives import KEY_BYTES
from semiopen.errors import UnsupportedCallError
from semiopen.model.kv_symmetries import KvFold
from semiopen.model.split import KV_SETTING


@torch.no_grad()
def rekey(model: PreTrainedModel) -> None:
    """Put keys and values of the open blocks in a basis that is drawn now and kept nowhere. Weights round once more.

    Raises:
        UnsupportedCallError: the bundle is one of `kv: enclave`, or a weight is not in memory.
    """
    if getattr(model.config, KV_SETTING, "plain") == "enclave":
        raise UnsupportedCallError(
            "This bundle's values have the order that its enclave undoes, in each load the same one; a fresh basis of "
            "the keys beside it would give a thief several views of it. Load it without rekey_kv."
        )
    fold = KvFold(model.config, secrets.token_bytes(KEY_BYTES))
    for name, parameter in model.named_parameters():
        if not fold.touches(name):
            continue
        if parameter.is_meta:
            raise UnsupportedCallError("rekey_kv needs all weights in memory; load without offloading them.")
        parameter.copy_(fold.apply(name, parameter.cpu()))
