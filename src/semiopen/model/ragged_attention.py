"""Attention of single tokens over a paged KV cache on a CPU, which reads each key and value once, where it lies.

Gathering a sequence's KV blocks before a dense attention call moves them through memory twice, and pads every
sequence to the longest. Here a step's (token, query head) pairs are the rows of a sparse matrix, and the KV slots
that a token may see its columns: scores are a product sampled at these places (`torch.sparse.sampled_addmm`), and
the weighted sum of values is an embedding bag.

Legend: R tokens, h query heads, g key/value heads, d head size, C most keys of one token, E entries: keys of all rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_MAX_ENTRIES = 1 << 22  # entries of one call: some 64 MiB while it runs
_KEPT_ENTRIES = 1 << 23  # entries whose pattern is kept for the next block of the model


@dataclass
class Pattern:
    """Which slots the rows of one call look at: C of them each, the last one again where a row has fewer."""

    places: torch.Tensor  # [R * h * C] slots, head after head
    hidden: torch.Tensor | None  # [R, 1, C] true where a row has no key; None: all have C
    starts: torch.Tensor  # [R * h] where the entries of each row begin
    scores: torch.Tensor  # sparse CSR [R * h, g * slots] fp32, written by each call


class Reads:
    """What some tokens of a step may read through one block table and attention window.

    Numpy does this, as many small calls are quicker there than in torch.
    """

    def __init__(
        self,
        positions: np.ndarray,
        tables: np.ndarray,
        block_size: int,
        window: int | None,
        tokens: np.ndarray | None = None,
    ) -> None:
        """Remember what to read.

        Args:
            positions: [R] int64 position of each token.
            tables: [R, W] int64 KV blocks of each token's sequence.
            block_size: tokens in a KV block.
            window: keys that a token sees, itself included; None for all.
            tokens: [R] int64 rows of the step's tokens; None: all of them, in order.
        """
        self._positions, self._tables, self._size, self._tokens = positions, tables, block_size, tokens
        self._first = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
        self._kept: dict[int, Pattern] = {}
        self._entries_kept = 0
        self._calls: list[np.ndarray | slice] | None = None

    def calls(self, heads: int) -> list[np.ndarray | slice]:
        """The rows of each call: similar in length, so that few places are empty, and bounded in sum."""
        if self._calls is None:
            keys = self._positions - self._first + 1
            longest = int(keys.max())
            if longest <= 1.5 * int(keys.min()) + 64 and len(keys) * heads * longest <= _MAX_ENTRIES:
                self._calls = [slice(None)]
                return self._calls
            order, self._calls, begin = keys.argsort(kind="stable"), [], 0
            limits = keys[order].tolist()
            for end, length in enumerate([*limits, 2 * longest + 999]):
                if end and (length > 1.5 * limits[begin] + 64 or (end + 1 - begin) * heads * length > _MAX_ENTRIES):
                    self._calls.append(order[begin:end])
                    begin = end
        return self._calls

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor | None:
        """Which of the step's tokens these rows are; None: all of them, in order."""
        if self._tokens is not None:
            return torch.from_numpy(self._tokens[rows])
        return None if isinstance(rows, slice) else torch.from_numpy(rows)

    def pattern(self, call: int, heads: int, kv_heads: int, slots: int) -> Pattern:
        """The pattern of one call over caches of `kv_heads` times `slots` places."""
        if call in self._kept:
            return self._kept[call]
        rows = self.calls(heads)[call]
        last, first, size = self._positions[rows, None], self._first[rows, None], self._size
        counts = last - first + 1
        longest = int(counts.max())
        key = np.minimum(first + np.arange(longest), last)
        block = key // size
        kind = np.int32 if kv_heads * slots < 1 << 31 else np.int64
        in_head = np.take_along_axis(self._tables[rows], block, 1) * size + (key - block * size)  # [R, C]
        of_head = np.arange(heads, dtype=kind) // (heads // kv_heads) * kind(slots)
        places = torch.from_numpy((in_head.astype(kind)[:, None] + of_head[:, None]).reshape(-1))
        starts = torch.from_numpy(np.arange(0, len(places) + 1, longest, dtype=kind))
        hidden = None
        if int(counts.min()) < longest:
            hidden = torch.from_numpy(np.arange(longest) >= counts)[:, None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "sparse CSR is in beta"
            scores = torch.sparse_csr_tensor(
                starts,
                places,
                torch.zeros(len(places)),
                (len(starts) - 1, kv_heads * slots),
                check_invariants=False,
            )
        pattern = Pattern(places, hidden, starts[:-1], scores)
        if self._entries_kept + len(places) <= _KEPT_ENTRIES:
            self._entries_kept += len(places)
            self._kept[call] = pattern
        return pattern


def ragged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    reads: Reads,
    scaling: float | None,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """Attention of single tokens.

    Args:
        query: [h, T, d] of all tokens of the step.
        keys: [g, slots, d] fp32, one layer's cache.
        values: [g, slots, d] in the query's dtype, likewise.
        reads: which of the step's tokens attend, and to what.
        scaling: factor of the scores, 1 / sqrt(d) when None.
        softcap: scores s become softcap * tanh(s / softcap) where given.
        out: [T, h, d], whose rows of these tokens are written.
    """
    heads, _, size = query.shape
    kv_heads, slots, _ = keys.shape
    flat_keys, flat_values = keys.view(kv_heads * slots, -1).t(), values.view(kv_heads * slots, -1)
    scale = size**-0.5 if scaling is None else scaling
    for call, rows in enumerate(reads.calls(heads)):
        pattern = reads.pattern(call, heads, kv_heads, slots)
        tokens = reads.tokens(rows)
        of_rows = (query if tokens is None else query[:, tokens]).transpose(0, 1).reshape(-1, size).float()
        pattern.scores.values().zero_()  # what a call before left there would count, were it not finite
        torch.sparse.sampled_addmm(pattern.scores, of_rows, flat_keys, beta=0.0, alpha=scale, out=pattern.scores)
        scores = pattern.scores.values().view(len(of_rows) // heads, heads, -1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if pattern.hidden is not None:
            scores = scores.masked_fill(pattern.hidden, -torch.inf)
        weights = scores.softmax(-1).to(values.dtype).flatten()
        sums = F.embedding_bag(pattern.places, flat_values, pattern.starts, mode="sum", per_sample_weights=weights)
        out[slice(None) if tokens is None else tokens] = sums.view(-1, heads, out.shape[2])
