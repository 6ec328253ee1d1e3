"""What the teacher says of the data, computed once and kept: its likeliest tokens, and the rest together.

A row for each learned token: K token ids (int32) and K + 1 log-probabilities (float16). They are derived from private
data, and with enough of them they are training data for a copy of the teacher; so they lie in files that only this
user may read, and go when the run ends.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from semiopen.host.distilling.losses import TopK
from semiopen.host.tuning.data import Examples
from semiopen.host.tuning.kept_rows import KeptRows, Report, keep_rows

_SAVE_TOKENS = 1 << 14  # rows between notes of how far it has come


class KeptTargets:
    """Targets of some examples, mapped from a file."""

    def __init__(self, path: Path, k: int, starts: np.ndarray) -> None:
        self._rows = np.memmap(path, dtype=row_type(k), mode="r", shape=(int(starts[-1]),))
        self._starts = starts

    def of(self, place: int) -> TopK:
        """Targets of the learned tokens of one example."""
        rows = self._rows[int(self._starts[place]) : int(self._starts[place + 1])]
        return TopK(torch.from_numpy(rows["ids"].astype(np.int64)), torch.from_numpy(rows["log_probs"].copy()))


def row_type(k: int) -> np.dtype:
    """How one row lies in the file."""
    return np.dtype([("ids", "<i4", (k,)), ("log_probs", "<f2", (k + 1,))])


def keep_targets(
    ask: Callable[[np.ndarray], TopK],
    examples: Examples,
    indices: np.ndarray,
    k: int,
    batch_size: int,
    folder: Path,
    name: str,
    identity: str,
    report: Report,
) -> tuple[KeptTargets, int]:
    """Ask the teacher about some examples; what an earlier run has left in `folder` is not asked again.

    Args:
        ask: given indices of examples, says what the teacher says of their learned tokens.
        examples: of all data.
        indices: of the examples to ask about.
        k: likeliest tokens that are kept.
        batch_size: examples asked about at once.
        folder: of the file.
        name: of the file, and for `report`.
        identity: of bundle, dtype, data and what else decides the numbers.
        report: told how many learned tokens are done.

    Returns:
        The targets, and how many of the examples' tokens an earlier run had asked about.

    Raises:
        EnclaveError: the enclave refuses, or is gone; what is done by then stays in the folder.
        SemiopenError: the disk has no room.
    """
    learned = [int(examples.learned[examples.span(int(index))].sum()) for index in indices]
    starts = np.cumsum([0, *learned], dtype=np.int64)

    def passes(first: int) -> Iterator[tuple[int, memoryview]]:
        for begin in range(first, len(indices), batch_size):
            found = ask(indices[begin : begin + batch_size])
            rows = np.empty(len(found.ids), dtype=row_type(k))
            rows["ids"] = found.ids.numpy(force=True)
            rows["log_probs"] = found.log_probs.numpy(force=True)
            yield int(starts[begin]), memoryview(rows.tobytes())

    kept = KeptRows(folder, name, identity, row_type(k).itemsize, starts, _SAVE_TOKENS)
    reused = keep_rows(
        kept,
        passes,
        report,
        "What the teacher says needs {need:.1f} GB in {folder}, which has {free:.1f}; give --work FOLDER on a larger "
        "disk, or a smaller --top-k.",
    )
    there = int(np.searchsorted(starts, reused))
    return KeptTargets(kept.path, k, starts), int(examples.lengths[indices[:there]].sum())
