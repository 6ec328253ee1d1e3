"""Leases: what a vendor signs comes back whole, and nothing else is taken, whatever its header says."""

import base64
import hmac
import json
import time

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from semiopen.bundle.lease import LONGEST_LEASE, Rights, check_time, sign_lease, verify_lease
from semiopen.bundle.signature import vendor_key_id
from semiopen.errors import LeaseError

BUNDLE = "0f" * 16
BEGIN, END = 1_000_000, 2_000_000
NOW = 1_500_000
KEY, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key()
HEADER = {"alg": "ES256", "typ": "semiopen-lease+jwt"}


def lease_text(key: ec.EllipticCurvePrivateKey = KEY, **changes) -> str:
    given = {
        "bundle_id": BUNDLE,
        "customer": "acme",
        "issued": BEGIN,
        "begins": BEGIN,
        "ends": END,
        "tokens": 1000,
        "rate": 60,
        "rights": Rights(),
    }
    return sign_lease(key, **{**given, **changes})


def check(text: str, bundle: str = BUNDLE, now: float = NOW):
    return verify_lease(text, PUBLIC, bundle, now)


def encode(data: bytes | dict) -> str:
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def claims(**changes) -> dict:
    """Claims that are right, with changes; those that become None are left out."""
    found = {**json.loads(decode(lease_text().split(".")[1])), **changes}
    return {name: value for name, value in found.items() if value is not None}


def signed(claims: dict | bytes, header: dict | bytes = HEADER, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    """A token with an ES256 signature that no library of the verifier's has made."""
    text = f"{encode(header)}.{encode(claims)}"
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def refused(text: str, match: str = "lease", **how) -> None:
    """It must be refused, with one sentence that says what to do and holds nothing of the token."""
    with pytest.raises(LeaseError, match=match) as caught:
        check(text, **how)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300
    assert any(word in message for word in ("ask ", "give ", "wait ", "use it "))
    for part in text.split("."):
        assert len(part) < 12 or part not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__, "a traceback would show the token"


def test_round_trip():
    rights = Rights(generate=False, logits="top-k", top_k=5, tune=True)
    lease = check(lease_text(rights=rights, tokens=None, customer="Ärzte & Co") + "\n")
    assert (lease.iss, lease.sub, lease.bundle) == (vendor_key_id(PUBLIC), "Ärzte & Co", BUNDLE)
    assert (lease.nbf, lease.exp, lease.tokens, lease.rate) == (BEGIN, END, None, 60)
    assert lease.rights == rights
    assert check(lease_text()).jti != check(lease_text()).jti


def test_tokens_made_by_hand_are_taken():
    """The control of the forgeries below: they fail for what they change, and for nothing else."""
    given = claims()
    assert check(signed(given)) == check(signed(given))
    assert check(signed({**claims(), "tokens": 5, "rate": None})).tokens == 5


def test_rights_of_the_head():
    assert not Rights().all_logits
    assert not Rights(logits="top-k", top_k=3).all_logits
    assert all(right.all_logits for right in (Rights(logits="full"), Rights(distil=True), Rights(tune=True)))


# --- Forgeries ---


@pytest.mark.parametrize("part", [0, 1, 2], ids=["header", "claims", "signature"])
def test_any_changed_byte_is_refused(part):
    """Each byte of each part, decoded, with each of its bits turned once."""
    text = lease_text()
    parts = text.split(".")
    data = decode(parts[part])
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << (index % 8)
        refused(".".join([*parts[:part], encode(bytes(changed)), *parts[part + 1 :]]))


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_any_changed_character_is_refused(data):
    """But for the bits at the end of base64 that stand for nothing: then the same lease comes out."""
    text = lease_text()
    at = data.draw(st.integers(0, len(text) - 1))
    with_other = data.draw(st.characters(codec="ascii").filter(lambda c: c != text[at]))
    changed = text[:at] + with_other + text[at + 1 :]
    try:
        taken = check(changed)
    except LeaseError:
        return
    assert taken == check(text)
    assert at == len(text) - 1 or text[at + 1] == "."


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.text()
    | st.text(alphabet='abcXYZ019-_.={}"', max_size=300)
    | st.binary().map(lambda b: encode(b) + ".." + encode(b))
)
def test_any_text_is_refused(text):
    refused(text, "signed by the vendor|far too long")


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "...", "....", ".".join("abcde"), "null", "{}", "\x00", "é.é.é", "[" * 16000, "a." * 8000],
    ids=range(12),
)
def test_what_is_no_token_is_refused(text):
    refused(text, "not signed by the vendor")


