"""Rows of numbers that are computed once per example and kept in a file, so that a kill costs little.

They are derived from private data: files and folder are for this user alone.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from semiopen.errors import SemiopenError

Report = Callable[[str, int, int], object]


@dataclass(frozen=True)
class KeptRows:
    """A file of rows, and a note beside it of how far it has come.

    Attributes:
        folder: of both.
        name: of what they hold; `NAME.bin` has the rows, `NAME.json` the note.
        identity: of what the rows were computed from; rows kept under another one are computed again.
        row_bytes: of one row.
        starts: [N + 1] int64, the first row of each of N examples; the last entry is the number of rows.
        save_rows: rows between two notes: what a kill can cost, at most.
    """

    folder: Path
    name: str
    identity: str
    row_bytes: int
    starts: np.ndarray
    save_rows: int

    @property
    def path(self) -> Path:
        """Of the rows."""
        return self.folder / f"{self.name}.bin"

    @property
    def note(self) -> Path:
        """Of the note."""
        return self.folder / f"{self.name}.json"


def keep_rows(
    kept: KeptRows, passes: Callable[[int], Iterator[tuple[int, memoryview]]], report: Report, no_room: str
) -> int:
    """Bring the file up to all examples; return the rows that were there already.

    Args:
        kept: what to bring up.
        passes: given the first example that is missing, yields (first row, rows) of groups of whole examples in order.
        report: told how many rows are there.
        no_room: message for a full disk, with {need}, {free} in GB and {folder}.

    Raises:
        SemiopenError: the disk has no room. What `passes` raises goes on; what is noted by then stays.
    """
    kept.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    starts, rows = kept.starts, int(kept.starts[-1])
    first = _examples_done(kept)
    if first and (not kept.path.is_file() or kept.path.stat().st_size < int(starts[first]) * kept.row_bytes):
        first = 0  # someone has cut the file
    reused = int(starts[first])
    missing, free = (rows - reused) * kept.row_bytes, shutil.disk_usage(kept.folder).free
    if missing > free:
        raise SemiopenError(no_room.format(need=missing / 1e9, free=free / 1e9, folder=kept.folder))
    descriptor = os.open(kept.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:  # noqa: PTH123 - a descriptor
        file.truncate(reused * kept.row_bytes)
        file.seek(reused * kept.row_bytes)
        report(kept.name, reused, rows)
        saved = end = reused

        def save() -> None:
            file.flush()
            os.fsync(file.fileno())  # the note must never be ahead of the rows
            note = {"identity": kept.identity, "examples": int(np.searchsorted(starts, end))}
            write_private(kept.note, json.dumps(note))

        try:
            for begin, data in passes(first):
                file.write(data)
                end = begin + len(data) // kept.row_bytes
                report(kept.name, end, rows)
                if end - saved >= kept.save_rows or end == rows:
                    save()
                    saved = end
        except SemiopenError:
            save()  # a refusal, as of an enclave whose lease is used up: what was paid for is kept
            raise
    return reused


def as_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return rows.contiguous().view(torch.uint8).numpy().data.cast("B")


def _examples_done(kept: KeptRows) -> int:
    try:
        note = json.loads(kept.note.read_text())
    except FileNotFoundError:
        return 0
    return note["examples"] if note["identity"] == kept.identity else 0


def write_private(path: Path, text: str) -> None:
    """Write a small file for this user alone, whole or not at all."""
    beside = path.with_name(path.name + ".part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:  # noqa: PTH123 - a descriptor
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
