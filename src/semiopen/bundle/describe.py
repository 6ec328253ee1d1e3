"""What is in a bundle, for people: read without keys, and honest about what was not verified."""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from semiopen.bundle.files import Progress, read_file
from semiopen.bundle.reader import VerifiedBundle, read_files
from semiopen.bundle.signature import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE_NAME,
    signed_payload_digest,
    vendor_key_id,
)


@dataclass(frozen=True)
class Description:
    """A bundle whose files are those that its signature lists.

    Attributes:
        bundle: manifest and digests.
        sizes: bytes of each file.
        signed_by: id of the vendor key that the signature was verified with; None when no key was given, and
            then anyone may have made this bundle.
    """

    bundle: VerifiedBundle
    sizes: dict[str, int]
    signed_by: str | None


def describe(
    folder: Path, vendor_key: ec.EllipticCurvePublicKey | None, progress: Progress | None = None
) -> Description:
    """Check a bundle's files against its signature, and the signature where the vendor's key is given.

    Raises:
        BundleError: a file is missing, added or changed, or the signature is not this vendor's.
    """
    trust = vendor_key or signed_payload_digest(read_file(folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES))
    bundle = read_files(folder, trust, progress=progress)
    sizes = {name: (folder / name).stat().st_size for name in bundle.digests}
    return Description(bundle, sizes, vendor_key_id(vendor_key) if vendor_key else None)
