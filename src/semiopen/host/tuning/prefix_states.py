"""The states of the sealed prefix, computed once per example and kept for all epochs.

They are derived from private data and, with enough of them, training data for a copy of the sealed blocks. On disk
they lie in files that only this user may read, and go when tuning ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from semiopen.host.embedding import EnclaveSession
from semiopen.host.tuning.data import Examples
from semiopen.host.tuning.kept_rows import KeptRows, Report, as_bytes, keep_rows

_PASS_TOKENS = 2048  # tokens of one call of the enclave
_SAVE_TOKENS = 1 << 16  # tokens between notes of how far a pass has come: what a kill can cost, at most


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
    reused = keep_rows(
        KeptRows(folder, "states", identity, size * dtype.itemsize, examples.starts, _SAVE_TOKENS),
        lambda first: ((done, as_bytes(packed)) for done, packed in _passes(session, examples, first)),
        report,
        "The prefix's states need {need:.1f} GB in {folder}, which has {free:.1f}; give --work FOLDER on a larger "
        "disk, or --states memory.",
    )
    mapped = torch.from_file(str(folder / "states.bin"), size=examples.tokens * size, dtype=dtype)
    return PrefixStates(mapped.view(-1, size), examples.tokens - reused, reused)


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
