"""Do sealed weights lie anywhere on disk in plain form? Searches files for pieces of their bytes.

Covered: bytes of sealed tensors in their stored dtype. Not covered: other dtypes, compressed or encoded copies.
"""

import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from semiopen.bundle.manifest import Manifest
from semiopen.model.families import FAMILIES

PIECE_BYTES = 48
_EMBEDDINGS = {family.embedding for family in FAMILIES.values()}
_DISTINCT_BYTES = 16  # a piece with fewer is a constant, such as a norm of ones, and found everywhere


@dataclass(frozen=True)
class Finding:
    """Pieces looked for, and how many of them each file holds; files without any are left out."""

    pieces: int
    bytes_searched: int
    found: dict[Path, int]


def sample_pieces(weights: Iterable[Path], manifest: Manifest, per_tensor: int = 4, seed: int = 0) -> list[bytes]:
    """Cut pieces of `PIECE_BYTES` from each sealed tensor of the original checkpoint.

    The embedding of a tied model is left out: its open head holds the same matrix, as the manifest says.
    """
    choose = random.Random(seed)  # noqa: S311 - where to look is no secret
    sealed = {tensor.name for tensor in manifest.sealed}
    if manifest.open_embedding:
        sealed = {name for name in sealed if name.split(".")[-2] not in _EMBEDDINGS}
    pieces = []
    for shard in weights:
        with safe_open(shard, framework="pt") as file:
            for name in sealed & set(file.keys()):
                data = file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                pieces += _pieces_of(data, per_tensor, choose)
    return pieces


def _pieces_of(data: bytes, count: int, choose: random.Random) -> list[bytes]:
    starts = [choose.randrange(max(1, len(data) - PIECE_BYTES)) for _ in range(4 * count)]
    pieces = [data[start : start + PIECE_BYTES] for start in starts]
    return [piece for piece in pieces if len(set(piece)) >= _DISTINCT_BYTES][:count]


def search(pieces: list[bytes], files: Iterable[Path]) -> Finding:
    """Look for the pieces in files, which are read whole, one at a time; unreadable ones are passed over."""
    found: dict[Path, int] = {}
    searched = 0
    for path in files:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        searched += len(data)
        if hits := sum(piece in data for piece in pieces):
            found[path] = hits
    return Finding(pieces=len(pieces), bytes_searched=searched, found=found)


def recent_files(since: float) -> list[Path]:
    """Files of temporary and shared-memory folders that changed after `since` (seconds, as `time.time`)."""
    files = []
    for root in {tempfile.gettempdir(), "/dev/shm"}:  # noqa: S108 - looked into, not written
        for folder, _, names in os.walk(root):  # passes over folders that go away meanwhile
            for path in (Path(folder, name) for name in names):
                try:
                    if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
                        files.append(path)
                except OSError:
                    continue  # it went away, or belongs to someone else
    return files
