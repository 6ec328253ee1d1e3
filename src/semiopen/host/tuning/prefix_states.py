"""The states of the sealed prefix, computed once per example and kept for all epochs.

They are derived from private data and, with enough of them, training data for a copy of the sealed blocks. On disk
they lie in files that only this user may read, and go when tuning ends.
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
from semiopen.host.embedding import EnclaveSession
from semiopen.host.tuning.data import Examples

STATES_NAME, PROGRESS_NAME = "states.bin", "states.json"
_PASS_TOKENS = 2048  # tokens of one call of the enclave
_SAVE_TOKENS = 1 << 16  # tokens between notes of how far a pass has come: what a kill can cost, at most

Report = Callable[[str, int, int], object]


@dataclass(frozen=True)
class PrefixStates:
    """States of all examples.

    Attributes:
        states: [T, H] in the enclave's dtype, in the order of the examples; mapped from a file, or in memory.
        spent: tokens that the enclave ran for them now.
        reused: tokens whose states were there already, from an earlier run.
    """

    states: torch.Tensor
    spent: int
    reused: int


def compute_states(
    session: EnclaveSession, examples: Examples, folder: Path | None, identity: str, report: Report
) -> PrefixStates:
    """Run each example through the enclave once; what an earlier run has left in `folder` is reused.

    Args:
        session: an open session; its `score_cap` is as the model needs it.
        examples: whose ids to run.
        folder: of a file that holds the states; None to hold them in memory.
        identity: names the bundle, its dtype and the ids; states kept under another one are computed again.
        report: told how many tokens are done.

    Raises:
        EnclaveError: the enclave refuses, or is gone; what is done by then stays in the folder.
        SemiopenError: the disk has no room.
    """
    welcome = session.client.welcome
    dtype, size = getattr(torch, welcome.dtype), welcome.hidden_size
    if folder is None:
        states = torch.empty(examples.tokens, size, dtype=dtype)
        for done, packed in _passes(session, examples, 0):
            states[done : done + len(packed)] = packed
            report("states", done + len(packed), examples.tokens)
        return PrefixStates(states, examples.tokens, 0)
    reused = _write(session, examples, folder, identity, size * dtype.itemsize, report)
    mapped = torch.from_file(str(folder / STATES_NAME), size=examples.tokens * size, dtype=dtype)
    return PrefixStates(mapped.view(-1, size), examples.tokens - reused, reused)


def _write(
    session: EnclaveSession, examples: Examples, folder: Path, identity: str, token_bytes: int, report: Report
) -> int:
    """Bring the file up to all examples; return the tokens that were there already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    first = _examples_done(folder, identity)
    path = folder / STATES_NAME
    if first and (not path.is_file() or path.stat().st_size < int(examples.starts[first]) * token_bytes):
        first = 0  # someone has cut the file
    reused = int(examples.starts[first])
    missing, free = (examples.tokens - reused) * token_bytes, shutil.disk_usage(folder).free
    if missing > free:
        raise SemiopenError(
            f"The prefix's states need {missing / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f}; give --work "
            "FOLDER on a larger disk, or --states memory."
        )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:  # noqa: PTH123 - a descriptor
        file.truncate(reused * token_bytes)
        file.seek(reused * token_bytes)
        report("states", reused, examples.tokens)
        saved = reused
        for done, packed in _passes(session, examples, first):
            file.write(packed.contiguous().view(torch.uint8).numpy().data)
            end = done + len(packed)
            report("states", end, examples.tokens)
            if end - saved >= _SAVE_TOKENS or end == examples.tokens:
                file.flush()
                os.fsync(file.fileno())  # the note must never be ahead of the states
                note = {"identity": identity, "examples": int(np.searchsorted(examples.starts, end))}
                write_private(folder / PROGRESS_NAME, json.dumps(note))
                saved = end
    return reused


def _examples_done(folder: Path, identity: str) -> int:
    try:
        note = json.loads((folder / PROGRESS_NAME).read_text())
    except FileNotFoundError:
        return 0
    return note["examples"] if note["identity"] == identity else 0


def _passes(session: EnclaveSession, examples: Examples, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (place of the first token, states [t, H]) for groups of examples, from example `first` on."""
    begin = first
    while begin < len(examples):
        end, tokens = begin, 0
        while end < len(examples) and end - begin < session.sequences:
            tokens += int(examples.lengths[end])
            if end > begin and tokens > _PASS_TOKENS:
                break
            end += 1
        lengths = torch.from_numpy(examples.lengths[begin:end])
        real = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, S]
        ids = torch.zeros(real.shape, dtype=torch.long)
        span = slice(int(examples.starts[begin]), int(examples.starts[end]))
        ids[real] = torch.from_numpy(examples.ids[span]).long()
        yield span.start, session.run_once(ids, real)[real]
        begin = end


def write_private(path: Path, text: str) -> None:
    """Write a small file for this user alone, whole or not at all."""
    beside = path.with_name(path.name + ".part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:  # noqa: PTH123 - a descriptor
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
