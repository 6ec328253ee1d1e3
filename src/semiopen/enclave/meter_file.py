"""The use of a lease, on the host's disk, so that a restart does not begin at zero.

The disk is the host's: it can put back an older copy of this file, or delete it, and then tokens count again. It cannot
write a number of its own choice, nor take another lease's, as the line carries a MAC under a key that only the enclave
has. A counter in hardware, or the broker, would close that.

The number written runs ahead of the use, so that a kill never leaves too small a number there; what it runs ahead by is
lost to the customer then.
"""

import errno
import fcntl
import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

from semiopen.bundle.lease import Lease
from semiopen.errors import LeaseError

_LINE_BYTES = 256
_AHEAD = 1024


class MeterFile:
    """One lease's file, open and locked as long as this object."""

    def __init__(self, path: Path, lease: Lease, key: bytes) -> None:
        """Open or make the file; to be done while the enclave may still open files.

        Args:
            path: on the host's disk.
            lease: verified.
            key: 32 bytes for the MAC.

        Raises:
            LeaseError: another enclave counts there, the file is another lease's or was changed, or it cannot be
                written.
        """
        self._lease, self._key = lease.jti, key
        self._ahead = _AHEAD if lease.tokens is None else max(1, min(_AHEAD, lease.tokens // 100))
        self._limit = lease.tokens
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise LeaseError(f"The lease's meter {path} cannot be used ({error.strerror}); give another.") from None
        try:
            self.used: tuple[int, int] = self._take(path)
        except LeaseError:
            os.close(self._descriptor)  # and its lock with it
            raise

    def _take(self, path: Path) -> tuple[int, int]:
        """Lock the file, and read what is counted there."""
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # a device takes any number, and keeps none
                raise LeaseError(f"The lease's meter {path} is not a file; give another.")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            line = os.pread(self._descriptor, _LINE_BYTES + 1, 0)
            used = self._parse(line, path) if line else (0, 0)
            self._write(used)
        except BlockingIOError:
            raise LeaseError(f"Another enclave uses this lease now ({path}); stop it first.") from None
        except OSError as error:
            raise LeaseError(f"The lease's meter {path} cannot be used ({error.strerror}); give another.") from None
        return used

    def save(self, tokens: int, answers: int) -> None:
        """Note the use so far.

        Raises:
            OSError: it cannot be written.
        """
        if tokens > self._written[0] or answers > self._written[1]:
            self._write((self._round_up(tokens), self._round_up(answers)))

    def close(self, tokens: int, answers: int) -> None:
        """Note the exact use at the end."""
        self._write((tokens, answers))
        os.close(self._descriptor)

    def _round_up(self, count: int) -> int:
        ahead = count + self._ahead
        return ahead if self._limit is None else max(count, min(ahead, self._limit))

    def _write(self, used: tuple[int, int]) -> None:
        document = {"lease": self._lease, "tokens": used[0], "answers": used[1], "mac": self._mac(used)}
        line = json.dumps(document).encode().ljust(_LINE_BYTES - 1) + b"\n"
        if os.pwrite(self._descriptor, line, 0) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._written = used

    def _parse(self, line: bytes, path: Path) -> tuple[int, int]:
        try:
            document = json.loads(line)
            used = (document["tokens"], document["answers"])
            mac = document["mac"]
            good = bool(
                document["lease"] == self._lease
                and all(type(count) is int and 0 <= count < 2**63 for count in used)
                and hmac.compare_digest(mac, self._mac(used))
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            used, good = (0, 0), False
        if not good:
            raise LeaseError(
                f"{path} is not this lease's meter, or was changed; keep each lease under a name of its own, or "
                "restore the meter."
            )
        return used

    def _mac(self, used: tuple[int, int]) -> str:
        text = f"semiopen meter v1 {self._lease} {used[0]} {used[1]}"
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
