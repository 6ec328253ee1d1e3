"""Which KV blocks of the enclave belong to which row of a batch: the host's side of the paged cache.

Rows share blocks by reference count (beams, forked caches), and a shared block is copied before one of its rows
writes to it. The enclave checks all of this again; a mistake here is an error there, never another's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from semiopen.errors import EnclaveError

BLOCK_SIZE = 16  # tokens in a KV block: our own engines' choice, as vLLM's on an accelerator


class BlockPool:
    """Free KV blocks of one session, with reference counts."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._references = [0] * blocks
        self._unwiped: list[int] = []  # free as well, but they hold what was written last

    @property
    def free(self) -> int:
        """Number of blocks nobody holds."""
        return len(self._free) + len(self._unwiped)

    def take(self) -> int:
        """Return a block of one's own.

        Raises:
            EnclaveError: none is left.
        """
        if not self.free:
            total = len(self._references)
            raise EnclaveError(
                f"The enclave's KV cache of {total * self.block_size} tokens is full; use a smaller batch or shorter "
                "texts, or load the model with a larger kv_tokens.",
                "limit",
            )
        block = (self._free or self._unwiped).pop()  # the step that begins a block wipes it
        self._references[block] = 1
        return block

    def share(self, block: int) -> int:
        """Count one more holder of `block`."""
        self._references[block] += 1
        return block

    def release(self, block: int) -> None:
        """Count one holder less; the last one frees the block."""
        self._references[block] -= 1
        if not self._references[block]:
            self._unwiped.append(block)

    def wipe(self, wipe: Callable[[list[int]], object]) -> None:
        """Have `wipe` overwrite the blocks that were freed since the last time; nobody takes them meanwhile."""
        blocks, self._unwiped = self._unwiped, []
        try:
            if blocks:
                wipe(blocks)
        finally:
            self._free += blocks

    def is_shared(self, block: int) -> bool:
        """Whether more than one row holds `block`."""
        return self._references[block] > 1


class Rows:
    """The rows of one batch: their KV blocks, and which columns of the batch were tokens, not padding.

    Attributes:
        mask: [B, C] bool, true where column c of row b is a token; C columns have been run so far.
        lengths: tokens of each row in the enclave's cache.
        offsets: what the caller's position ids are ahead of the enclave's, per row; None before the first token.
    """

    def __init__(self, pool: BlockPool, rows: int) -> None:
        self.pool = pool
        self.tables: list[list[int]] = [[] for _ in range(rows)]
        self.lengths = [0] * rows
        self.offsets: list[int | None] = [None] * rows
        self.mask = torch.zeros(rows, 0, dtype=torch.bool)

    @property
    def columns(self) -> int:
        """Columns run so far, padding included."""
        return self.mask.shape[1]

    def grow(self, row: int, tokens: int) -> list[tuple[int, int]]:
        """Make room for `tokens` more tokens of a row; return the block copies that the next step must carry.

        Does not count the tokens yet: call `added` once the enclave has them.
        """
        table, length, size = self.tables[row], self.lengths[row], self.pool.block_size
        copies = []
        if length % size and self.pool.is_shared(table[length // size]):
            shared, own = table[length // size], self.pool.take()
            table[length // size] = own
            copies.append((shared, own))
            self.pool.release(shared)  # another row holds it, so it cannot be given away before the copy
        while len(table) * size < length + tokens:
            table.append(self.pool.take())
        return copies

    def added(self, row: int, tokens: int) -> None:
        """Count tokens that the enclave has taken."""
        self.lengths[row] += tokens

    def select(self, indices: list[int]) -> None:
        """Make row i what row indices[i] was; rows may repeat (beam search)."""
        tables = [[self.pool.share(block) for block in self.tables[i]] for i in indices]
        self._release()
        self.tables = tables
        self.lengths = [self.lengths[i] for i in indices]
        self.offsets = [self.offsets[i] for i in indices]
        self.mask = self.mask[indices]

    def crop(self, columns: int) -> None:
        """Forget all columns from `columns` on."""
        self.mask = self.mask[:, :columns]
        self.lengths = self.mask.sum(dim=1).tolist()
        for row, length in enumerate(self.lengths):
            used = -(-length // self.pool.block_size)
            for block in self.tables[row][used:]:
                self.pool.release(block)
            del self.tables[row][used:]
            if not length:
                self.offsets[row] = None

    def __deepcopy__(self, memo: dict) -> Rows:
        """Fork: the copy shares all blocks, and copies one when it is first written to."""
        fork = Rows(self.pool, len(self.tables))
        fork.tables = [[self.pool.share(block) for block in table] for table in self.tables]
        fork.lengths, fork.offsets, fork.mask = list(self.lengths), list(self.offsets), self.mask.clone()
        return fork

    def _release(self) -> None:
        for table in self.tables:
            for block in table:
                self.pool.release(block)
        self.tables = [[] for _ in self.tables]

    def __del__(self) -> None:
        self._release()