@pytest.mark.parametrize("size", [LONGEST_LEASE + 1, 1 << 20])
def test_what_is_too_long_is_refused_at_once(size):
    text = lease_text()
    begun = time.perf_counter()
    refused(text + " " * (size - len(text)), "far too long")
    refused("A" * size, "far too long")
    assert time.perf_counter() - begun < 1


def test_a_lease_of_another_vendor():
    refused(lease_text(OTHER), "not signed by the vendor")
    refused(signed(claims(), key=OTHER), "not signed by the vendor")  # that claims to be this one's
    refused(signed(claims(), {**HEADER, "kid": vendor_key_id(PUBLIC)}, OTHER), "not signed by the vendor")


def test_a_key_in_the_header_is_not_believed():
    numbers = OTHER.public_key().public_numbers()
    x, y = (encode(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    jwk = {"kty": "EC", "crv": "P-256", "x": x, "y": y}
    for extra in ({"jwk": jwk}, {"jku": "http://localhost/keys"}, {"x5u": "http://localhost/x"}, {"kid": "../../key"}):
        refused(signed(claims(), {**HEADER, **extra}, OTHER), "not signed by the vendor")


@pytest.mark.parametrize("name", ["none", "None", "NONE", "", None, 0, ["ES256"], "HS256", "RS256", "ES384", "EdDSA"])
def test_a_header_does_not_choose_the_algorithm(name):
    """Whatever it names, with the vendor's own signature or with none."""
    text = f"{encode({**HEADER, 'alg': name})}.{encode(claims())}"
    refused(text + ".", "not signed by the vendor")
    refused(signed(claims(), {**HEADER, "alg": name}), "not signed by the vendor")
    refused(signed(claims(), {"typ": HEADER["typ"]}), "not signed by the vendor")


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_the_public_key_is_no_shared_secret(digest):
    """The classic confusion: an HMAC under the vendor's public key, in each form that a program might hold it."""
    names = {"sha256": "HS256", "sha384": "HS384", "sha512": "HS512"}
    text = f"{encode({**HEADER, 'alg': names[digest]})}.{encode(claims())}"
    pem = PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    forms = [
        pem,
        pem.strip(),
        PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        PUBLIC.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        b"",
    ]
    for secret in forms:
        refused(f"{text}.{encode(hmac.new(secret, text.encode(), digest).digest())}", "not signed by the vendor")


def test_another_kind_of_key_does_not_sign():
    text = f"{encode({**HEADER, 'alg': 'EdDSA'})}.{encode(claims())}"
    refused(f"{text}.{encode(ed25519.Ed25519PrivateKey.generate().sign(text.encode()))}", "not signed by the vendor")


@pytest.mark.parametrize("signature", [b"", bytes(64), b"\xff" * 64, bytes(63), bytes(65), bytes(32)], ids=range(6))
def test_an_empty_signature(signature):
    """Zeros once passed as ECDSA in a well-known library."""
    refused(f"{encode(HEADER)}.{encode(claims())}.{encode(signature)}", "not signed by the vendor")


def test_a_signature_in_the_form_of_the_bundles():
    """DER, not the 64 bytes of a JWT."""
    text = f"{encode(HEADER)}.{encode(claims())}"
    refused(f"{text}.{encode(KEY.sign(text.encode(), ec.ECDSA(hashes.SHA256())))}", "not signed by the vendor")


@pytest.mark.parametrize("typ", ["JWT", "jwt", "semiopen-lease", "SEMIOPEN-LEASE+JWT", None, 1])
def test_another_token_of_the_vendor_is_no_lease(typ):
    refused(
        signed(claims(), {**HEADER, "typ": typ}), "no lease" if isinstance(typ, str) else "not signed by the vendor"
    )


def test_header_extensions_that_must_be_understood():
    refused(signed(claims(), {**HEADER, "crit": ["exp"], "exp": 1}))
    refused(signed(claims(), {**HEADER, "crit": ["b64"], "b64": False}))


def test_an_encrypted_token():
    header = {"alg": "dir", "enc": "A256GCM", "typ": HEADER["typ"]}
    refused(".".join([encode(header), "", encode(bytes(12)), encode(b"{}"), encode(bytes(16))]))


# --- Claims of the vendor's own that are wrong ---


@pytest.mark.parametrize(
    "changes",
    [{name: None} for name in ("iss", "sub", "jti", "iat", "nbf", "exp", "bundle")]
    + [
        {"surprise": 1},
        {"rights": {"generate": True, "everything": True}},
        {"rights": {"generate": 1}},
        {"rights": {"logits": "all"}},
        {"rights": {"logits": "top-k"}},
        {"rights": {"logits": "none", "top_k": 5}},
        {"rights": {"logits": "top-k", "top_k": -1}},
        {"rights": {"logits": "top-k", "top_k": 2000}},
        {"rights": ["tune"]},
        {"aud": "somebody"},
        {"aud": ["semiopen-enclave"]},
        {"iss": "0" * 63},
        {"iss": "G" * 64},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 257},
        {"jti": "../../etc/passwd"},
        {"jti": "A" * 32},
        {"bundle": BUNDLE.upper()},
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": 1.0},
        {"tokens": "1000"},
        {"tokens": True},
        {"tokens": 2**63},
        {"rate": 0},
        {"exp": str(END)},
        {"exp": float(END)},
        {"exp": -1},
        {"exp": 10**30},
        {"nbf": True},
    ],
    ids=str,
)
def test_claims_that_are_missing_or_of_another_kind(changes):
    refused(signed(claims(**changes)), "malformed")


@pytest.mark.parametrize(
    "payload", [b"[]", b"null", b'"text"', b"1", b"{", b"", b"\xff", b'{"exp":NaN}', b"[" * 5000], ids=range(9)
)
def test_claims_that_are_no_object(payload):
    refused(signed(payload))


def test_a_long_name_of_a_claim_is_not_repeated():
    refused(signed({**claims(), "x" * 3000: 1}), "malformed")


def test_an_issuer_that_is_not_the_signer():
    refused(signed(claims(iss=vendor_key_id(OTHER.public_key()))), "names another vendor")


def test_another_bundle():
    refused(lease_text(), "for another bundle", bundle="f0" * 16)


@pytest.mark.parametrize(("now", "match"), [(BEGIN - 1, "begins at"), (END, "ended at"), (END + 10**9, "ended at")])
def test_outside_its_time(now, match):
    refused(lease_text(), match, now=now)


def test_its_time_is_half_open():
    lease = check(lease_text(), now=BEGIN)
    assert check(lease_text(), now=END - 0.001).exp == END
    with pytest.raises(LeaseError, match="1970-01-24 03:33:20 UTC"):
        check_time(lease, END)


# --- Making one ---


@pytest.mark.parametrize(
    "changes",
    [
        {"ends": BEGIN},
        {"ends": 0},
        {"issued": END},
        {"tokens": 0},
        {"rate": -1},
        {"customer": ""},
        {"bundle_id": "x"},
        {"begins": -5},
        {"ends": 10**12},
    ],
    ids=str,
)
def test_a_lease_that_would_never_be_valid_is_not_made(changes):
    with pytest.raises(LeaseError, match=r"give a later end|cannot be made"):
        lease_text(**changes)


def test_the_signature_is_over_all_and_by_the_key():
    """With the primitive alone, so that a verifier that checks nothing cannot agree with itself."""
    text, _, signature = lease_text().rpartition(".")
    r, s = (int.from_bytes(half, "big") for half in (decode(signature)[:32], decode(signature)[32:]))
    PUBLIC.verify(encode_dss_signature(r, s), text.encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        OTHER.public_key().verify(encode_dss_signature(r, s), text.encode(), ec.ECDSA(hashes.SHA256()))
