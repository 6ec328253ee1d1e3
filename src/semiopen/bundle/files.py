"""Files in a bundle folder: which names are allowed, opening without following links, hashing in parallel."""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from semiopen.errors import BundleError

Progress = Callable[[int, int], None]
"""Called with (bytes hashed so far, bytes to hash in all), from worker threads, one call at a time."""

MANIFEST_NAME = "semiopen.json"

IGNORED_NAMES = frozenset({".git", ".gitattributes", ".github", ".gitignore", ".cache"})
"""Top-level names that git and `hf download` add beside a model. Nobody reads a model's data from them."""

_BLOCK_BYTES = 1 << 20
_MAX_WORKERS = 8


def check_is_bundle(folder: Path) -> None:
    """Refuse a folder without a manifest, before anything is started for it.

    Raises:
        BundleError: it has none.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise BundleError(f"{folder} has no {MANIFEST_NAME}, so it is not a bundle; make one with 'semiopen seal'.")


def check_name(name: str) -> None:
    """Refuse a name that is not a plain relative path inside the bundle.

    Raises:
        BundleError: absolute, with an empty, `.` or `..` part, a backslash, or characters that do not print.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"The bundle names a file {name!r}, which no bundle may contain; do not use this bundle.")


def sort_key(name: str) -> tuple[str, ...]:
    """Order of files in a signature: by path components, as the model-signing tool does."""
    return PurePosixPath(name).parts


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, as relative POSIX paths, without `IGNORED_NAMES` at the top.

    Raises:
        BundleError: the folder cannot be read, or it holds a symbolic link or something that is no file.
    """
    names: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            entries = list(os.scandir(folder / prefix))
        except OSError as error:
            raise BundleError(f"{folder / prefix} cannot be read ({error.strerror}); check the path.") from None
        for entry in entries:
            name = prefix + entry.name
            if name in IGNORED_NAMES:
                continue
            if entry.is_symlink():
                raise _link_error(name)
            if entry.is_dir():
                pending.append(name + "/")
            elif entry.is_file():
                names.append(name)
            else:
                raise BundleError(f"{name!r} in the bundle is not a regular file; remove it.")
    return sorted(names, key=sort_key)


def open_file(folder: Path, name: str) -> BinaryIO:
    """Open a file of the bundle for unbuffered reading; never a link, a device or a pipe.

    Raises:
        BundleError: missing, a symbolic link, not a regular file, or not readable.
    """
    path = folder / name
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(f"{name!r} is missing from the bundle; fetch the bundle again.") from None
    except OSError as error:
        if path.is_symlink():
            raise _link_error(name) from None
        raise BundleError(f"{name!r} cannot be read ({error.strerror}); check its permissions.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{name!r} in the bundle is not a regular file; fetch the bundle again.")
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123 - the caller closes it


def read_file(folder: Path, name: str, max_bytes: int | None = None) -> bytes:
    """All bytes of one file of the bundle.

    Raises:
        BundleError: as `open_file`, or the file is larger than `max_bytes`, or reading fails.
    """
    with open_file(folder, name) as file:
        if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
            raise BundleError(f"{name!r} is larger than any real one; fetch the bundle again.")
        try:
            return file.read()
        except OSError as error:
            raise BundleError(f"{name!r} cannot be read ({error.strerror}); check the disk.") from None


def hash_files(folder: Path, names: Iterable[str], progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of each named file, as lower-case hex, computed on several threads.

    Raises:
        BundleError: as `open_file`.
    """
    names = list(names)
    total = sum(_size(folder / name) for name in names)
    lock, done = threading.Lock(), 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    def hash_one(name: str) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
        with open_file(folder, name) as file:
            try:
                # readinto of an unbuffered file returns a count; None is for non-blocking pipes only
                while count := file.readinto(buffer):  # type: ignore[attr-defined]
                    digest.update(buffer[:count])
                    advance(count)
            except OSError as error:
                raise BundleError(f"{name!r} cannot be read ({error.strerror}); check the disk.") from None
        return digest.hexdigest()

    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(hash_one, names), strict=True))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0  # for the progress only; opening the file gives the error


def _link_error(name: str) -> BundleError:
    return BundleError(
        f"{name!r} in the bundle is a symbolic link; use real files (`hf download ... --local-dir FOLDER`)."
    )
