"""Every trust decision of the enclave: what may be opened, run and returned. No network, no disk, no model.

Whatever arrives here was sent by a hostile host: numbers may be anything, arrays may change while they are
read, and calls may come in any order. So each function takes private copies, checks all of them before anything
is changed, and raises `Refused` with a code that is part of the protocol.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.ma  # numpy imports it on first use in some calls, when the enclave can open no file any more
import torch

from semiopen.bundle.lease import EVERYTHING, Lease, Rights, check_time
from semiopen.errors import LeaseError
from semiopen.model.packed_step import WHOLE, PackedStep, slots_of
from semiopen.model.plan import Head
from semiopen.protocol.channel import SETTINGS, Layout, SharedArrays
from semiopen.protocol.messages import Choose, FailureCode, Open, Step, Unmix, Wipe

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
    head: Head
    max_rows: int
    max_logits: int  # numbers in a session's region of logits
    max_history: int
    mixed_blocks: int = 0  # open blocks whose attention is put in order here
    attention_size: int = 0


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
    if request.rows and limits.head == "open":
        raise Refused("limit", "The head of this bundle is open, so it has no rows here; open the session without.")
    logits = request.logit_rows * limits.vocab_size
    if request.rows > limits.max_rows or request.logit_rows > request.rows or logits > limits.max_logits:
        raise Refused(
            "limit",
            f"A request to the head may hold at most {limits.max_rows} rows, of which "
            f"{limits.max_logits // limits.vocab_size} with logits; ask for less.",
        )
    if request.attention_rows > (limits.max_step_tokens if limits.mixed_blocks else 0):
        raise Refused(
            "limit",
            f"Attention may pass {limits.max_step_tokens} rows at a time; ask for less."
            if limits.mixed_blocks
            else "No attention of this bundle passes the enclave; open the session without rows for it.",
        )
    if request.history > limits.max_history:
        raise Refused("limit", f"A session's history may hold at most {limits.max_history} tokens; ask for less.")


class Meter:
    """What a lease allows, and how much of it is used: tokens through the prefix, and answers of the head.

    Both are counted by themselves, and the larger counts: a text of so many tokens passes once through each. What was
    counted is never taken back, whatever becomes of the request.
    """

    def __init__(
        self,
        lease: Lease | None,
        used: tuple[int, int] = (0, 0),
        save: Callable[[int, int], None] = lambda prefix, head: None,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """Begin to count.

        Args:
            lease: verified; None allows everything.
            used: by earlier runs: tokens, answers.
            save: called with both before anything is done for them.
            wall: seconds since 1970. The host may set it, so that it is believed only where it is later than `steady`
                makes it.
            steady: seconds of a clock that nobody sets, and that goes on while the machine sleeps.
        """
        self.lease = lease
        self.rights: Rights = lease.rights if lease else EVERYTHING
        self._used = list(used)
        self._save = save
        self._wall, self._steady = wall, steady
        self._began = wall(), steady()
        self._allowances = [float(lease.rate)] * 2 if lease and lease.rate else [math.inf] * 2  # counted as `_used` is
        self._filled = steady()

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens of the prefix and answers of the head."""
        return self._used[0], self._used[1]

    @property
    def used(self) -> int:
        """Of the lease's tokens."""
        return max(self._used)

    @property
    def left(self) -> int | None:
        """Of the lease's tokens; None without a limit."""
        return None if self.lease is None or self.lease.tokens is None else self.lease.tokens - self.used

    def charge(self, tokens: int = 0, answers: int = 0) -> None:
        """Count tokens of the prefix and answers of the head, before they are given.

        Raises:
            Refused: `lease`; nothing is counted then.
        """
        lease = self.lease
        if lease is None:
            self._used[0] += tokens
            self._used[1] += answers
            return
        self._check_time(lease)
        after = self._used[0] + tokens, self._used[1] + answers
        if lease.tokens is not None and max(after) > lease.tokens:
            raise Refused(
                "lease",
                f"The lease has {lease.tokens - self.used} of {lease.tokens} tokens left and this needs more; ask the "
                "vendor for another lease.",
            )
        self._check_rate(lease)
        try:
            self._save(*after)
        except OSError:
            raise Refused("lease", "The use of the lease cannot be written down; see to its meter's disk.") from None
        self._used[:] = after
        self._allowances = [left - count for left, count in zip(self._allowances, (tokens, answers), strict=True)]

    def need(self, allowed: bool, right: str) -> None:
        """Refuse (`lease`) what is not `allowed`; `right` names it."""
        if not allowed:
            raise Refused("lease", f"The lease does not allow {right}; ask the vendor for one that does.")

    def _check_time(self, lease: Lease) -> None:
        wall, steady = self._began
        now = max(self._wall(), wall + self._steady() - steady)
        try:
            check_time(lease, now)
        except LeaseError as error:
            raise Refused("lease", str(error)) from None

    def _check_rate(self, lease: Lease) -> None:
        """A minute's tokens may go at once; what is over that is owed, and waited for before the next request."""
        if lease.rate is None:
            return
        now = self._steady()
        gained = (now - self._filled) * lease.rate / 60
        self._allowances = [min(float(lease.rate), left + gained) for left in self._allowances]
        self._filled = now
        least = min(self._allowances)
        if least <= 0:
            wait = math.ceil(-least * 60 / lease.rate) + 1
            raise Refused("lease", f"The lease allows {lease.rate} tokens a minute; try again in {wait} seconds.")


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
        self._used = np.zeros(blocks, dtype=bool)  # not wiped since something was written there, or tried to be
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
        self._used[copied_to] = True
        for slots in step.slots:
            self._used[slots // self._size] = True

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

    def used(self, blocks: np.ndarray | None = None) -> np.ndarray:
        """Which of these blocks [N], or of all, may hold something."""
        return np.flatnonzero(self._used) if blocks is None else blocks[self._used[blocks]]

    def wiped(self, blocks: np.ndarray) -> None:
        """Mark these blocks as never written, and as holding nothing."""
        self._next[:, blocks] = 0
        self._reach[:, blocks] = 0
        self._used[blocks] = False


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


@dataclass(frozen=True)
class Cut:
    """How one row's token is chosen; see `model.sampling.Cuts`. `place` counts the tokens drawn with `seed`."""

    temperature: float
    top_p: float
    min_p: float
    repetition: float
    presence: float
    frequency: float
    top_k: int
    seed: int
    place: int
    min_p_last: bool


@dataclass(frozen=True)
class CheckedChoice:
    """Rows to choose tokens for, every number of which has been checked; only `check_choice` makes one."""

    states: torch.Tensor
    cuts: tuple[Cut, ...]
    _tokens: np.ndarray
    _at: np.ndarray

    def __len__(self) -> int:
        return len(self.cuts)

    def part(self, begin: int, end: int) -> "CheckedChoice":
        """Some of the rows."""
        return CheckedChoice(self.states[begin:end], self.cuts[begin:end], self._tokens, self._at[begin:end])

    def history(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Earlier tokens of a row: its prompt's, and its answer's so far."""
        begin, answer, end = self._at[row]
        return self._tokens[begin:answer], self._tokens[answer:end]


def check_rows(arrays: SharedArrays, layout: Layout, rows: int) -> torch.Tensor:
    """A private copy [R, H] of the states below the head.

    Raises:
        Refused: `shape`.
    """
    if rows > layout.rows:
        raise Refused("shape", "The request has more rows than the session was opened for; split it.")
    states = arrays.states[:rows].clone()
    if not bool(torch.isfinite(states).all()):
        raise Refused("shape", "A state holds a number that is not finite.")
    return states


def check_choice(request: Choose, arrays: SharedArrays, layout: Layout, limits: Limits) -> CheckedChoice:
    """Copy what a choice needs out of shared memory and check every number in it.

    Raises:
        Refused: `shape` or `token`.
    """
    states = check_rows(arrays, layout, request.rows)
    if request.logits and request.rows > layout.logit_rows:
        raise Refused("shape", "The request asks for more rows of logits than the session was opened for; split it.")
    with np.errstate(invalid="ignore"):  # some NaN make numpy warn
        settings = arrays.settings[: request.rows].astype(np.float64)
    choices = arrays.choices[: request.rows].astype(np.int64)
    at = arrays.history_at[: request.rows].astype(np.int64)
    # As the host sends them: 0.01 is a little less there.
    low, high = np.array(list(SETTINGS.values()), dtype=np.float32).T
    if not (np.isfinite(settings) & (settings >= low) & (settings <= high)).all():
        allowed = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in SETTINGS.items())
        raise Refused("shape", f"A setting of the choice is out of range: {allowed}.")
    if (choices[:, 0] < 0).any() or (choices[:, 3] < 0).any():
        raise Refused("shape", "top_k and a token's number must not be negative.")
    if at.size and (at[:, 0].min() < 0 or (np.diff(at, axis=1) < 0).any() or at[:, 2].max() > layout.history):
        raise Refused("shape", "A row's history does not lie in the region for it.")
    # Rows may share tokens, so that the longest is what a row costs.
    if at.size and (at[:, 2] - at[:, 0]).max() > limits.context:
        raise Refused("context", f"A row's history is longer than the context of {limits.context} tokens.")
    tokens = arrays.history[: int(at[:, 2].max())].astype(np.int64)
    if _is_outside(tokens, limits.vocab_size):
        raise Refused("token", f"A token of the history is outside the vocabulary of {limits.vocab_size}.")
    last = request.order == "transformers"
    cuts = tuple(
        Cut(*numbers, top_k=top_k, seed=(high << 32) | (low & 0xFFFFFFFF), place=place, min_p_last=last)
        for numbers, (top_k, low, high, place) in zip(settings.tolist(), choices.tolist(), strict=True)
    )
    return CheckedChoice(states, cuts, tokens, at)


def check_words(arrays: SharedArrays, layout: Layout, limits: Limits, count: int) -> np.ndarray:
    """A private copy [count] of the numbers of words that shall be revealed.

    Raises:
        Refused: `shape` or `token`.
    """
    if count > layout.rows:
        raise Refused("shape", "The request has more words than the session was opened for; split it.")
    words = arrays.chosen[:count].astype(np.int64)
    if _is_outside(words, limits.vocab_size):
        raise Refused("token", f"A word is outside the vocabulary of {limits.vocab_size}.")
    return words


def check_wipe(request: Wipe, blocks: int) -> np.ndarray:
    """Numbers [N] int64 of the KV blocks to wipe, each once, of a session that has `blocks`.

    Blocks that are in use may be wiped as well: they count as never written then, so that no step reads them.

    Raises:
        Refused: `block`.
    """
    named = np.unique(np.array(request.blocks, dtype=np.int64))
    if _is_outside(named, blocks):
        raise Refused("block", f"A block to wipe is outside this session's {blocks}.")
    return named


def check_unmix(request: Unmix, layout: Layout, limits: Limits) -> None:
    """Decide whether attention may be put in order.

    What lies there is not looked at, nor copied before: it is only moved, by an order that is not the host's, so that
    whatever it is, or becomes in the meantime, reaches nothing but the same rows.

    Raises:
        Refused: `order` or `shape`.
    """
    if not limits.mixed_blocks:
        raise Refused("order", "No attention of this bundle passes the enclave; go on without.")
    if request.block >= limits.mixed_blocks:
        raise Refused("shape", f"This bundle has {limits.mixed_blocks} open blocks; number them from 0.")
    if request.rows > layout.attention_rows:
        raise Refused("shape", "The request has more rows than the session was opened for; split it.")
