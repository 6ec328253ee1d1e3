"""Random draws from a secret that can be drawn again years later, on any machine.

Bits come from SHAKE-256, a fixed function, because numpy and torch promise no stream of theirs for ever:

    SHAKE-256("semiopen fold v1" || secret, 32 bytes || label, UTF-8)    read as 64-bit integers, little endian

One label, one draw. Permutations, signs and scales follow from the bits alone. A rotation, or a matrix of two,
also takes logarithms and a QR decomposition in float64, so another machine may differ in its last digits (about 1e-14).
"""

import hashlib
from typing import cast

import numpy as np

from semiopen.bundle.primitives import KEY_BYTES

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def bits(secret: bytes, label: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Uniform 64-bit integers, [count].

    Raises:
        ValueError: the secret has not 32 bytes.
    """
    if len(secret) != KEY_BYTES:
        raise ValueError(f"A secret has {KEY_BYTES} bytes, not {len(secret)}.")
    digest = hashlib.shake_256(b"semiopen fold v1" + secret + label.encode()).digest(8 * count)
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permutation(secret: bytes, label: str, count: int) -> Ints:
    """A permutation of 0..count-1, int64."""
    return cast(Ints, np.argsort(bits(secret, label, count), kind="stable"))


def signs(secret: bytes, label: str, count: int) -> Floats:
    """+1 or -1, float64 [count]."""
    return np.where(bits(secret, label, count) & np.uint64(1), 1.0, -1.0)


def scales(secret: bytes, label: str, count: int) -> Floats:
    """Plus or minus 1/2, 1 or 2, float64 [count].

    Powers of two, as these change a float's exponent and sign and never its mantissa: a channel that is scaled so, and
    scaled back, loses nothing in any float format. Small ones, as fp16 has few exponents to spare.
    """
    exponents = (bits(secret, f"{label} exponents", count) % np.uint64(3)).astype(np.int64) - 1
    return signs(secret, label, count) * np.exp2(exponents)


def uniform(secret: bytes, label: str, count: int) -> Floats:
    """Numbers from 0 to 1, without 1, float64 [count]."""
    return (bits(secret, label, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def rotation(secret: bytes, label: str, count: int) -> Floats:
    """An orthogonal matrix, float64 [count, count], uniform over all of them."""
    numbers = uniform(secret, label, 2 * count * count)
    radius, angle = numbers[: count * count], numbers[count * count :]
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller; 1 - radius is never 0
    factor, triangle = np.linalg.qr(normal.reshape(count, count))
    return factor * np.sign(np.diagonal(triangle))  # without this, QR's own convention would favour some


def invertible(secret: bytes, label: str, count: int) -> Floats:
    """A matrix, float64 [count, count], that stretches by 1/2 to 2, so that it and its inverse round alike."""
    stretch = np.exp2(2 * uniform(secret, f"{label} stretch", count) - 1)
    return (rotation(secret, f"{label} left", count) * stretch) @ rotation(secret, f"{label} right", count)
