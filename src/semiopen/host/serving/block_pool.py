"""KV blocks of one engine: who holds them, and which hold text that a later request may begin with.

A block is in one of three states: held (by one or several sequences), idle (held by nobody, but its text is known and
may be asked for again), or empty. A block that several sequences hold is full, and nobody writes to it any more. Blocks
that became empty are told to whoever wipes them; one that is taken before is wiped by the step that begins it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT = b""  # stands before the first block of a text


def root_of(salt: str) -> bytes:
    """What stands before the first block instead, so that texts of different salts have no name in common."""
    return hashlib.blake2b(salt.encode(), digest_size=32).digest() if salt else ROOT


def text_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name a full block by its tokens and by all blocks before it, so that equal names mean equal keys and values.

    A cryptographic hash: with a weak one, a client could make texts that collide and read another's answers.
    """
    packed = array("i", tokens)
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(packed)
    memoryview(packed).cast("B")[:] = bytes(len(packed) * packed.itemsize)  # freed memory keeps what was in it
    return digest.digest()


class BlockPool:
    """Free and held KV blocks, with reference counts and a cache of prefixes."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._empty = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * blocks
        self._name: list[bytes | None] = [None] * blocks
        self._named: dict[bytes, int] = {}
        self._unwiped: set[int] = set()  # empty, but not overwritten yet

    @property
    def free(self) -> int:
        """Blocks that can be taken, idle ones among them."""
        return len(self._empty) + len(self._idle)

    def take(self) -> int:
        """Return a block of one's own, forgetting the text of the least recently used idle one if needed.

        Raises:
            IndexError: none is free; callers look at `free` first.
        """
        if self._empty:
            block = self._empty.pop()
            self._unwiped.discard(block)
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise IndexError("no free block")
        self._holders[block] = 1
        return block

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Blocks that hold the first of the named texts, as many as are there without a gap."""
        found: list[int] = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks count as free until they are held."""
        return sum(block in self._idle for block in blocks)

    def hold(self, block: int) -> None:
        """Count one more holder of a block that `find` returned."""
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Count one holder less of each block of a sequence; its last ones are forgotten first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._name[block] is None:
                self._empty.append(block)
                self._unwiped.add(block)
            else:
                self._idle[block] = None

    def publish(self, block: int, name: bytes) -> None:
        """Say that a held block is full, written, and holds this text. A text has one block; a second stays unnamed."""
        if name not in self._named:
            self._named[name] = block
            self._name[block] = name

    def forget_texts(self) -> None:
        """Forget what all blocks hold; those that are held stay so."""
        self._empty += self._idle
        self._unwiped.update(self._idle)
        self._idle.clear()
        self._named.clear()
        self._name = [None] * self.blocks

    def take_unwiped(self) -> list[int]:
        """Empty blocks that hold what was written last; the caller overwrites them now."""
        blocks = sorted(self._unwiped)
        self._unwiped.clear()
        return blocks

    def _forget(self, block: int) -> None:
        name = self._name[block]
        if name is not None:
            del self._named[name]
            self._name[block] = None
