"""Every trust decision of the enclave: what may be opened, run and returned. No network, no disk, no model.

Whatever arrives here was sent by a hostile host: numbers may be anything, arrays may change while they are
read, and calls may come in any order. So each function takes private copies, checks all of them before anything
is changed, and raises `Refused` with a code that is part of the protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from semiopen.model.packed_step import WHOLE, PackedStep, slots_of
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.messages import FailureCode, Open, Step


class Refused(Exception):
    """A request that will not be served; `message` is safe to send to the host."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code
        self.message = message


@dataclass(frozen=True)
class Limits:
    """What one enclave grants: tokens in its KV caches in all, and the size of a step.

    `windows` are the distinct attention windows of the sealed blocks (`WHOLE` for none), in rising order.
    """

    max_kv_tokens: int
    max_step_tokens: int
    max_sequences: int
    max_sessions: int
    context: int
    vocab_size: int
    windows: tuple[int, ...]


class CheckedStep(PackedStep):
    """A step whose every number has been checked; only `check_step` makes one. No two slots of a table are equal."""


def check_open(request: Open, limits: Limits, open_sessions: int, kv_tokens_in_use: int) -> None:
    """Decide whether a session of the requested size may be opened.

    Raises:
        Refused: `limit`.
    """
    if open_sessions >= limits.max_sessions:
        raise Refused("limit", f"All {limits.max_sessions} sessions of this enclave are in use; close one first.")
    if request.step_tokens > limits.max_step_tokens or request.sequences > limits.max_sequences:
        raise Refused(
            "limit",
            f"A step may hold at most {limits.max_step_tokens} tokens of {limits.max_sequences} sequences.",
        )
    free = limits.max_kv_tokens - kv_tokens_in_use
    if request.blocks * request.block_size > free:
        raise Refused(
            "limit",
            f"The KV cache has room for {free} of {limits.max_kv_tokens} tokens; ask for less, or start the enclave "
            "with more.",
        )


