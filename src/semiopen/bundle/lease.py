"""Leases: what an enclave may do with one bundle, signed by the vendor. A JWT (RFC 7519), signed with ES256.

Made and verified here only. Whatever the header says, one algorithm is accepted, and the key is the vendor's own.
"""

import base64
import json
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from semiopen.bundle.signature import vendor_key_id
from semiopen.errors import LeaseError

ALGORITHM, TYPE, AUDIENCE = "ES256", "semiopen-lease+jwt", "semiopen-enclave"
LONGEST_LEASE = 16384  # characters; far above any that is made here
_MAX_SHOWN = 80  # characters of a malformed claim's name that an error repeats
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_Seconds = Annotated[int, Field(ge=0, le=253402300799)]  # since 1970, to the year 9999
_Tokens = Annotated[int, Field(ge=1, le=2**53)]  # exact in every JSON parser
Logits = Literal["none", "top-k", "full"]


class Rights(BaseModel):
    """What the enclave may do beside running tokens through the sealed prefix.

    With a head outside the enclave, logits are the host's anyway; `logits`, `distil` and `tune` are then a licence that
    our own commands keep, not a barrier.

    Attributes:
        generate: choose tokens in the sealed head.
        logits: what leaves the sealed head beside tokens: nothing, log-probabilities of the `top_k` likeliest, or all.
        distil: logits in full, for training a student.
        tune: logits in full and gradients through the sealed head, for training an adapter. Someone determined can
            compute the head from either.
    """

    model_config = _STRICT

    generate: bool = True
    logits: Logits = "none"
    top_k: int = Field(default=0, ge=0, le=1024)
    distil: bool = False
    tune: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Rights":
        if (self.logits == "top-k") != (self.top_k > 0):
            raise ValueError("top_k goes with logits top-k, and only with it")
        return self

    @property
    def all_logits(self) -> bool:
        """Whether the sealed head may give all logits."""
        return self.logits == "full" or self.distil or self.tune


EVERYTHING = Rights(generate=True, logits="full", distil=True, tune=True)  # of a bundle that asks for no lease


class Lease(BaseModel):
    """One lease, as the claims of its JWT.

    Attributes:
        iss: id of the vendor's key.
        aud: who is meant: an enclave of this project.
        sub: the customer, in the vendor's words.
        jti: id of this lease, under which its use is counted.
        iat, nbf, exp: issued at, not valid before, not valid from then on; seconds since 1970.
        bundle: id of the bundle.
        tokens: that may be run through the prefix, and answers that the head may give; None for no limit.
        rate: tokens per minute; None for no limit.
        rights: see there.
    """

    model_config = _STRICT

    iss: str = Field(pattern="^[0-9a-f]{64}$")
    aud: Literal["semiopen-enclave"] = AUDIENCE
    sub: str = Field(min_length=1, max_length=256)
    jti: str = Field(pattern="^[0-9a-f]{32}$")
    iat: _Seconds
    nbf: _Seconds
    exp: _Seconds
    bundle: str = Field(pattern="^[0-9a-f]{32}$")
    tokens: _Tokens | None = None
    rate: _Tokens | None = None
    rights: Rights = Rights()


def sign_lease(
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    bundle_id: str,
    customer: str,
    issued: int,
    begins: int,
    ends: int,
    tokens: int | None,
    rate: int | None,
    rights: Rights,
) -> str:
    """Sign a new lease; times in seconds since 1970.

    Raises:
        LeaseError: it would never be valid, or a number is out of range.
    """
    if ends <= max(begins, issued):
        raise LeaseError("The lease would end before it begins; give a later end.")
    try:
        lease = Lease(
            iss=vendor_key_id(signing_key.public_key()),
            sub=customer,
            jti=secrets.token_hex(16),
            iat=issued,
            nbf=begins,
            exp=ends,
            bundle=bundle_id,
            tokens=tokens,
            rate=rate,
            rights=rights,
        )
    except ValidationError as error:
        raise LeaseError(f"This lease cannot be made ({_first(error)}); change that.") from None
    header = {"alg": ALGORITHM, "typ": TYPE, "kid": lease.iss}
    return jwt.encode(header, lease.model_dump(mode="json"), ECKey.import_key(signing_key), algorithms=[ALGORITHM])


def read_lease(text: str, vendor_key: ec.EllipticCurvePublicKey | None) -> Lease:
    """What a lease says; for whom it is meant, and whether it is valid now, is not looked at.

    Args:
        text: the JWT; untrusted.
        vendor_key: whose signature it must have. None believes the text, which is good for showing it alone.

    Raises:
        LeaseError: not signed by this vendor, or malformed.
    """
    if len(text) > LONGEST_LEASE:
        raise LeaseError("The lease is far too long to be one; give the file that `semiopen lease new` wrote.")
    header, claims = _unverified(text) if vendor_key is None else _verified(text, vendor_key)
    if header.get("typ") != TYPE:
        raise LeaseError("This is a token of the vendor's, but no lease; ask the vendor for a lease.")
    try:
        lease = Lease.model_validate(claims)
    except ValidationError as error:
        raise LeaseError(f"The lease is malformed ({_first(error)}); ask the vendor for another.") from None
    if vendor_key is not None and lease.iss != vendor_key_id(vendor_key):
        raise LeaseError("The lease names another vendor; ask the vendor of this bundle.")
    return lease


def _verified(text: str, vendor_key: ec.EllipticCurvePublicKey) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        token = jwt.decode(text.strip(), ECKey.import_key(vendor_key), algorithms=[ALGORITHM])
    except (JoseError, ValueError, TypeError, KeyError, RecursionError):
        raise LeaseError("The lease is not signed by the vendor of this bundle; ask the vendor for another.") from None
    return token.header, token.claims


def _unverified(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        header, claims, _ = text.strip().split(".")
        read = [json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in (header, claims)]
    except (ValueError, RecursionError):
        read = []
    if not read or not all(isinstance(part, dict) for part in read):
        raise LeaseError("This is no lease; give the file that `semiopen lease new` wrote.")
    return read[0], read[1]


def verify_lease(text: str, vendor_key: ec.EllipticCurvePublicKey, bundle_id: str, now: float) -> Lease:
    """Check a lease and return it.

    Args:
        text: the JWT; untrusted.
        vendor_key: the vendor's public key.
        bundle_id: of the bundle that is to be used.
        now: seconds since 1970.

    Raises:
        LeaseError: not signed by this vendor, for another bundle, not valid now, or malformed.
    """
    lease = read_lease(text, vendor_key)
    if lease.bundle != bundle_id:
        raise LeaseError("The lease is for another bundle; use it with that one, or ask for one for this bundle.")
    check_time(lease, now)
    return lease


def check_time(lease: Lease, now: float) -> None:
    """Raise LeaseError unless the lease is valid at `now`, in seconds since 1970."""
    if now < lease.nbf:
        raise LeaseError(f"The lease begins at {words_of(lease.nbf)}; wait until then, or set the clock right.")
    if now >= lease.exp:
        raise LeaseError(f"The lease ended at {words_of(lease.exp)}; ask the vendor for another.")


def words_of(seconds: int) -> str:
    """A time for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:_MAX_SHOWN]
    return f"{where}: {first['msg']}" if where else first["msg"]
