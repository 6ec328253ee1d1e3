"""The shared memory of one session: where token ids go in and hidden states come out.

Both sides compute the same layout from the numbers agreed in `Welcome` and `Open`. All integers are int32 in
native byte order (one machine). Legend: T step tokens, S sequences, G block tables per sequence, W block-table
columns, H hidden size; for a sealed head R rows, L rows with logits, V vocabulary, Q tokens of history; for
`kv: enclave` A rows of attention, N * d its size.

    token_ids    [T]        the tokens of all sequences, one after the other
    query_start  [S + 1]    where each sequence's tokens begin in token_ids; the last entry is their number
    seq_lens     [S]        tokens each sequence holds after this step
    block_tables [G, S, W]  KV blocks of each sequence, in order
    copies       [S, 2]     KV blocks to copy before the step: from, to
    hidden       [T, H]     states after the sealed prefix, in the enclave's dtype

    states       [R, H]     states below a sealed head, in the enclave's dtype; gradients of them after `Backward`
    settings     [R, 6]     fp32: temperature, top_p, min_p, repetition, presence, frequency penalty
    choices      [R, 4]     top_k, seed (low and high half), number of the token, counted from the seed
    history      [Q]        earlier tokens of all rows, one after the other: first a row's prompt, then its answer
    history_at   [R, 3]     where each row's history begins, where its answer begins, where it ends
    chosen       [R]        the tokens; numbers of words for `Reveal`, in and out
    logits       [L, V]     fp32; gradients of them for `Backward`

    attention    [A, N * d] attention of an open block for `Unmix`, in and out, in the enclave's dtype

The enclave creates this memory and forbids resizing it, so that a host cannot make it fault by truncation.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

# The numbers of a choice, each with the range that an enclave takes.
SETTINGS = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition": (0.01, 100.0),
    "presence": (-100.0, 100.0),
    "frequency": (-100.0, 100.0),
}
_STATES = ("hidden", "states", "attention")  # in the enclave's dtype
_ALIGN = 4096  # each region starts on a page of its own
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Layout:
    """Sizes of one session's shared memory, and how its blocks are divided.

    With `by_window` each sequence has a table for each of the `windows` distinct attention windows of the sealed
    blocks, else one table for all.
    """

    step_tokens: int
    sequences: int
    block_size: int
    by_window: bool
    windows: int
    context: int
    hidden_size: int
    dtype: torch.dtype
    vocab_size: int = 0
    rows: int = 0
    logit_rows: int = 0
    history: int = 0
    attention_rows: int = 0
    attention_size: int = 0

    @property
    def tables(self) -> int:
        """Block tables of each sequence."""
        return self.windows if self.by_window else 1

    @property
    def table_width(self) -> int:
        """KV blocks that one sequence of full context takes."""
        return -(-self.context // self.block_size)

    def regions(self) -> dict[str, tuple[int, ...]]:
        """Shape of each region, in order of their offsets."""
        return {
            "token_ids": (self.step_tokens,),
            "query_start": (self.sequences + 1,),
            "seq_lens": (self.sequences,),
            "block_tables": (self.tables, self.sequences, self.table_width),
            "copies": (self.sequences, 2),
            "hidden": (self.step_tokens, self.hidden_size),
            "states": (self.rows, self.hidden_size),
            "settings": (self.rows, len(SETTINGS)),
            "choices": (self.rows, 4),
            "history": (self.history,),
            "history_at": (self.rows, 3),
            "chosen": (self.rows,),
            "logits": (self.logit_rows, self.vocab_size),
            "attention": (self.attention_rows, self.attention_size),
        }

    def nbytes(self) -> int:
        """Size of the whole mapping in bytes."""
        return sum(_padded(prod(shape) * self._itemsize(name)) for name, shape in self.regions().items())

    def _itemsize(self, name: str) -> int:
        return self.dtype.itemsize if name in _STATES else 4


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


class SharedArrays:
    """A mapping of a session's shared memory: numpy arrays, and torch tensors for states, logits and attention."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.layout = layout
        self._map = mmap.mmap(fd, layout.nbytes())
        offset = 0
        arrays: dict[str, np.ndarray] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in layout.regions().items():
            size = prod(shape)
            dtype = layout.dtype if name in _STATES else torch.float32 if name == "logits" else None
            if dtype is not None:
                # An empty region has no place in the mapping.
                flat = torch.frombuffer(self._map, dtype=dtype, count=size, offset=offset) if size else torch.empty(0)
                tensors[name] = flat.to(dtype).view(shape)
            else:
                kind = np.float32 if name == "settings" else np.int32
                flat_array = np.frombuffer(self._map, dtype=kind, count=size, offset=offset) if size else np.empty(0)
                arrays[name] = flat_array.astype(kind, copy=False).reshape(shape)
            offset += _padded(size * layout._itemsize(name))
        self.hidden, self.states, self.logits = tensors["hidden"], tensors["states"], tensors["logits"]
        self.attention = tensors["attention"]
        self.token_ids = arrays["token_ids"]
        self.query_start = arrays["query_start"]
        self.seq_lens = arrays["seq_lens"]
        self.block_tables = arrays["block_tables"]
        self.copies = arrays["copies"]
        self.settings = arrays["settings"]
        self.choices = arrays["choices"]
        self.history = arrays["history"]
        self.history_at = arrays["history_at"]
        self.chosen = arrays["chosen"]

    def wipe(self) -> None:
        """Make all of it zeros, for both sides.

        Its pages go back to the system, which overwrites them before anybody gets them, so that this costs only what
        was used. Where pages are locked they are overwritten here.
        """
        try:
            self._map.madvise(mmap.MADV_REMOVE)
        except OSError:
            np.frombuffer(self._map, dtype=np.uint8)[:] = 0


def create_shared_memory(layout: Layout) -> int:
    """Create the memory of a session and return its descriptor, sealed against any change of size.

    Raises:
        OSError: the system has no such memory, or no descriptor.
    """
    fd = os.memfd_create("semiopen-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, layout.nbytes())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
