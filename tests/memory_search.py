"""Searches the memory of a running process, as root or its parent can, for pieces of a conversation."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_PIECE = 1 << 24  # bytes read at once
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)")


def find(pid: int, patterns: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Where each pattern lies: names of mappings, at least one for each place.

    All readable memory is read that is not just a mapped file: heaps, stacks, anonymous and shared memory.
    """
    longest = max(map(len, patterns.values()))
    found: dict[str, list[str]] = {name: [] for name in patterns}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for begin, end, name in _mappings(pid):
            at = begin
            while at < end:
                try:
                    memory.seek(at)
                    data = memory.read(min(_PIECE, end - at))
                except OSError:
                    break  # a guard page, or gone meanwhile
                if not data:
                    break
                for pattern_name, pattern in patterns.items():
                    found[pattern_name] += [name] * data.count(pattern)
                at += len(data) if at + len(data) >= end else len(data) - longest + 1
    return found


def _mappings(pid: int) -> list[tuple[int, int, str]]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = _MAPPING.match(line)
        assert match, line
        begin, end, rights, name = match.groups()
        is_file = name.startswith("/") and not name.startswith(("/memfd:", "/dev/shm/", "/dev/zero"))
        if "r" in rights and not is_file and not name.startswith(("[v", "[uprobes")):
            found.append((int(begin, 16), int(end, 16), name or "anonymous"))
    return found


def runs_of_ids(ids: list[int]) -> dict[str, bytes]:
    """A run of token ids as arrays hold it."""
    return {kind: np.array(ids, dtype=kind).tobytes() for kind in ("int32", "int64")}
