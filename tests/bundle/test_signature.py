"""Signatures: interchange with the stock OpenSSF tool, and refusal of everything but one strict form."""

import base64
import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_helpers import Vendor, make_vendor
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from semiopen.bundle.reader import read_files
from semiopen.bundle.signature import sign_folder, vendor_key_id, verify_signature, verify_signed_files
from semiopen.errors import BundleError


def stock_tool(command: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    signature = folder / "model.sig"
    arguments = [command, "key", str(folder), "--signature", str(signature), *options]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "model_signing", *arguments], capture_output=True, text=True
    )


def write_keys(folder: Path, vendor: Vendor) -> tuple[Path, Path]:
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(vendor.signing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(vendor.vendor_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    # "d.txt" and "d/x" sort differently by characters and by path components; names with spaces and umlauts
    for name in ("a.txt", "d.txt", "d/x.bin", "d/e/f", "größe 1.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 100)
    return root


def test_the_stock_tool_verifies_a_bundle(bundle_folder, vendor, tmp_path):
    _, public = write_keys(tmp_path, vendor)
    result = stock_tool("verify", bundle_folder, "--public_key", str(public))
    assert result.returncode == 0, result.stderr
    (bundle_folder / "config.json").write_bytes(b'{"model_type": "other"}')
    assert stock_tool("verify", bundle_folder, "--public_key", str(public)).returncode != 0


def test_the_stock_tool_verifies_odd_names_and_ignores_what_we_ignore(folder, vendor, tmp_path):
    _, public = write_keys(tmp_path, vendor)
    sign_folder(folder, vendor.signing_key)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.lock").write_bytes(b"")
    result = stock_tool("verify", folder, "--public_key", str(public))
    assert result.returncode == 0, result.stderr


def test_we_verify_what_the_stock_tool_signs(bundle_folder, folder, vendor, tmp_path):
    private, _ = write_keys(tmp_path, vendor)
    for root in (folder, bundle_folder):
        expected = {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
            if path.is_file() and path.name != "model.sig"
        }
        (root / "model.sig").unlink(missing_ok=True)
        assert stock_tool("sign", root, "--private_key", str(private)).returncode == 0
        assert verify_signature((root / "model.sig").read_bytes(), vendor.vendor_key) == expected
    assert read_files(bundle_folder, vendor.vendor_key).digests == expected


def test_files_that_a_signer_left_out_are_not_accepted(bundle_folder, vendor, tmp_path):
    """The stock tool believes the signature's own list of ignored paths; we do not."""
    private, public = write_keys(tmp_path, vendor)
    left_out = bundle_folder / "config.json"
    (bundle_folder / "model.sig").unlink()
    options = ("--private_key", str(private), "--ignore-paths", str(left_out))
    assert stock_tool("sign", bundle_folder, *options).returncode == 0
    assert stock_tool("verify", bundle_folder, "--public_key", str(public)).returncode == 0
    with pytest.raises(BundleError, match=r"config\.json"):
        read_files(bundle_folder, vendor.vendor_key)


def test_wrong_vendor(folder, vendor):
    sign_folder(folder, vendor.signing_key)
    with pytest.raises(BundleError, match="vendor's key"):
        verify_signature((folder / "model.sig").read_bytes(), make_vendor().vendor_key)


def test_a_forged_hint_does_not_help(folder, vendor):
    """The hint is not signed: someone else's signature that claims this vendor's key."""
    other = make_vendor()
    sign_folder(folder, vendor.signing_key)
    hint = json.loads((folder / "model.sig").read_bytes())["verificationMaterial"]
    sign_folder(folder, other.signing_key)
    forged = json.loads((folder / "model.sig").read_bytes()) | {"verificationMaterial": hint}
    with pytest.raises(BundleError, match="vendor's key"):
        verify_signature(json.dumps(forged).encode(), vendor.vendor_key)


def test_other_curves_are_misuse(folder, vendor):
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(ValueError, match="P-256"):
        sign_folder(folder, other)
    with pytest.raises(ValueError, match="P-256"):
        verify_signature(b"{}", other.public_key())


def test_key_id_is_the_digest_of_the_public_key(vendor):
    der = vendor.vendor_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert vendor_key_id(vendor.vendor_key) == hashlib.sha256(der).hexdigest()


# From here on, statements that a vendor's key did sign, but that no correct tool writes.


def statement(names: list[str]) -> dict:
    digest = hashlib.sha256(b"x").digest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": hashlib.sha256(digest * len(names)).hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": n, "algorithm": "sha256", "digest": digest.hex()} for n in names],
        },
    }


def signed(payload: bytes, vendor: Vendor, payload_type: str = "application/vnd.in-toto+json") -> dict:
    encoded = b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)
    pem = vendor.vendor_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = vendor.signing_key.sign(encoded, ec.ECDSA(hashes.SHA256()))
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(pem).hexdigest()}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def verify(document: object, vendor: Vendor) -> dict[str, str]:
    return verify_signature(json.dumps(document).encode(), vendor.vendor_key)


def changed(document: dict, path: str, value: object) -> dict:
    """A copy with the value at a dotted path replaced; `...` deletes it."""
    result = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = result
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


