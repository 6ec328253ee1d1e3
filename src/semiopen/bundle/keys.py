"""Key folders, the reading side: the vendor's signing key, its public half, and the sealing key.

A vendor's folder holds all three files; a customer gets `vendor.pub` alone. The sealing key stays with the
vendor, or with whoever releases it to a verified enclave. Contents of key files never appear in a message.
"""

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from semiopen.bundle.primitives import KEY_BYTES
from semiopen.errors import KeyFolderError

SIGNING_KEY_NAME = "signing.key"
VENDOR_KEY_NAME = "vendor.pub"
SEALING_KEY_NAME = "sealing.key"

_MAX_FILE_BYTES = 16384


def load_signing_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The vendor's private P-256 key from `signing.key`: PKCS #8 PEM without a passphrase.

    Raises:
        KeyFolderError: missing, readable by others, or not such a key.
    """
    path = folder / SIGNING_KEY_NAME
    try:
        key = load_pem_private_key(_read(path, private=True), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFolderError(
            f"{path} is not an unencrypted P-256 private key in PEM; restore it from your backup."
        ) from None
    return key


def load_vendor_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The vendor's public P-256 key from a PEM file, or from `vendor.pub` in a folder.

    Raises:
        KeyFolderError: missing, or not such a key.
    """
    if path.is_dir():
        path = path / VENDOR_KEY_NAME
    try:
        key = load_pem_public_key(_read(path, private=False))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFolderError(
            f"{path} is not a P-256 public key in PEM; ask the vendor for {VENDOR_KEY_NAME}."
        ) from None
    return key


def load_sealing_key(folder: Path) -> bytes:
    """The sealing key, 32 bytes, from `sealing.key`: one line of 64 hexadecimal digits.

    Raises:
        KeyFolderError: missing, readable by others, or not such a line.
    """
    path = folder / SEALING_KEY_NAME
    try:
        key = bytes.fromhex(_read(path, private=True).decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyFolderError(
            f"{path} is not a line of {2 * KEY_BYTES} hexadecimal digits; restore it from your backup."
        ) from None
    return key


def _read(path: Path, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if private and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFolderError(f"{path} can be read by other users; run: chmod 600 {path}")
            return file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        raise KeyFolderError(f"{path} is missing; make a key folder with `semiopen keygen`, or fix the path.") from None
    except OSError as error:
        raise KeyFolderError(f"{path} cannot be read ({error.strerror}); check the path and its owner.") from None