class SlotLedger:
    """Which position each KV slot of a session holds, so that no step can read what was not written for it.

    Slots start empty. A sequence may only read slots that hold the very positions it claims to have, so stale
    or foreign blocks at other positions, and blocks never written, are refused. Each block table has slots of its
    own: what was written through one is not there for another.
    """

    def __init__(self, blocks: int, block_size: int, tables: int) -> None:
        self._shape = (tables, blocks, block_size)
        self._next = np.zeros((tables, blocks * block_size), dtype=np.int32)  # position + 1, so that 0 is empty

    def admit(self, step: CheckedStep) -> None:
        """Record the step's copies and writes, after checking that all its reads are of written slots.

        Raises:
            Refused: `position`; nothing is recorded then.
        """
        per_block = self._next.reshape(self._shape)
        copied_over = per_block[:, step.copies[:, 1]]
        per_block[:, step.copies[:, 1]] = per_block[:, step.copies[:, 0]]
        tables = np.arange(len(self._next))[:, None]
        written_over = self._next[tables, step.slots]
        self._next[tables, step.slots] = step.positions + 1
        if not all(self._holds(step, rows) for rows in _slices(step)):
            self._next[tables, step.slots] = written_over
            per_block[:, step.copies[:, 1]] = copied_over
            raise Refused(
                "position",
                "A sequence claims tokens that its KV blocks do not hold; send its tokens from the start.",
            )

    def _holds(self, step: CheckedStep, rows: slice) -> bool:
        """Whether the tables of some sequences hold all that these may read."""
        _, blocks, size = self._shape
        seq_lens = step.seq_lens[rows]
        first_new = seq_lens - np.diff(step.query_start)[rows]
        used = -(-int(seq_lens.max()) // size)
        wanted = np.arange(used * size)
        for table, next_position in enumerate(self._next):
            held = next_position.reshape(blocks, size)[step.block_tables[table, rows, :used]]
            held = held.reshape(len(seq_lens), -1)
            read = wanted < seq_lens[:, None]
            if step.windows and step.windows[table] != WHOLE:
                read &= wanted > (first_new - step.windows[table])[:, None]
            if ((held != wanted + 1) & read).any():
                return False
        return True

    def forget(self, step: CheckedStep) -> None:
        """Mark what an admitted step writes and copies to as never written, after it failed half way."""
        self._next[np.arange(len(self._next))[:, None], step.slots] = 0
        self._next.reshape(self._shape)[:, step.copies[:, 1]] = 0


def _slices(step: CheckedStep) -> Iterator[slice]:
    """Parts of a step's sequences, small enough that a host's claims of history cost bounded memory."""
    rows = max(1, (1 << 20) // int(step.seq_lens.max()))
    return (slice(first, first + rows) for first in range(0, len(step.seq_lens), rows))


def check_step(request: Step, arrays: SharedArrays, layout: Layout, limits: Limits, blocks: int) -> CheckedStep:
    """Copy a step's arrays out of shared memory and check every number in them.

    Args:
        request: the step's control message (its counts are untrusted too).
        arrays: shared memory, which the host may change at any moment.
        layout: sizes that this session was opened with.
        limits: this enclave's limits.
        blocks: KV blocks of this session.

    Raises:
        Refused: `shape`, `token`, `context` or `block`.
    """
    tokens, sequences, width, size = request.tokens, request.sequences, request.width, layout.block_size
    if tokens > layout.step_tokens or sequences > layout.sequences or width > layout.table_width:
        raise Refused("shape", "The step is larger than the session was opened for; split it or open a larger session.")
    if request.copies > layout.sequences:
        raise Refused("shape", "A step may copy at most one KV block per sequence.")

    def private(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int64)  # always a copy: the host cannot change it after the check

    token_ids = private(arrays.token_ids[:tokens])
    query_start = private(arrays.query_start[: sequences + 1])
    seq_lens = private(arrays.seq_lens[:sequences])
    block_tables = private(arrays.block_tables[:, :sequences, :width])
    copies = private(arrays.copies[: request.copies])

    new_tokens = np.diff(query_start)
    if query_start[0] != 0 or query_start[-1] != tokens or (new_tokens < 1).any():
        raise Refused("shape", "query_start must rise from 0 to the number of tokens, with a token for each sequence.")
    if (token_ids < 0).any() or (token_ids >= limits.vocab_size).any():
        raise Refused(
            "token",
            f"A token id is outside the vocabulary of {limits.vocab_size}; use the bundle's tokenizer.",
        )
    if (seq_lens < new_tokens).any():
        raise Refused("shape", "A sequence is shorter than the tokens sent for it.")
    if (seq_lens > limits.context).any():
        raise Refused(
            "context",
            f"A sequence is longer than the context of {limits.context} tokens; shorten the prompt.",
        )
    if (seq_lens > width * size).any():
        raise Refused("block", "A block table is too short for its sequence.")
    used = np.arange(width)[None, :] * size < seq_lens[:, None]
    if (((block_tables < 0) | (block_tables >= blocks)) & used).any():
        raise Refused("block", f"A block table names a KV block outside this session's {blocks}.")
    block_tables[:, ~used] = 0
    if ((copies < 0) | (copies >= blocks)).any() or len(np.unique(copies[:, 1])) != len(copies):
        raise Refused("block", "KV block copies must stay inside this session and have distinct destinations.")

    positions, slots = slots_of(block_tables, query_start, seq_lens, size)
    if any(len(np.unique(written)) != tokens for written in slots):
        raise Refused("block", "Two tokens of one step would be written to the same KV slot.")
    return CheckedStep(
        token_ids=token_ids,
        positions=positions,
        query_start=query_start,
        seq_lens=seq_lens,
        block_tables=block_tables,
        slots=slots,
        windows=limits.windows if layout.by_window else (),
        copies=copies,
        block_size=size,
        score_cap=request.score_cap,
    )
