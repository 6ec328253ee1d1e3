"""Opening a bundle: verify first, then read. Nothing of a bundle is believed before its signature is."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import ec

from semiopen.bundle.dtypes import TORCH_DTYPES, tensor_bytes
from semiopen.bundle.files import MANIFEST_NAME, Progress, hash_files, list_files, open_file, read_file
from semiopen.bundle.manifest import Manifest, SealedTensor, parse_manifest
from semiopen.bundle.primitives import TensorHeader, derive_bundle_key, unseal_into
from semiopen.bundle.sealed_file import sealed_layout
from semiopen.bundle.signature import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE_NAME,
    vendor_key_id,
    verify_signed_files,
)
from semiopen.errors import BundleError, SealedDataError


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose signature was verified; only `read_files` makes one.

    Attributes:
        folder: where it lies. Files there may change at any time: read them through `read`, not through the
            path, wherever that matters.
        manifest: what the vendor signed.
        digests: SHA-256 (hex) of each signed file by relative POSIX path.
        digest: SHA-256 (hex) of the signed statement; it identifies the bundle with all its files.
    """

    folder: Path
    manifest: Manifest
    digests: dict[str, str]
    digest: str

    def read(self, name: str) -> bytes:
        """The bytes of one signed file, hashed after they were read: what it returns is what was signed.

        Raises:
            BundleError: not a file of this bundle, missing, or changed.
        """
        return _read_signed(self.folder, name, self.digests)


