"""Every trust decision of the enclave: what may be opened, run and returned. No network, no disk, no model.

Whatever arrives here was sent by a hostile host: numbers may be anything, arrays may change while they are
read, and calls may come in any order. So each function takes private copies, checks all of them before anything
is changed, and raises `Refused` with a code that is part of the protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.ma  # numpy imports it on first use in some calls, when the enclave can open no file any more

from semiopen.model.packed_step import WHOLE, PackedStep, slots_of
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.messages import FailureCode, Open, Step

_FEW_SLOTS = 1 << 16  # of which looking at some twice costs less than finding out which


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

    A step looks at the slots of the blocks that it writes, and at one number for each block that it reads: position p
    is only ever written to the slot p % block_size of a block, so where a block's slots hold rising positions from its
    first one on, `_reach`, the position after the last of them, says which these are.
    """

    def __init__(self, blocks: int, block_size: int, tables: int) -> None:
        self._size = block_size
        self._next = np.zeros((tables, blocks, block_size), dtype=np.int32)  # position + 1, so that 0 is empty
        self._reach = np.zeros((tables, blocks), dtype=np.int32)  # 0 where the first slot is empty
        self._places = np.arange(block_size, dtype=np.int32)

    def admit(self, step: CheckedStep) -> None:
        """Record the step's copies and writes, after checking that all its reads are of written slots.

        Raises:
            Refused: `position`; nothing is recorded then.
        """
        copied_to = step.copies[:, 1]
        copied_over = self._next[:, copied_to], self._reach[:, copied_to]
        if len(copied_to):
            self._next[:, copied_to] = self._next[:, step.copies[:, 0]]
            self._reach[:, copied_to] = self._reach[:, step.copies[:, 0]]
        written = step.positions + 1
        written_over = []
        for table, slots in enumerate(step.slots):
            by_slot = self._next[table].reshape(-1)
            written_over.append(by_slot[slots])
            by_slot[slots] = written
            self._measure(table, slots)
        if not all(self._holds(step, rows) for rows in _slices(step)):
            for table, (slots, old) in enumerate(zip(step.slots, written_over, strict=True)):
                self._next[table].reshape(-1)[slots] = old
                self._measure(table, slots)
            self._next[:, copied_to], self._reach[:, copied_to] = copied_over
            raise Refused(
                "position",
                "A sequence claims tokens that its KV blocks do not hold; send its tokens from the start.",
            )

    def _measure(self, table: int, slots: np.ndarray) -> None:
        """Bring `_reach` up to date for the blocks of these slots, which have just been written."""
        blocks = slots // self._size
        if len(blocks) * self._size > _FEW_SLOTS:
            blocks = np.unique(blocks)
        held = self._next[table, blocks]
        first = held[:, :1]
        runs = held == first + self._places
        lengths = np.where(runs.all(axis=1), self._size, runs.argmin(axis=1))
        self._reach[table, blocks] = np.where(first[:, 0] > 0, first[:, 0] - 1 + lengths, 0)

    def _holds(self, step: CheckedStep, rows: slice) -> bool:
        """Whether the tables of some sequences hold all that these may read."""
        size = self._size
        seq_lens = step.seq_lens[rows, None]
        begins = np.arange(-(-int(seq_lens.max()) // size)) * size  # position that each column of a table begins with
        ends = begins + size
        needed = np.minimum(seq_lens, ends)
        unread = begins >= seq_lens
        for table, reach in enumerate(self._reach):
            held = reach[step.block_tables[table, rows, : len(begins)]]
            missing = (held < needed) | (held > ends)
            missing &= ~unread
            if step.windows and step.windows[table] != WHOLE:
                # The first of the new tokens sees farthest back. Blocks that end before that may be gone.
                first_new = seq_lens - np.diff(step.query_start)[rows, None]
                missing &= ends > first_new - step.windows[table] + 1
            if missing.any():
                return False
        return True

    def forget(self, step: CheckedStep) -> None:
        """Mark what an admitted step writes and copies to as never written, after it failed half way."""
        for table, slots in enumerate(step.slots):
            self._next[table].reshape(-1)[slots] = 0
            self._measure(table, slots)
        self._next[:, step.copies[:, 1]] = 0
        self._reach[:, step.copies[:, 1]] = 0


def _slices(step: CheckedStep) -> Iterator[slice]:
    """Parts of a step's sequences, small enough that a host's claims of history cost bounded memory."""
    rows = max(1, (1 << 20) // step.block_tables.shape[2])
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
    copies = private(arrays.copies[: request.copies])

    new_tokens = query_start[1:] - query_start[:-1]
    if query_start[0] != 0 or query_start[-1] != tokens or new_tokens.min() < 1:
        raise Refused("shape", "query_start must rise from 0 to the number of tokens, with a token for each sequence.")
    if _is_outside(token_ids, limits.vocab_size):
        raise Refused(
            "token",
            f"A token id is outside the vocabulary of {limits.vocab_size}; use the bundle's tokenizer.",
        )
    if (seq_lens < new_tokens).any():
        raise Refused("shape", "A sequence is shorter than the tokens sent for it.")
    longest = int(seq_lens.max())
    if longest > limits.context:
        raise Refused(
            "context",
            f"A sequence is longer than the context of {limits.context} tokens; shorten the prompt.",
        )
    if longest > width * size:
        raise Refused("block", "A block table is too short for its sequence.")
    used_width = -(-longest // size)
    block_tables = private(arrays.block_tables[:, :sequences, :used_width])
    block_tables *= np.arange(0, used_width * size, size) < seq_lens[:, None]  # 0 behind a sequence's end
    if _is_outside(block_tables, blocks):
        raise Refused("block", f"A block table names a KV block outside this session's {blocks}.")
    if len(copies) and (_is_outside(copies, blocks) or len(set(copies[:, 1].tolist())) != len(copies)):
        raise Refused("block", "KV block copies must stay inside this session and have distinct destinations.")

    positions, slots = slots_of(block_tables, query_start, seq_lens, size)
    if any(len(set(written.tolist())) != tokens for written in slots):
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


def _is_outside(numbers: np.ndarray, end: int) -> bool:
    """Whether one of these int64 numbers is negative, or `end` or more."""
    return numbers.size > 0 and bool(numbers.view(np.uint64).max() >= end)  # a negative one looks very large
