"""A customer's secret, and the fold of a checkpoint on disk that comes of it."""

import re
from pathlib import Path

import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from semiopen.bundle.keys import load_sealing_key
from semiopen.bundle.primitives import KEY_BYTES
from semiopen.errors import SemiopenError
from semiopen.model.symmetries import Fold, is_gain

_CUSTOMER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_customer(customer: str) -> str:
    """Return the name of a customer, which names files as well.

    Raises:
        ValueError: not 1 to 64 letters, digits, dots, dashes and underscores.
    """
    if not _CUSTOMER.fullmatch(customer):
        raise ValueError(
            f"Customer {customer!r} cannot be a file name; use up to 64 letters, digits, '.', '-' and '_', and begin "
            "with a letter or a digit."
        )
    return customer


def fold_secret(keys: Path, customer: str) -> bytes:
    """The secret behind one customer's basis: 32 bytes, from the sealing key of a key folder and the customer's name.

    Nothing else goes in, so it can be derived again as long as the sealing key is kept. All models that are sealed for
    one customer with one key folder share it.

    Raises:
        KeyFolderError: there is no usable sealing key.
        ValueError: the name cannot be used.
    """
    info = b"semiopen fold secret v1" + check_customer(customer).encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(load_sealing_key(keys))


def fold_checkpoint(config: PreTrainedConfig, shards: list[Path], secret: bytes) -> Fold:
    """Prepare the fold of a checkpoint: reads its norms, from all shards, and nothing else.

    Raises:
        SemiopenError: a shard is damaged.
    """
    gains: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                gains |= {name: file.get_tensor(name) for name in file.keys() if is_gain(config, name)}  # noqa: SIM118
        except SafetensorError as error:
            raise SemiopenError(f"{shard} is damaged ({error}); fetch the model again.") from None
    return Fold(config, secret, gains)
