"""Key bytes in memory of their own, that is overwritten and given back when the key is done.

`SecretBytes` uses memfd_secret(2) where the kernel has it: pages that are taken out of the kernel's own map,
never swapped, never dumped, and refused to ptrace, /proc/<pid>/mem and process_vm_readv even for root.
Otherwise plain memory, locked where the limit allows, left out of dumps. `SecretBytes.kind` tells which.

What this cannot do:

- Copies that others make are not wiped. OpenSSL keeps its own key schedule per cipher object and clears it
  when that object is freed; `bytes(view)`, `view.tobytes()`, hex and JSON are ordinary Python objects that
  nobody can overwrite. Pass the view itself on.
- The pipe a secret came through held it in a kernel page, and the sender holds its own copy.
- Registers and stacks (and what the kernel saved of them on a switch) may keep parts for a while.
- Root with a kernel module, the hypervisor and whoever holds the machine still read it: this is not a TEE.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from typing import Literal, NoReturn, Self

from semiopen.errors import EnclaveError

Kind = Literal["memfd_secret", "locked", "not locked"]
"""memfd_secret: hidden from the kernel's map, and locked. locked: never swapped. not locked: only wiped."""

_MEMFD_SECRET = 447  # the same number on x86_64 and aarch64
_MADV_DONTFORK, _MADV_DONTDUMP, _MADV_WIPEONFORK = 10, 16, 18
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = _libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SecretBytes:
    """A fixed number of secret bytes, zero at first, outside of Python's heap.

    Fill it through `view()`, or with `read_secret`. Use it as a context manager, or call `wipe()`; forgotten
    ones are wiped when the last reference goes, and by the kernel when the process ends. It cannot be
    printed, copied, pickled, turned into `bytes` or taken along by a forked child.
    """

    __slots__ = ("_array", "_length", "_pid", "kind")

    def __init__(self, length: int) -> None:
        """Reserve `length` bytes.

        Raises:
            ValueError: `length` is not positive.
            EnclaveError: there is no memory left.
        """
        if length <= 0:
            raise ValueError(f"a secret needs at least one byte, not {length}")
        size = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        address, self.kind = _reserve(size)
        self.kind: Kind
        self._length, self._pid = length, os.getpid()
        # Every memoryview holds the array: only when the last is gone is the memory unmapped, so that a view
        # kept past wipe() reads zeros and never someone else's memory.
        self._array: ctypes.Array[ctypes.c_ubyte] | None = (ctypes.c_ubyte * size).from_address(address)
        release = weakref.finalize(self._array, _wipe_and_unmap, address, size, self._pid)
        release.atexit = False  # views may live longer than the finalizer; the kernel clears the pages

    @classmethod
    def copy_of(cls, source: bytes | bytearray | memoryview) -> Self:
        """A secret with the content of `source`, for bytes that a library returned.

        A `bytes` source stays in Python's heap until that is reused; overwrite a `bytearray` yourself.
        """
        secret = cls(len(source))
        secret.view()[:] = source
        return secret

    def view(self) -> memoryview:
        """The bytes themselves, writable, without a copy; after `wipe()` such a view shows zeros.

        Raises:
            ValueError: the secret was wiped, or belongs to the parent process.
        """
        if self._array is None:
            raise ValueError("this secret was wiped")
        if os.getpid() != self._pid:
            raise ValueError("this secret stayed in the parent process")
        return memoryview(self._array).cast("B")[: self._length]

    def wipe(self) -> None:
        """Overwrite with zeros, and unmap at once or with the last view; may be called again."""
        array, self._array = self._array, None
        if array is not None and os.getpid() == self._pid:
            # A call into libc through a pointer: no compiler sees that the memory is dead, so none drops the
            # write.
            ctypes.memset(ctypes.addressof(array), 0, len(array))

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __repr__(self) -> str:
        state = "wiped" if self._array is None else self.kind
        return f"<SecretBytes: {self._length} bytes, {state}>"

    def __bytes__(self) -> NoReturn:
        raise TypeError("a secret is not turned into bytes, which could not be wiped: use view()")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is neither copied nor pickled")


def read_secret(descriptor: int, length: int, *, close: bool = True) -> SecretBytes:
    """Read a secret of exactly `length` bytes from a pipe straight into secret memory.

    Args:
        descriptor: The reading end of a pipe, blocking. Not a file: its content would stay on the disk.
        length: How many bytes the secret has.
        close: Close the descriptor afterwards, also on failure; pass False to read several secrets in a row.

    Raises:
        EnclaveError: the pipe ended early or failed; what had arrived is wiped.
    """
    secret = SecretBytes(length)
    try:
        _fill(descriptor, secret)
    except BaseException:
        secret.wipe()
        raise
    finally:
        if close:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    return secret


def _fill(descriptor: int, secret: SecretBytes) -> None:
    view, received = secret.view(), 0
    while received < len(view):
        try:
            count = os.readv(descriptor, [view[received:]])
        except OSError as error:
            raise EnclaveError(f"The secret could not be read: {error.strerror}.", "secret") from error
        if count == 0:
            raise EnclaveError(
                f"The secret ended after {received} of {len(view)} bytes; send all before closing the pipe.",
                "secret",
            )
        received += count


def _reserve(size: int) -> tuple[int, Kind]:
    """Memory for a secret: its address and kind."""
    address = _map_memfd_secret(size)
    # A shared mapping would show a forked child the secret, so the child must not get the mapping at all.
    if address is not None and _libc.madvise(address, size, _MADV_DONTFORK) == 0:
        return address, "memfd_secret"
    if address is not None:
        _libc.munmap(address, size)
    address = _map(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if address is None:
        raise EnclaveError(f"There is no memory for a secret: {os.strerror(ctypes.get_errno())}.", "secret")
    locked = _libc.mlock(address, size) == 0
    _libc.madvise(address, size, _MADV_DONTDUMP)
    _libc.madvise(address, size, _MADV_WIPEONFORK)  # a forked child sees zeros
    return address, "locked" if locked else "not locked"


def _map_memfd_secret(size: int) -> int | None:
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return None
    descriptor = _libc.syscall(ctypes.c_long(_MEMFD_SECRET), ctypes.c_long(os.O_CLOEXEC))
    if descriptor < 0:
        return None
    try:
        os.ftruncate(descriptor, size)
        return _map(size, mmap.MAP_SHARED, descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)  # the mapping stays; without a descriptor nobody maps it again


def _map(size: int, flags: int, descriptor: int) -> int | None:
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    return None if address in (None, _MAP_FAILED) else address


def _wipe_and_unmap(address: int, size: int, pid: int) -> None:
    # In a forked child the memory is not there, or holds zeros; the child must not touch it.
    if os.getpid() == pid:
        ctypes.memset(address, 0, size)
        _libc.munmap(address, size)