def read_files(
    folder: Path,
    trust: ec.EllipticCurvePublicKey | str,
    *,
    only: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> VerifiedBundle:
    """Verify a bundle's signature and its files.

    Args:
        folder: the bundle.
        trust: the key that must have signed it; or the digest of a bundle (`VerifiedBundle.digest`), as told
            by an enclave that has verified it.
        only: hash these files (and the manifest) and do not look at any other, which may then be absent or
            changed. For the enclave: what it reads through `VerifiedBundle.read` and `load_sealed` is
            authenticated there again, so an empty list is safe, and saves reading sealed files twice. None:
            all files, and no file that is not signed may be there.
        progress: told how many bytes are hashed.

    Raises:
        BundleError: the signature is wrong, or a file is missing, added, changed, a link; the message names
            the file.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the path of a bundle.")
    signed = verify_signed_files(read_file(folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES), trust)
    if MANIFEST_NAME not in signed.digests:
        raise BundleError(f"{MANIFEST_NAME} is not in this folder's signature, so it is a signed model but no bundle.")
    if only is None:
        _refuse_added_files(folder, signed.digests)
    manifest = parse_manifest(_read_signed(folder, MANIFEST_NAME, signed.digests))
    for name in manifest.sealed_files():
        if name not in signed.digests:
            raise BundleError(f"{name!r} is in {MANIFEST_NAME} but was not signed; ask the vendor for a new bundle.")
    names = list(signed.digests) if only is None else list(dict.fromkeys(only))
    for name in names:
        _check_signed(name, signed.digests)
    for name, digest in hash_files(folder, names, progress).items():
        if digest != signed.digests[name]:
            raise _changed(name)
    return VerifiedBundle(folder, manifest, signed.digests, signed.payload_digest)


def bundle_key_of(
    bundle: VerifiedBundle, sealing_key: bytes | memoryview, vendor_key: ec.EllipticCurvePublicKey
) -> bytes:
    """The key that opens a bundle's sealed tensors, 32 bytes; for the enclave only.

    Args:
        bundle: from `read_files`.
        sealing_key: the vendor's, 32 bytes.
        vendor_key: the key that signed the bundle; with another, the result opens nothing.
    """
    bundle_id = bytes.fromhex(bundle.manifest.bundle_id)
    return derive_bundle_key(sealing_key, bundle_id, bytes.fromhex(vendor_key_id(vendor_key)))


def load_sealed(
    bundle: VerifiedBundle,
    bundle_key: bytes,
    names: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Decrypt sealed tensors into memory of their own; for the enclave only.

    The disk is the host's. Nothing read from it steers this function: a sealed file's size and head must
    equal what the signed manifest implies, each chunk of ciphertext is copied to private memory before it is
    authenticated, and files are read, not mapped, as a mapped file that the host truncates would kill the
    process.

    Args:
        bundle: from `read_files`.
        bundle_key: 32 bytes, from `bundle_key_of`.
        names: tensors to load; all by default.

    Returns:
        CPU tensors by name in the manifest's order. Memory beyond them is one chunk (1 MiB).

    Raises:
        SealedDataError: wrong key or changed ciphertext; the message names the file.
        BundleError: a sealed file is missing, or its size or head is not what it must be.
        ValueError: a name in `names` is not sealed in this bundle.
    """
    sealed = {tensor.name for tensor in bundle.manifest.sealed}
    wanted = sealed if names is None else set(names)
    if not wanted <= sealed:
        raise ValueError(f"Not sealed in this bundle: {', '.join(sorted(wanted - sealed))}.")
    loaded: dict[str, torch.Tensor] = {}
    for file_name, tensors in bundle.manifest.sealed_files().items():
        if not wanted.isdisjoint(tensor.name for tensor in tensors):
            loaded.update(_load_file(bundle, file_name, tensors, wanted, bundle_key))
    return loaded


def _load_file(
    bundle: VerifiedBundle,
    file_name: str,
    tensors: tuple[SealedTensor, ...],
    wanted: set[str],
    bundle_key: bytes,
) -> dict[str, torch.Tensor]:
    bundle_id = bytes.fromhex(bundle.manifest.bundle_id)
    head, offsets = sealed_layout(tensors)
    loaded: dict[str, torch.Tensor] = {}
    with open_file(bundle.folder, file_name) as file:
        if os.fstat(file.fileno()).st_size != offsets[-1]:
            raise _changed(file_name)
        found = memoryview(bytearray(len(head)))
        _FileCursor(file.fileno(), 0, file_name).read_into(found)
        if found != head:
            raise _changed(file_name)
        for tensor, start in zip(tensors, offsets, strict=False):
            if tensor.name not in wanted:
                continue
            out = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
            header = TensorHeader(bundle_id, tensor.name, tensor.dtype, tensor.shape)
            source = _FileCursor(file.fileno(), start, file_name)
            try:
                unseal_into(bundle_key, header, source.read_into, tensor_bytes(out))
            except SealedDataError as error:
                raise SealedDataError(f"{file_name}: {error}") from None
            loaded[tensor.name] = out
    return loaded


class _FileCursor:
    """Reads a file from an offset on, into memory that the caller owns."""

    def __init__(self, descriptor: int, offset: int, file_name: str) -> None:
        self._descriptor, self._offset, self._file_name = descriptor, offset, file_name

    def read_into(self, buffer: memoryview) -> None:
        """Fill the whole buffer; a file that ends before that was changed while it is read."""
        while len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer], self._offset)
            except OSError as error:
                raise BundleError(f"{self._file_name!r} cannot be read ({error.strerror}); check the disk.") from None
            if count == 0:
                raise _changed(self._file_name)
            self._offset += count
            buffer = buffer[count:]


def _read_signed(folder: Path, name: str, digests: dict[str, str]) -> bytes:
    _check_signed(name, digests)
    data = read_file(folder, name)
    if hashlib.sha256(data).hexdigest() != digests[name]:
        raise _changed(name)
    return data


def _refuse_added_files(folder: Path, digests: dict[str, str]) -> None:
    for name in list_files(folder):
        if name != SIGNATURE_NAME and name not in digests:
            raise BundleError(f"{name!r} is in the folder but the vendor did not sign it; remove it.")


def _check_signed(name: str, digests: dict[str, str]) -> None:
    if name not in digests:
        raise BundleError(f"{name!r} is not a file that the vendor signed; ask for one that is in the bundle.")


def _changed(name: str) -> BundleError:
    return BundleError(f"{name!r} is not what the vendor signed; fetch the bundle again.")
