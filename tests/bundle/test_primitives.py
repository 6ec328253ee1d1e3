"""Sealed tensors must fail on every change. The last test fixes the format by a second implementation."""

import hashlib
import hmac
import io
import secrets
from unittest import mock

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from semiopen.bundle import primitives
from semiopen.bundle.primitives import (
    BUNDLE_ID_BYTES,
    CHUNK_BYTES,
    TAG_BYTES,
    TensorHeader,
    derive_bundle_key,
    seal,
    sealed_size,
    unseal_into,
)
from semiopen.errors import SealedDataError

KEY = bytes(range(32))
HEADER = TensorHeader(b"i" * BUNDLE_ID_BYTES, "model.embed_tokens.weight", "BF16", (3, 5))


def sealed(plaintext: bytes, header: TensorHeader = HEADER, key: bytes = KEY) -> bytes:
    out = io.BytesIO()
    seal(key, header, memoryview(plaintext), out.write)
    return out.getvalue()


def unsealed(ciphertext: bytes, size: int, header: TensorHeader = HEADER, key: bytes = KEY) -> bytes:
    """Unseal `size` bytes; a source that is too short or too long fails as any other change does."""
    source, out = io.BytesIO(ciphertext), bytearray(size)

    def read_into(buffer: memoryview) -> None:
        if source.readinto(buffer) != len(buffer):
            raise SealedDataError("short")

    unseal_into(key, header, read_into, memoryview(out))
    if source.read():
        raise SealedDataError("long")
    return bytes(out)


small_chunks = mock.patch.object(primitives, "CHUNK_BYTES", 32)  # hypothesis then meets many boundaries cheaply


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1, 15, 16, 17])
def test_round_trip_at_chunk_boundaries(chunks, more):
    size = max(0, chunks * CHUNK_BYTES + more)
    plaintext = secrets.token_bytes(size)
    ciphertext = sealed(plaintext)
    assert len(ciphertext) == sealed_size(size)
    assert unsealed(ciphertext, size) == plaintext
    for header_or_key in ({"key": bytes(32)}, {"header": TensorHeader(b"i" * 16, "other", "BF16", (3, 5))}):
        with pytest.raises(SealedDataError):
            unsealed(ciphertext, size, **header_or_key)


@small_chunks
@given(plaintext=st.binary(max_size=200))
def test_round_trip(plaintext):
    ciphertext = sealed(plaintext)
    assert len(ciphertext) == sealed_size(len(plaintext))
    assert unsealed(ciphertext, len(plaintext)) == plaintext


@small_chunks
@given(data=st.data(), plaintext=st.binary(max_size=200))
def test_any_flipped_bit_fails(data, plaintext):
    ciphertext = bytearray(sealed(plaintext))
    bit = data.draw(st.integers(0, 8 * len(ciphertext) - 1))
    ciphertext[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealedDataError):
        unsealed(bytes(ciphertext), len(plaintext))


@small_chunks
@given(data=st.data(), plaintext=st.binary(max_size=200))
def test_any_other_length_fails(data, plaintext):
    """Both when the reader expects the old size and when it is told a size that fits the new length."""
    ciphertext = sealed(plaintext)
    other = data.draw(st.integers(0, 220).filter(lambda size: size != len(plaintext)))
    length = sealed_size(other)
    changed = ciphertext[:length] + secrets.token_bytes(max(0, length - len(ciphertext)))
    for size in (other, len(plaintext)):
        with pytest.raises(SealedDataError):
            unsealed(changed, size) if length != len(ciphertext) or size == other else pytest.fail("unchanged")


@small_chunks
@given(data=st.data(), chunks=st.integers(2, 5))
def test_reordered_dropped_or_repeated_chunks_fail(data, chunks):
    step = primitives.CHUNK_BYTES + TAG_BYTES
    ciphertext = sealed(secrets.token_bytes(chunks * primitives.CHUNK_BYTES))
    pieces = [ciphertext[i * step : (i + 1) * step] for i in range(chunks)]
    order = data.draw(st.lists(st.integers(0, chunks - 1), min_size=1, max_size=chunks + 1))
    if order == list(range(chunks)):
        order = order[::-1]
    with pytest.raises(SealedDataError):
        unsealed(b"".join(pieces[i] for i in order), len(order) * primitives.CHUNK_BYTES)


headers = st.builds(
    TensorHeader,
    st.binary(min_size=16, max_size=16),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["F16", "BF16", "I8"]),
    st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
)


@given(left=headers, right=headers)
def test_headers_that_differ_encode_differently_and_seal_under_other_keys(left, right):
    if left == right:
        return
    assert left.encode() != right.encode()
    assert sealed(b"x" * 20, left) != sealed(b"x" * 20, right)
    with pytest.raises(SealedDataError):
        unsealed(sealed(b"x" * 20, left), 20, right)


def test_no_unauthenticated_plaintext_stays_in_the_buffer():
    ciphertext = bytearray(sealed(b"\x41" * 5000))
    ciphertext[-1] ^= 1
    source, out = io.BytesIO(ciphertext), bytearray(b"\xff" * 5000)
    with pytest.raises(SealedDataError):
        unseal_into(KEY, HEADER, source.readinto, memoryview(out))
    assert not any(out)


def test_bundle_keys_depend_on_each_input():
    one, other, vendor = b"a" * 16, b"b" * 16, b"v" * 32
    keys = {derive_bundle_key(KEY, one, vendor), derive_bundle_key(KEY, other, vendor), KEY}
    keys |= {derive_bundle_key(b"k" * 32, one, vendor), derive_bundle_key(KEY, one, b"w" * 32)}
    assert len(keys) == 5


@pytest.mark.parametrize(("key_size", "id_size"), [(31, 16), (33, 16), (0, 16), (32, 15), (32, 0)])
def test_wrong_key_sizes_are_refused(key_size, id_size):
    with pytest.raises(ValueError, match="32 bytes"):
        derive_bundle_key(bytes(key_size), bytes(id_size), bytes(32))


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block of output."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_format_is_the_one_in_the_specification():
    """Written from docs/bundle-format.md alone; bundles in the field depend on every byte of it."""
    sealing_key, bundle_id, vendor = bytes(range(32)), bytes(range(16)), bytes(range(100, 132))
    name, dtype, shape = "w.ü", "U8", (CHUNK_BYTES + 3,)
    plaintext = bytes(i * 7 % 251 for i in range(shape[0]))
    bundle_key = hkdf(sealing_key, bundle_id, b"semiopen bundle key v1" + vendor)
    bound = b"semiopen sealed tensor v1" + bundle_id
    for text in (name, dtype):
        bound += len(text.encode()).to_bytes(4, "little") + text.encode()
    bound += len(shape).to_bytes(4, "little") + b"".join(size.to_bytes(8, "little") for size in shape)
    cipher = AESGCM(hkdf(bundle_key, b"", bound))
    expected = cipher.encrypt(bytes(11) + b"\x00", plaintext[:CHUNK_BYTES], bound)
    expected += cipher.encrypt(bytes(10) + b"\x01\x01", plaintext[CHUNK_BYTES:], bound)

    assert derive_bundle_key(sealing_key, bundle_id, vendor) == bundle_key
    found = sealed(plaintext, TensorHeader(bundle_id, name, dtype, shape), bundle_key)
    assert hashlib.sha256(found).hexdigest() == hashlib.sha256(expected).hexdigest()
