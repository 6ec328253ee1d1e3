"""One step of packed sequences: what a decoder with a paged KV cache needs to know to run it.

Legend: T tokens of the step, S sequences, W block-table columns, G block tables per sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WHOLE = 0  # window of a block that sees all tokens before


@dataclass(frozen=True)
class PackedStep:
    """Tokens of several sequences, one sequence after the other, and where their keys and values live.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, position of each token in its sequence.
        query_start: [S + 1] int64, where each sequence's tokens begin; the last entry is T.
        seq_lens: [S] int64, tokens after this step.
        block_tables: [G, S, W] int64, KV blocks of each sequence in order.
        slots: [G, T] int64, KV slot of each token.
        windows: G attention windows: a block of the model reads through the table of its window; empty: all
            blocks read through table 0.
        copies: [C, 2] int64, KV blocks to copy before the step: from, to.
        block_size: tokens in a KV block.
        score_cap: whether attention caps its scores where the family does.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    slots: np.ndarray
    windows: Sequence[int]
    copies: np.ndarray
    block_size: int
    score_cap: bool

    def table_of(self, window: int | None) -> int:
        """Which table a block with this attention window (None: all tokens) reads through."""
        return self.windows.index(window or WHOLE) if self.windows else 0


def slots_of(
    block_tables: np.ndarray, query_start: np.ndarray, seq_lens: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [T] and KV slots [G, T] of a step's tokens; arguments as in `PackedStep`."""
    if query_start[-1] == len(seq_lens):  # one token each, as in nearly all steps
        positions = seq_lens - 1
        column, place = np.divmod(positions, block_size)
        return positions, block_tables[:, np.arange(len(seq_lens)), column] * block_size + place
    new_tokens = np.diff(query_start)
    sequence = np.repeat(np.arange(len(seq_lens)), new_tokens)
    positions = np.arange(query_start[-1]) - query_start[sequence] + (seq_lens - new_tokens)[sequence]
    slots = block_tables[:, sequence, positions // block_size] * block_size + positions % block_size
    return positions, slots
