"""Where keys meet ciphers: key derivation, and AES-256-GCM in chunks. No other file encrypts or decrypts.

Covered: a sealed tensor cannot be read without the key; nor can it be cut, extended, reordered, renamed,
reinterpreted (dtype, shape) or moved to another bundle without being refused.
Not covered: the number, names and sizes of sealed tensors are public; which bundle is the newest is the
broker's business; Python cannot reliably wipe a key from memory.

Keys:     sealing key (the vendor's, 32 bytes) -> bundle key (one bundle) -> tensor key (one tensor).
Chunks:   1 MiB of plaintext each, the last one shorter (empty for an empty tensor), each followed by a
          16-byte tag.
Nonces:   chunk number (11 bytes, big endian) and a last-chunk flag (1 byte): the STREAM construction of
          Hoang, Reyhanitabar, Rogaway and Vizar (CRYPTO 2015), which makes truncation and reordering fail. A
          constant start is safe because no two tensors share a key: a bundle id is fresh for each sealing,
          and the tensor key is derived from everything that names the tensor.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from semiopen.errors import SealedDataError

KEY_BYTES = 32
BUNDLE_ID_BYTES = 16
CHUNK_BYTES = 1 << 20
TAG_BYTES = 16


@dataclass(frozen=True)
class TensorHeader:
    """What is bound to a sealed tensor: the bundle it belongs to, its name, and how to read its bytes."""

    bundle_id: bytes
    name: str
    dtype: str
    shape: tuple[int, ...]

    def encode(self) -> bytes:
        """An injective encoding (every field has a fixed size or a length before it, little endian)."""
        assert len(self.bundle_id) == BUNDLE_ID_BYTES
        name, dtype = self.name.encode(), self.dtype.encode()
        return b"".join(
            [
                b"semiopen sealed tensor v1",
                self.bundle_id,
                struct.pack("<I", len(name)) + name,
                struct.pack("<I", len(dtype)) + dtype,
                struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape),
            ]
        )


def derive_bundle_key(sealing_key: bytes | bytearray | memoryview, bundle_id: bytes, vendor_key_digest: bytes) -> bytes:
    """The key of one bundle, from the vendor's sealing key, the bundle's id and the key it is signed with.

    Without the last, someone who can have an enclave provisioned with the sealing key could sign sealed files of
    the vendor's together with a config of their own, and have the sealed weights run in ways that give them away.

    Args:
        sealing_key: 32 uniformly random bytes.
        bundle_id: 16 bytes, fresh for each sealing.
        vendor_key_digest: 32 bytes, the vendor's key id (`signature.vendor_key_id`) as bytes.

    Returns:
        32 bytes.

    Raises:
        ValueError: a length is wrong.
    """
    if (len(sealing_key), len(bundle_id), len(vendor_key_digest)) != (KEY_BYTES, BUNDLE_ID_BYTES, 32):
        raise ValueError(f"A sealing key has {KEY_BYTES} bytes, a bundle id {BUNDLE_ID_BYTES}, a key's digest 32.")
    return _hkdf(sealing_key, salt=bundle_id, info=b"semiopen bundle key v1" + vendor_key_digest)


def derive_use_key(bundle_key: bytes, use: str) -> bytes:
    """A key of 32 bytes for one use of a bundle other than its tensors, such as "sampling".

    Raises:
        ValueError: the bundle key has another length.
    """
    if len(bundle_key) != KEY_BYTES:
        raise ValueError(f"A bundle key has {KEY_BYTES} bytes.")
    return _hkdf(bundle_key, salt=b"", info=b"semiopen use key v1 " + use.encode())


def sealed_size(plain_bytes: int) -> int:
    """Bytes of ciphertext for that many bytes of plaintext: a tag for each started chunk, at least one."""
    return plain_bytes + TAG_BYTES * _chunk_count(plain_bytes)


def seal(
    bundle_key: bytes,
    header: TensorHeader,
    plaintext: memoryview,
    write: Callable[[memoryview], object],
) -> None:
    """Encrypt one tensor and hand `sealed_size(len(plaintext))` bytes to `write`, chunk by chunk.

    Never call this twice with the same bundle key and header but another plaintext: that repeats nonces. The
    bundle writer cannot, as it draws a fresh bundle id and refuses a name it has seen.

    Args:
        bundle_key: from `derive_bundle_key`.
        header: what to bind.
        plaintext: the tensor's bytes, format "B", little endian.
        write: takes a view that is valid only until it returns.
    """
    cipher, bound = _tensor_cipher(bundle_key, header), header.encode()
    buffer = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
    count = _chunk_count(len(plaintext))
    for index in range(count):
        chunk = plaintext[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        sealed = buffer[: len(chunk) + TAG_BYTES]
        cipher.encrypt_into(_nonce(index, count), chunk, bound, sealed)
        write(sealed)


def unseal_into(
    bundle_key: bytes,
    header: TensorHeader,
    read_into: Callable[[memoryview], object],
    out: memoryview,
) -> None:
    """Decrypt one tensor directly into `out`, one chunk at a time.

    Each ciphertext chunk is first copied by `read_into` to private memory, so that what is authenticated is
    what is decrypted even when the source lies on a disk that somebody else may change meanwhile.

    Args:
        bundle_key: from `derive_bundle_key`.
        header: what was bound at sealing.
        read_into: fills the whole view that it is given with the next bytes of ciphertext, or raises. It is
            called for `sealed_size(len(out))` bytes in all; the caller checks that no more follow.
        out: writable, format "B", as long as the tensor has bytes.

    Raises:
        SealedDataError: wrong key or changed ciphertext. `out` then holds zeros from the failed chunk's start
            to its end, so no unauthenticated plaintext stays behind.
    """
    cipher, bound = _tensor_cipher(bundle_key, header), header.encode()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, len(out)) + TAG_BYTES))
    count = _chunk_count(len(out))
    for index in range(count):
        chunk = out[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        sealed = buffer[: len(chunk) + TAG_BYTES]
        read_into(sealed)
        try:
            cipher.decrypt_into(_nonce(index, count), sealed, bound, chunk)
        except InvalidTag:
            chunk[:] = bytes(len(chunk))
            raise SealedDataError(
                "Sealed data did not decrypt; check that the key is this bundle's, or fetch the bundle again."
            ) from None


def _chunk_count(plain_bytes: int) -> int:
    return max(1, -(-plain_bytes // CHUNK_BYTES))


def _nonce(index: int, count: int) -> bytes:
    return index.to_bytes(11, "big") + (b"\x01" if index == count - 1 else b"\x00")


def _tensor_cipher(bundle_key: bytes, header: TensorHeader) -> AESGCM:
    return AESGCM(_hkdf(bundle_key, salt=None, info=header.encode()))


def _hkdf(key: bytes | bytearray | memoryview, salt: bytes | None, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key)