def test_the_helper_makes_valid_signatures(vendor):
    payload = json.dumps(statement(["a", "b/c"])).encode()
    result = verify_signed_files(json.dumps(signed(payload, vendor)).encode(), vendor.vendor_key)
    assert list(result.digests) == ["a", "b/c"]
    assert result.payload_digest == hashlib.sha256(payload).hexdigest()


ODD_NAMES = ["/etc/passwd", "../a", "a/../b", "a/..", ".", "..", "", "a//b", "a/", "./a", "a\\b"]
ODD_NAMES += ["a\x00b", "a\nb", "\ud800", "model.sig"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_paths_that_leave_the_folder_or_are_not_plain(name, vendor):
    with pytest.raises(BundleError):
        verify(signed(json.dumps(statement(["ok", name])).encode(), vendor), vendor)


def test_a_name_listed_twice(vendor):
    with pytest.raises(BundleError, match="twice"):
        verify(signed(json.dumps(statement(["a", "a"])).encode(), vendor), vendor)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("predicateType", "https://model_signing/Digests/v0.1"),
        ("surprise", 1),
        ("subject", []),
        ("subject", statement(["a"])["subject"] * 2),
        ("subject", {}),
        ("subject.0.digest.sha256", "0" * 64),
        ("subject.0.digest.sha256", ...),
        ("subject.0.digest.sha512", "0" * 128),
        ("predicate", []),
        ("predicate.resources", ...),
        ("predicate.resources", {}),
        ("predicate.resources.0", "a"),
        ("predicate.resources.0.algorithm", "blake3"),
        ("predicate.resources.0.digest", "ab"),
        ("predicate.resources.0.digest", "Z" * 64),
        ("predicate.resources.0.digest", hashlib.sha256(b"x").hexdigest().upper()),
        ("predicate.resources.0.name", 1),
        ("predicate.resources.0.surprise", 1),
        ("predicate.serialization.method", "shards"),
        ("predicate.serialization.hash_type", "blake2"),
        ("predicate.serialization.allow_symlinks", True),
        ("predicate.serialization.allow_symlinks", 0),
        ("predicate.serialization.shard_size", 5),
    ],
)
def test_statements_of_another_form(path, value, vendor):
    payload = json.dumps(changed(statement(["a"]), path, value)).encode()
    with pytest.raises(BundleError, match=r"model\.sig"):
        verify(signed(payload, vendor), vendor)


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b"{}", b'{"_type": 1, "_type": 2}', b"[" * 100_000])
def test_payloads_that_are_no_statement(payload, vendor):
    with pytest.raises(BundleError, match=r"model\.sig"):
        verify(signed(payload, vendor), vendor)


def test_a_signature_over_another_payload_type_is_not_taken_for_a_statement(vendor):
    payload = json.dumps(statement(["a"])).encode()
    other = signed(payload, vendor, payload_type="application/json")
    with pytest.raises(BundleError, match="another type"):
        verify(other, vendor)
    other["dsseEnvelope"]["payloadType"] = "application/vnd.in-toto+json"
    with pytest.raises(BundleError, match="vendor's key"):
        verify(other, vendor)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mediaType", "application/vnd.dev.sigstore.bundle.v0.2+json"),
        ("surprise", 1),
        ("dsseEnvelope", ...),
        ("dsseEnvelope.surprise", 1),
        ("dsseEnvelope.payload", 5),
        ("dsseEnvelope.payload", "!!!"),
        ("dsseEnvelope.signatures", []),
        ("dsseEnvelope.signatures.0.sig", ""),
        ("dsseEnvelope.signatures.0.sig", "AAAA"),
        ("verificationMaterial.publicKey", ...),
        ("verificationMaterial.tlogEntries", [{}]),
        ("verificationMaterial.certificate", {}),
    ],
)
def test_envelopes_of_another_form(path, value, vendor):
    document = signed(json.dumps(statement(["a"])).encode(), vendor)
    with pytest.raises(BundleError, match=r"model\.sig"):
        verify(changed(document, path, value), vendor)


def test_duplicate_keys_are_refused(vendor):
    """Two parsers may differ in which of the two they take, so that one verifies what the other does not use."""
    payload = json.dumps(statement(["a"]))
    twice = '{"predicate": {"resources": []}, ' + payload[1:]
    assert json.loads(twice) == json.loads(payload)
    with pytest.raises(BundleError, match="not JSON"):
        verify(signed(twice.encode(), vendor), vendor)
    document = json.dumps(signed(payload.encode(), vendor))
    with pytest.raises(BundleError, match="not JSON"):
        verify_signature(b'{"mediaType": "x", ' + document[1:].encode(), vendor.vendor_key)


def test_more_than_one_signature_is_refused(vendor):
    document = signed(json.dumps(statement(["a"])).encode(), vendor)
    document["dsseEnvelope"]["signatures"] *= 2
    with pytest.raises(BundleError, match="one signature"):
        verify(document, vendor)


def test_a_second_spelling_of_the_same_base64_is_refused(vendor):
    for size in range(3):  # one of three lengths pads with one "=", one with two
        document = signed(json.dumps(statement(["a" * (size + 1)])).encode(), vendor)
        text = document["dsseEnvelope"]["payload"]
        if text.endswith("="):
            body = text.rstrip("=")
            alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
            other = body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + text[len(body) :]
            assert base64.b64decode(other) == base64.b64decode(text)
            with pytest.raises(BundleError, match="canonical"):
                verify(changed(document, "dsseEnvelope.payload", other), vendor)
