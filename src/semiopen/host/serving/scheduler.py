"""Continuous batching: which tokens of which sequences run in the next step, and in which KV blocks.

- First come, first served: a waiting list, a running list, and a budget of tokens per step. Sequences that decode get
  their token first; what is left of the budget goes to prompts, in pieces, so that a long prompt delays nobody by more
  than a step.
- A sequence takes the blocks of its whole prompt when it starts to run, and one more whenever it outgrows them. Where
  none is left, the newest running sequence gives up its own, and is computed again later.
- Full blocks that were computed are published in the pool; a sequence that begins with the same text holds them too.

No model and no tensors here: numpy arrays go out. Not safe for several threads.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from semiopen.host.serving.block_pool import ROOT, BlockPool, text_hash
from semiopen.model.packed_step import PackedStep, slots_of


@dataclass(eq=False)
class SequenceState:
    """One sequence. Engines derive from it what they need besides.

    Attributes:
        tokens: prompt and generated tokens; only appended to.
        prompt_len: how many of them are the prompt.
        computed: tokens whose keys and values are in the cache.
        root: stands before its text; only sequences of the same root share blocks.
        use_cached: whether it may begin with blocks that another sequence computed.
        cached_tokens: prompt tokens found in the cache when it first ran; None before.
        row: its row of the block table while it runs, else -1.
    """

    tokens: list[int]
    prompt_len: int
    root: bytes = ROOT
    use_cached: bool = True
    computed: int = 0
    cached_tokens: int | None = None
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full blocks, as far as known


SequenceT = TypeVar("SequenceT", bound=SequenceState)


@dataclass
class Chunk(Generic[SequenceT]):
    """The next `count` tokens of one sequence."""

    sequence: SequenceT
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token follows from this chunk."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler(Generic[SequenceT]):
    """Waiting and running sequences over one pool of KV blocks."""

    def __init__(self, blocks: int, block_size: int, max_running: int, step_tokens: int, context: int) -> None:
        """Start with an empty cache.

        Args:
            blocks: KV blocks; one sequence of `context` tokens must fit.
            block_size: tokens in a block.
            max_running: sequences that run at once.
            step_tokens: tokens of a step, at least `max_running`.
            context: tokens that a sequence may come to hold.

        Raises:
            ValueError: the numbers do not fit each other.
        """
        if blocks * block_size < context:
            raise ValueError(f"a sequence of {context} tokens does not fit {blocks} blocks of {block_size}")
        if not 1 <= max_running <= step_tokens:
            raise ValueError(f"a step of {step_tokens} tokens has no room for {max_running} running sequences")
        self._block_size = block_size
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._tables = np.zeros((max_running, -(-context // block_size)), dtype=np.int64)
        self.pool = BlockPool(blocks)
        self._rows = list(range(max_running - 1, -1, -1))
        self.waiting: deque[SequenceT] = deque()
        self.running: list[SequenceT] = []  # oldest first
        self.preemptions = 0
        self.prefix_hits = 0  # tokens
        self.prefix_queries = 0  # tokens

    def add(self, sequence: SequenceT) -> None:
        """Queue a sequence of at least one token."""
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceT) -> None:
        """End a sequence, running or waiting, and free its blocks."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def forget_texts(self) -> None:
        """Let no sequence begin with blocks that were computed until now, after their content was lost."""
        self.pool.forget_texts()

    def plan(self) -> list[Chunk[SequenceT]]:
        """Choose the next step's tokens and give them their blocks; empty when there is nothing to do.

        The caller runs them and then calls `commit`, for all chunks or for those that succeeded.
        """
        budget = self._step_tokens
        chunks: list[Chunk[SequenceT]] = []
        for sequence in list(self.running):
            if (
                sequence.row >= 0
                and len(sequence.tokens) - sequence.computed == 1
                and self._make_room(sequence, chunks)
            ):
                chunks.append(Chunk(sequence, 1))
        budget -= len(chunks)
        for sequence in self.running:
            left = len(sequence.tokens) - sequence.computed
            if left > 1 and budget:
                chunks.append(Chunk(sequence, min(left, budget)))
                budget -= chunks[-1].count
        while budget and self.waiting and len(self.running) < self._max_running and self._start(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(Chunk(sequence, min(len(sequence.tokens) - sequence.computed, budget)))
            budget -= chunks[-1].count
        return chunks

    def commit(self, chunks: Sequence[Chunk[SequenceT]]) -> None:
        """Note that these chunks were computed, and publish the blocks that they filled."""
        size = self._block_size
        for chunk in chunks:
            sequence = chunk.sequence
            full = sequence.computed // size
            sequence.computed += chunk.count
            if sequence.computed // size > full:
                self._name_blocks(sequence, sequence.computed // size)
                for index in range(full, sequence.computed // size):
                    self.pool.publish(sequence.blocks[index], sequence.names[index])

    def pack(self, chunks: Sequence[Chunk[SequenceT]]) -> PackedStep:
        """The step as arrays: S chunks, T tokens, one block table per sequence."""
        sequences = [chunk.sequence for chunk in chunks]
        rows = [sequence.row for sequence in sequences]
        query_start = np.zeros(len(chunks) + 1, dtype=np.int64)
        if all(chunk.count == 1 for chunk in chunks):
            token_ids = [sequence.tokens[sequence.computed] for sequence in sequences]
            query_start[:] = np.arange(len(chunks) + 1)
        else:
            token_ids = []
            for chunk in chunks:
                begin = chunk.sequence.computed
                token_ids += chunk.sequence.tokens[begin : begin + chunk.count]
            np.cumsum([chunk.count for chunk in chunks], out=query_start[1:])
        seq_lens = np.array([chunk.sequence.computed + chunk.count for chunk in chunks], dtype=np.int64)
        width = -(-int(seq_lens.max()) // self._block_size)
        block_tables = self._tables[rows, :width][None]
        positions, slots = slots_of(block_tables, query_start, seq_lens, self._block_size)
        return PackedStep(
            token_ids=np.array(token_ids, dtype=np.int64),
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=block_tables,
            slots=slots,
            windows=(),
            copies=_NO_COPIES,
            block_size=self._block_size,
            score_cap=True,
        )

    def _make_room(self, sequence: SequenceT, chunks: list[Chunk[SequenceT]]) -> bool:
        """Give a running sequence the block for its next token; preempts newer ones, in the end itself."""
        if len(sequence.tokens) <= len(sequence.blocks) * self._block_size:
            return True
        while not self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
            if victim is sequence:
                return False
        self._extend(sequence)
        return True

    def _preempt(self, sequence: SequenceT) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _start(self, sequence: SequenceT) -> bool:
        """Give a waiting sequence blocks for all its tokens, cached ones where there are; False if too few are free."""
        size = self._block_size
        cached: list[int] = []
        if sequence.use_cached:
            usable = (len(sequence.tokens) - 1) // size  # the last token is always computed, for what follows it
            self._name_blocks(sequence, usable)
            cached = self.pool.find(sequence.names[:usable])
        new = -(-len(sequence.tokens) // size) - len(cached)
        if new + self.pool.idle_among(cached) > self.pool.free:
            return False
        sequence.row = self._rows.pop()
        for block in cached:
            self.pool.hold(block)
        sequence.blocks = list(cached)
        self._tables[sequence.row, : len(cached)] = cached
        sequence.computed = len(cached) * size
        for _ in range(new):
            self._extend(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            if sequence.use_cached:
                self.prefix_queries += sequence.prompt_len
                self.prefix_hits += sequence.computed
        return True

    def _extend(self, sequence: SequenceT) -> None:
        block = self.pool.take()
        self._tables[sequence.row, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _give_back(self, sequence: SequenceT) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._rows.append(sequence.row)
        sequence.row = -1

    def _name_blocks(self, sequence: SequenceT, count: int) -> None:
        """Extend `sequence.names` to its first `count` blocks."""
        size, names = self._block_size, sequence.names
        for index in range(len(names), count):
            names.append(
                text_hash(names[-1] if names else sequence.root, sequence.tokens[index * size : (index + 1) * size])
            )


_NO_COPIES = np.zeros((0, 2), dtype=np.int64)
