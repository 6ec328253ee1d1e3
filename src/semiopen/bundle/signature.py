"""The vendor's signature `model.sig` in the OpenSSF model-signing format, with `cryptography` only.

A Sigstore bundle v0.3 (JSON) holds a DSSE envelope (https://github.com/secure-systems-lab/dsse, protocol
v1.0.0) around an in-toto statement v1 whose predicate lists every file with its SHA-256. The key is ECDSA on
P-256 with SHA-256. The stock `model_signing` tool verifies what we sign and the other way round;
`docs/decisions/0002-signature.md` says why it is not used here.

Verification is stricter than that tool's: no older formats, one spelling of each field, and a fixed list of
ignored paths instead of the one in the signature.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from semiopen.bundle.files import IGNORED_NAMES, Progress, check_name, hash_files, list_files, sort_key
from semiopen.errors import BundleError

SIGNATURE_NAME = "model.sig"
MAX_SIGNATURE_BYTES = 1 << 24

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class SignedFiles:
    """What a vendor signed.

    Attributes:
        digests: SHA-256 (lower-case hex) of each file by relative POSIX path.
        payload_digest: SHA-256 (hex) of the signed payload.
    """

    digests: dict[str, str]
    payload_digest: str


def vendor_key_id(public_key: ec.EllipticCurvePublicKey) -> str:
    """A fingerprint to compare by eye: SHA-256 of the key's SubjectPublicKeyInfo (DER), as 64 hex digits."""
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign_folder(
    folder: Path,
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Hash every file of a folder on several threads and write `model.sig` beside them.

    Args:
        folder: a complete bundle but for its signature; an older `model.sig` is replaced.
        signing_key: on P-256.
        name: the model's name in the statement, informative only; the folder's name by default.
        progress: told how many bytes are hashed.

    Raises:
        BundleError: the folder holds links, special files, or a name that no bundle may contain.
        ValueError: the key is on another curve.
    """
    _check_curve(signing_key.public_key())
    names = [file for file in list_files(folder) if file != SIGNATURE_NAME]
    for file in names:
        check_name(file)
    payload = _statement(name or folder.resolve().name, hash_files(folder, names, progress))
    signature = signing_key.sign(_pre_authentication_encoding(payload), ec.ECDSA(hashes.SHA256()))
    document = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": _key_hint(signing_key.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    (folder / SIGNATURE_NAME).write_text(json.dumps(document, separators=(",", ":")))


def verify_signature(sig_bytes: bytes, vendor_key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """Verify the bytes of `model.sig`; return the SHA-256 (hex) of each signed file by relative POSIX path.

    Raises:
        BundleError: not a signature in this format, or not by this vendor.
        ValueError: the key is on another curve.
    """
    return verify_signed_files(sig_bytes, vendor_key).digests


def verify_signed_files(sig_bytes: bytes, trust: ec.EllipticCurvePublicKey | str) -> SignedFiles:
    """Verify the bytes of `model.sig`.

    Args:
        sig_bytes: content of `model.sig`.
        trust: the vendor's key; or the digest (hex) of the signed statement, as told by an enclave that has
            verified the signature itself.

    Raises:
        BundleError: not a signature in this format, not by this vendor, or not of that statement.
        ValueError: the key is on another curve.
    """
    if not isinstance(trust, str):
        _check_curve(trust)
    document = _json(sig_bytes)
    _require(document, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    if document["mediaType"] != _MEDIA_TYPE:
        raise _malformed("its media type is another")
    payload, signature = _open_envelope(document["dsseEnvelope"])
    digest = hashlib.sha256(payload).hexdigest()
    if isinstance(trust, str):
        if digest != trust:
            raise BundleError(
                f"{SIGNATURE_NAME} is not of the bundle that the enclave holds; start one with this bundle."
            )
    else:
        _check_verification_material(document["verificationMaterial"], trust)
        try:
            trust.verify(signature, _pre_authentication_encoding(payload), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise _wrong_vendor() from None
    # From here on it is the vendor's word, still parsed strictly: the vendor's tool may not be ours.
    return SignedFiles(_parse_statement(_json(payload)), digest)


def signed_payload_digest(sig_bytes: bytes) -> str:
    """Digest (hex) of what `model.sig` claims to sign. Proves nothing about who signed it.

    Raises:
        BundleError: not a signature in this format.
    """
    document = _json(sig_bytes)
    _require(document, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    payload, _ = _open_envelope(document["dsseEnvelope"])
    return hashlib.sha256(payload).hexdigest()


def _statement(name: str, digests: dict[str, str]) -> bytes:
    names = sorted(digests, key=sort_key)
    root = hashlib.sha256(b"".join(bytes.fromhex(digests[file]) for file in names)).hexdigest()
    document = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(IGNORED_NAMES | {SIGNATURE_NAME}),
            },
            "resources": [{"name": file, "algorithm": "sha256", "digest": digests[file]} for file in names],
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _parse_statement(document: dict[str, Any]) -> dict[str, str]:
    _require(document, {"_type", "subject", "predicateType", "predicate"})
    if document["_type"] != _STATEMENT_TYPE or document["predicateType"] != _PREDICATE_TYPE:
        raise _malformed("its statement is of another type")
    subject, predicate = document["subject"], document["predicate"]
    if not isinstance(subject, list) or len(subject) != 1:
        raise _malformed("it must have one subject")
    _require(subject[0], {"name", "digest"})
    _require(subject[0]["digest"], {"sha256"})
    # The specification lets a predicate have more fields, which v1.0 verifiers ignore.
    if not isinstance(predicate, dict) or not {"serialization", "resources"} <= predicate.keys():
        raise _malformed("its predicate is incomplete")
    _check_serialization(predicate["serialization"])
    digests = _parse_resources(predicate["resources"])
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests.values())).hexdigest()
    if subject[0]["digest"]["sha256"] != root:
        raise _malformed("its root digest does not match its files")
    return digests


def _check_serialization(serialization: object) -> None:
    required = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    _require(serialization, set(required), optional={"ignore_paths"})
    assert isinstance(serialization, dict)
    # `ignore_paths` is not read: IGNORED_NAMES applies to every bundle, whatever the signer ignored.
    if any(
        serialization[key] != value or type(serialization[key]) is not type(value) for key, value in required.items()
    ):
        raise _malformed("it must hash whole files with SHA-256, without links")


def _parse_resources(resources: object) -> dict[str, str]:
    if not isinstance(resources, list):
        raise _malformed("its list of files is missing")
    digests: dict[str, str] = {}
    for resource in resources:
        _require(resource, {"name", "algorithm", "digest"})
        name, digest = resource["name"], resource["digest"]
        if not isinstance(name, str) or not _is_digest(digest) or resource["algorithm"] != "sha256":
            raise _malformed("a file in it has no SHA-256")
        check_name(name)
        if name in digests or name == SIGNATURE_NAME:
            raise _malformed(f"{name!r} may not be listed, or not twice")
        digests[name] = digest
    return digests


def _check_verification_material(material: object, vendor_key: ec.EllipticCurvePublicKey) -> None:
    _require(material, {"publicKey"}, optional={"tlogEntries"})
    assert isinstance(material, dict)
    if material.get("tlogEntries", []) != []:
        raise _malformed("it has transparency log entries, which a key-based signature does not need")
    _require(material["publicKey"], {"hint"})
    # Nothing is believed because of the hint; it tells the wrong vendor's key from a damaged file.
    if material["publicKey"]["hint"] != _key_hint(vendor_key):
        raise _wrong_vendor()


def _open_envelope(envelope: object) -> tuple[bytes, bytes]:
    _require(envelope, {"payload", "payloadType", "signatures"})
    assert isinstance(envelope, dict)
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise _malformed("its payload is of another type")
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _malformed("it must have one signature")
    _require(signatures[0], {"sig"}, optional={"keyid"})  # DSSE: the key id is unauthenticated, never to be used
    return _base64(envelope["payload"]), _base64(signatures[0]["sig"])


def _pre_authentication_encoding(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _key_hint(public_key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _check_curve(public_key: ec.EllipticCurvePublicKey) -> None:
    if not isinstance(public_key.curve, ec.SECP256R1):
        raise ValueError("A vendor's signing key must be on the curve P-256.")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _base64(text: object) -> bytes:
    try:
        assert isinstance(text, str)
        data = base64.b64decode(text, validate=True)
    except (AssertionError, ValueError):
        raise _malformed("it is not base64") from None
    if base64.b64encode(data).decode() != text:  # unused bits set: another spelling of the same bytes
        raise _malformed("its base64 is not canonical")
    return data


def _json(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _malformed("it is not JSON") from None
    if not isinstance(document, dict):
        raise _malformed("it is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _require(value: object, keys: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    if not isinstance(value, dict) or not keys <= value.keys() <= keys | optional:
        raise _malformed("its fields are not those of a model signature")


def _malformed(reason: str) -> BundleError:
    return BundleError(f"{SIGNATURE_NAME} is not a valid model signature ({reason}); fetch the bundle again.")


def _wrong_vendor() -> BundleError:
    return BundleError(
        f"{SIGNATURE_NAME} was not made with this vendor's key, or was changed; "
        "check whose public key you have, then fetch the bundle again."
    )
