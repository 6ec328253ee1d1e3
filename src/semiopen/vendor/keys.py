"""Making the vendor's key folder. `semiopen.bundle.keys` reads it, as other parties need parts of it too."""

import os
import secrets
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from semiopen.bundle.keys import (
    SEALING_KEY_NAME,
    SIGNING_KEY_NAME,
    VENDOR_KEY_NAME,
    load_sealing_key,
    load_signing_key,
    load_vendor_key,
)
from semiopen.bundle.primitives import KEY_BYTES
from semiopen.errors import KeyFolderError

__all__ = ["generate_keys", "load_sealing_key", "load_signing_key", "load_vendor_key"]


def generate_keys(folder: Path) -> None:
    """Make a key folder: `signing.key` and `sealing.key` for the vendor, `vendor.pub` for the customers.

    The folder (mode 0700) appears complete or not at all. Keep a backup: without the sealing key, no bundle
    that was sealed with it can be opened again.

    Args:
        folder: must not exist; missing parents are made.

    Raises:
        KeyFolderError: `folder` is already there, or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise KeyFolderError(f"{folder} already exists; keys are never overwritten, so give another path.")
    signing_key = ec.generate_private_key(ec.SECP256R1())
    private_pem = signing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = signing_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    sealing_line = secrets.token_hex(KEY_BYTES).encode() + b"\n"
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        try:
            _write(temporary / SIGNING_KEY_NAME, private_pem, 0o600)
            _write(temporary / SEALING_KEY_NAME, sealing_line, 0o600)
            _write(temporary / VENDOR_KEY_NAME, public_pem, 0o644)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise KeyFolderError(f"{folder} cannot be written ({error.strerror}); give another path.") from None


def _write(path: Path, data: bytes, mode: int) -> None:
    # The mode goes with the creation, so that the file is never readable by others, not even for a moment.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
