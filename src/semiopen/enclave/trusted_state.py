"""Every trust decision of the enclave: what may be opened, run and returned. No network, no disk, no model.

Whatever arrives here was sent by a hostile host: numbers may be anything, arrays may change while they are
read, and calls may come in any order. So each function takes private copies, checks all of them before anything
is changed, and raises `Refused` with a code that is part of the protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.messages import FailureCode, Open, Step

BLOCK_SIZE = 16  # tokens in a KV block


class Refused(Exception):
    """A request that will not be served; `message` is safe to send to the host."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code: FailureCode = code
        self.message = message


@dataclass(frozen=True)
class Limits:
    """What one enclave grants: KV blocks in all, and the size of a step."""

    max_blocks: int
    max_step_tokens: int
    max_sequences: int
    max_sessions: int
    context: int
    vocab_size: int

    @property
    def table_width(self) -> int:
        """KV blocks that one sequence of full context takes."""
        return -(-self.context // BLOCK_SIZE)


@dataclass(frozen=True)
class CheckedStep:
    """A step whose every number has been checked. T tokens, S sequences, W block-table columns.

    Attributes:
        token_ids: [T] int64 in [0, vocabulary).
        positions: [T] int64, position of each token in its sequence, derived here.
        slots: [T] int64, KV slot of each token, derived here; no two are equal.
        query_start: [S + 1] int64. seq_lens: [S] int64, tokens after this step.
        block_table: [S, W] int64. copies: [C, 2] int64, distinct destinations.
        score_cap: whether attention caps its scores where the family does.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    query_start: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray
    copies: np.ndarray
    score_cap: bool


def check_open(request: Open, limits: Limits, open_sessions: int, blocks_in_use: int) -> None:
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
    if request.blocks > limits.max_blocks - blocks_in_use:
        raise Refused(
            "limit",
            f"{limits.max_blocks - blocks_in_use} of {limits.max_blocks} KV blocks are free; ask for fewer, "
            "or start the enclave with more.",
        )


class SlotLedger:
    """Which position each KV slot of a session holds, so that no step can read what was not written for it.

    Slots start empty. A sequence may only read slots that hold the very positions it claims to have, so stale
    or foreign blocks at other positions, and blocks never written, are refused.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._position = np.full(blocks * BLOCK_SIZE, -1, dtype=np.int64)

    def admit(self, step: CheckedStep) -> None:
        """Record the step's copies and writes, after checking that all its reads are of written slots.

        Raises:
            Refused: `position`; nothing is recorded then.
        """
        position, per_block = self._position, self._position.reshape(self.blocks, BLOCK_SIZE)
        touched = step.slots
        if len(step.copies):
            destinations = step.copies[:, 1:] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
            touched = np.concatenate([destinations.reshape(-1), touched])
        before = position[touched]
        if len(step.copies):
            per_block[step.copies[:, 1]] = per_block[step.copies[:, 0]]
        position[step.slots] = step.positions
        if not all(self._holds(step.block_table[rows], step.seq_lens[rows]) for rows in _slices(step)):
            position[touched] = before
            raise Refused(
                "position",
                "A sequence claims tokens that its KV blocks do not hold; send its tokens from the start.",
            )

    def _holds(self, block_table: np.ndarray, seq_lens: np.ndarray) -> bool:
        used = -(-int(seq_lens.max()) // BLOCK_SIZE)
        held = self._position.reshape(self.blocks, BLOCK_SIZE)[block_table[:, :used]].reshape(len(seq_lens), -1)
        wanted = np.arange(held.shape[1])
        return not ((held != wanted) & (wanted < seq_lens[:, None])).any()

    def forget(self, step: CheckedStep) -> None:
        """Mark what an admitted step writes and copies to as never written, after it failed half way."""
        self._position[step.slots] = -1
        self._position.reshape(self.blocks, BLOCK_SIZE)[step.copies[:, 1]] = -1


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
    tokens, sequences, width = request.tokens, request.sequences, request.width
    if tokens > layout.step_tokens or sequences > layout.sequences or width > layout.table_width:
        raise Refused("shape", "The step is larger than the session was opened for; split it or open a larger session.")
    if request.copies > layout.sequences:
        raise Refused("shape", "A step may copy at most one KV block per sequence.")

    def private(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int64)  # always a copy: the host cannot change it after the check

    token_ids = private(arrays.token_ids[:tokens])
    query_start = private(arrays.query_start[: sequences + 1])
    seq_lens = private(arrays.seq_lens[:sequences])
    block_table = private(arrays.block_table[:sequences, :width])
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
    if (seq_lens > width * BLOCK_SIZE).any():
        raise Refused("block", "A block table is too short for its sequence.")
    used = np.arange(width)[None, :] * BLOCK_SIZE < seq_lens[:, None]
    if ((block_table < 0) | (block_table >= blocks))[used].any():
        raise Refused("block", f"A block table names a KV block outside this session's {blocks}.")
    block_table[~used] = 0
    if ((copies < 0) | (copies >= blocks)).any() or len(np.unique(copies[:, 1])) != len(copies):
        raise Refused("block", "KV block copies must stay inside this session and have distinct destinations.")

    sequence = np.repeat(np.arange(sequences), new_tokens)
    positions = np.arange(tokens) - query_start[sequence] + (seq_lens - new_tokens)[sequence]
    slots = block_table[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    if len(np.unique(slots)) != tokens:
        raise Refused("block", "Two tokens of one step would be written to the same KV slot.")
    return CheckedStep(token_ids, positions, slots, query_start, seq_lens, block_table, copies, request.score_cap)
