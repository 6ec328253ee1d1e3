"""Issuing leases by hand. A key broker that has verified an enclave's evidence will call the same function."""

import re
import time
from pathlib import Path

from semiopen.bundle.files import check_is_bundle
from semiopen.bundle.keys import load_signing_key, load_vendor_key
from semiopen.bundle.lease import Rights, sign_lease
from semiopen.bundle.reader import read_files
from semiopen.errors import LeaseError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def new_lease(
    bundle: str | Path,
    keys: str | Path,
    customer: str,
    rights: Rights | None = None,
    tokens: int | None = None,
    rate: int | None = None,
    begins: int | None = None,
    lasts: int = 30 * 86400,
) -> str:
    """A signed lease for one bundle.

    Args:
        bundle: folder of the bundle, which must be this vendor's.
        keys: key folder of the vendor.
        customer: for whom.
        rights: what is allowed; choosing tokens alone when None.
        tokens: budget; None for no limit. `semiopen plan --attack-budget` proposes one.
        rate: tokens per minute; None for no limit.
        begins: seconds since 1970; now when None.
        lasts: seconds.

    Returns:
        The JWT.

    Raises:
        BundleError: not a bundle of this vendor's.
        KeyFolderError: the keys are not usable.
        LeaseError: a number is out of range.
    """
    folder, key_folder = Path(bundle), Path(keys)
    check_is_bundle(folder)
    manifest = read_files(folder, load_vendor_key(key_folder), only=()).manifest
    now = int(time.time())
    begins = now if begins is None else begins
    return sign_lease(
        load_signing_key(key_folder),
        bundle_id=manifest.bundle_id,
        customer=customer,
        issued=now,
        begins=begins,
        ends=begins + lasts,
        tokens=tokens,
        rate=rate,
        rights=rights or Rights(),
    )


def parse_duration(text: str) -> int:
    """Seconds of a duration such as 90s, 45m, 12h or 30d.

    Raises:
        LeaseError: it is none.
    """
    if not (match := re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)):
        raise LeaseError(f"{text!r} is no duration; write 90s, 45m, 12h or 30d.")
    return int(match[1]) * _UNITS[match[2]]
