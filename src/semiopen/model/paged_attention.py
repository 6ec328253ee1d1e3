"""Attention over a paged KV cache: of the sealed blocks in the enclave, and of the open blocks in our own engine.

Registered with transformers as an attention function, so that each family's own modules call it: they bring
query, key and value of all tokens of a step in one row, and it keeps keys and values, and attends per sequence.

Legend: T tokens of the step, R sequences of one group, Q new tokens per sequence, K keys, h query heads,
g key/value heads, d head size.
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from semiopen.model.packed_step import PackedStep
from semiopen.model.ragged_attention import Reads, ragged_attention

NAME = "semiopen_paged"
_MAX_SCORES = 1 << 24  # scores per head of one attention call: 64 MiB of mask as SDPA sees it
_MAX_KEYS = 1 << 16  # keys gathered by one attention call: 512 MiB at 8 heads of 128
_FEW_TOKENS = 8  # up to this many new tokens of a sequence attend one by one, on a CPU


class NoCacheMemory(MemoryError):
    """The system has no memory for a KV cache."""


class KVCache:
    """Keys and values of one session: per block of the model two tensors [g, slots, d].

    Heads come first, so that the KV blocks of a sequence are gathered as a few long runs and SDPA reads each head's
    keys in one piece. They are made when a block first writes, as its shapes are the family's business, and take
    memory only where they are used. On a CPU keys are kept in fp32: `ragged_attention` wants them so, and scores
    computed from them are not rounded.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots = blocks * block_size
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[int, int] = {}  # which of a step's block tables each layer reads through

    def write(
        self, layer: int, table: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store key and value [g, T, d] of one layer at slots [T] of a table; return that layer's whole caches.

        Raises:
            NoCacheMemory: the system gives no memory for the caches.
        """
        if key.device.type == "cpu":
            key = key.float()
        if layer not in self._layers:
            self._layers[layer] = (self._empty(key), self._empty(value))
            self._tables[layer] = table
        keys, values = self._layers[layer]
        keys.index_copy_(1, slots, key)
        values.index_copy_(1, slots, value)
        return keys, values

    def prepare_blocks(self, step: PackedStep) -> None:
        """Carry out a step's copies, and wipe the blocks that it begins.

        Whole blocks are read, with a mask over slots that are not written yet. What an earlier sequence left there
        would be multiplied by zero, which does not make a NaN vanish.
        """
        copies = torch.from_numpy(step.copies)
        begins = step.positions % step.block_size == 0
        begun = torch.from_numpy(step.slots[:, begins] // step.block_size)
        if not len(copies) and not begun.shape[1]:
            return
        for layer, caches in self._layers.items():
            for cache in caches:
                blocks = _in_blocks(cache, self._block_size)
                blocks[:, copies[:, 1]] = blocks[:, copies[:, 0]]
                blocks[:, begun[self._tables[layer]]] = 0

    def wipe(self, blocks: np.ndarray) -> None:
        """Write zeros over all that KV blocks [N] hold."""
        places = torch.from_numpy(blocks)
        for caches in self._layers.values():
            for cache in caches:
                _in_blocks(cache, self._block_size).index_fill_(1, places.to(cache.device), 0)

    def forget(self) -> None:
        """Give all memory back to the system, which overwrites it before anybody gets it."""
        self._layers.clear()
        self._tables.clear()

    def _empty(self, new: torch.Tensor) -> torch.Tensor:
        # Not torch.zeros, which writes to every page. Huge pages would take 2 MiB for the first token of each head.
        shape = (new.shape[0], self._slots, new.shape[2])
        try:
            memory = mmap.mmap(-1, prod(shape) * new.element_size())
        except OSError as error:
            raise NoCacheMemory from error
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=new.dtype).view(shape)


def _in_blocks(cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """A cache [g, slots, d] as [g, KV blocks, block_size * d]."""
    return cache.view(cache.shape[0], -1, block_size * cache.shape[2])


@dataclass
class View:
    """What the tokens of one group may see: R sequences, W of their KV blocks each."""

    blocks: torch.Tensor  # [R * W]
    block_size: int
    keys: int  # of the W * block_size keys of a sequence, how many are looked at
    mask: torch.Tensor | None  # [R, 1, Q, K], true where a token may look; None: all of it

    def gather(self, cache: torch.Tensor, sequences: int) -> torch.Tensor:
        """The view's part of a cache, [R, g, K, d]."""
        found = _in_blocks(cache, self.block_size).index_select(1, self.blocks)
        return found.view(cache.shape[0], sequences, -1, cache.shape[2]).transpose(0, 1)[:, :, : self.keys]


@dataclass
class Group:
    """Sequences of a step that bring the same number of new tokens, so that they attend in one call."""

    tokens: torch.Tensor | None  # [R, Q] rows of the step's tokens; None: the whole step in order, Q = 1
    positions: torch.Tensor  # [R, Q]
    block_table: torch.Tensor  # [R, W]
    block_size: int
    views: dict[int | None, View] = field(default_factory=dict)

    def __post_init__(self) -> None:
        last = self.positions[:, -1]
        self.shortest, self.longest = int(last.min()) + 1, int(last.max()) + 1

    def is_fresh(self, window: int | None) -> bool:
        """Whether every token sees all before it in this step, and nothing else."""
        new = self.positions.shape[1]
        return 1 < new == self.longest and (window is None or new <= window)

    def view(self, window: int | None) -> View:
        """What these tokens may see: a token at position p keys at (p - window, p]. Once per step and window."""
        if window not in self.views:
            size = self.block_size
            last = self.positions[:, -1] // size
            if window is None or self.longest <= window:
                first = torch.zeros_like(last)
            else:
                first = (self.positions[:, 0] - window + 1).clamp(min=0) // size
            width = int((last - first).max()) + 1
            columns = torch.minimum(first[:, None] + torch.arange(width), last[:, None])
            blocks = self.block_table.gather(1, columns).reshape(-1)
            keys = width * size
            if not bool(first.any()):
                keys = min(keys, self.longest)
                if (
                    self.positions.shape[1] == 1
                    and self.shortest == self.longest
                    and (window is None or keys <= window)
                ):
                    self.views[window] = View(blocks, size, keys, None)
                    return self.views[window]
            key = ((first * size)[:, None] + torch.arange(keys))[:, None, None]
            query = self.positions[:, None, :, None]
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            self.views[window] = View(blocks, size, keys, mask)
        return self.views[window]


def _group_rows(step: PackedStep, sequences: Iterable[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Divide sequences of a step into groups whose memory is bounded, whatever history they claim.

    A long prompt is divided into runs of tokens; runs of equal length go together as long as they fit. Yields the
    number of tokens per run, and (first token, sequence) of each run.
    """
    runs: dict[int, list[tuple[int, int, int]]] = {}
    bounds, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    for row in sequences:
        begin, end, length = bounds[row], bounds[row + 1], lengths[row]
        stride = max(1, _MAX_SCORES // length)
        for start in range(begin, end, stride):
            runs.setdefault(min(stride, end - start), []).append((start, row, length))
    for count, members in runs.items():
        group: list[tuple[int, int]] = []
        longest = 0
        for start, row, length in members:
            longest = max(longest, length)
            if group and (len(group) + 1) * longest * max(count, _MAX_SCORES // _MAX_KEYS) > _MAX_SCORES:
                yield count, group
                group, longest = [], length
            group.append((start, row))
        yield count, group


class RunningStep:
    """What the attention function needs to know of the step that runs; one at a time in this process.

    On a CPU, sequences with few new tokens attend token by token, through `reads`, and the others in `long_groups`.
    Elsewhere all attend in `groups`.
    """

    current: "RunningStep | None" = None

    def __init__(self, step: PackedStep, cache: KVCache) -> None:
        self.cache = cache
        self.score_cap = step.score_cap
        self.table_of = step.table_of
        self.slots = torch.from_numpy(step.slots)
        self._step = step
        self._positions = torch.from_numpy(step.positions)
        self._tables = torch.from_numpy(step.block_tables)
        self._new = np.diff(step.query_start)
        self._reads: dict[tuple[int, int | None], Reads | None] = {}

    @cached_property
    def groups(self) -> list[list[Group]]:
        """Groups of all sequences, per block table."""
        groups = self._groups_of(range(len(self._new)))
        for of_table in groups:
            if len(of_table) == 1 and len(self._step.token_ids) == len(self._step.seq_lens):
                of_table[0].tokens = None
        return groups

    @cached_property
    def long_groups(self) -> list[list[Group]]:
        """Groups of the sequences with more than `_FEW_TOKENS` new tokens, per block table."""
        return self._groups_of(np.flatnonzero(self._new > _FEW_TOKENS).tolist())

    def _groups_of(self, sequences: Iterable[int]) -> list[list[Group]]:
        groups: list[list[Group]] = [[] for _ in self._tables]
        for count, members in _group_rows(self._step, sequences):
            starts, rows = torch.tensor(members).unbind(1)
            tokens = starts[:, None] + torch.arange(count)
            for of_table, table in zip(groups, self._tables, strict=True):
                of_table.append(Group(tokens, self._positions[tokens], table[rows], self._step.block_size))
        return groups

    def reads(self, table: int, window: int | None) -> Reads | None:
        """What the tokens of the other sequences may read; None where there are none."""
        if (table, window) not in self._reads:
            step, few = self._step, self._new <= _FEW_TOKENS
            found = None
            if few.all() and len(step.token_ids) == len(few):
                found = Reads(step.positions, step.block_tables[table], step.block_size, window)
            elif few.any():
                tokens = np.flatnonzero(np.repeat(few, self._new))
                tables = step.block_tables[table][np.repeat(np.arange(len(few)), self._new)[tokens]]
                found = Reads(step.positions[tokens], tables, step.block_size, window, tokens)
            self._reads[table, window] = found
        return self._reads[table, window]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged_step: RunningStep | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Store this step's keys and values, and attend over each sequence's whole history.

    Args:
        module: the attention module; its `layer_idx` names the layer of the cache.
        query: [1, h, T, d]. key, value: [1, g, T, d].
        attention_mask, dropout, kwargs: not used; masks follow from positions, and nothing is trained here.
        scaling: factor of the scores, 1 / sqrt(d) when None.
        sliding_window: keys a token sees, itself included; None for all.
        softcap: scores s become softcap * tanh(s / softcap) where given (Gemma 2).
        paged_step: the step that runs, where the model was called with one; else `RunningStep.current`.

    Returns:
        Attention output [1, T, h, d], and None for the weights.
    """
    step = paged_step or RunningStep.current
    assert step is not None, "attention ran outside of a step"
    query, key, value = query[0], key[0], value[0]  # [heads, T, d]
    table = step.table_of(sliding_window)
    keys, values = step.cache.write(cast(int, module.layer_idx), table, step.slots[table], key, value)
    softcap = softcap if step.score_cap else None
    output = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    on_cpu = query.device.type == "cpu"
    if on_cpu and (reads := step.reads(table, sliding_window)) is not None:
        ragged_attention(query, keys, values, reads, scaling, softcap, output)
    for group in step.long_groups[table] if on_cpu else step.groups[table]:
        sequences, new = group.positions.shape
        q = query.transpose(0, 1)[:, :, None] if group.tokens is None else query[:, group.tokens].transpose(0, 1)
        grouped = query.shape[0] != key.shape[0]
        if group.is_fresh(sliding_window) and softcap is None:
            k, v = (tensor[:, group.tokens].transpose(0, 1) for tensor in (key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        else:
            view = group.view(sliding_window)
            k, v = view.gather(keys, sequences).to(q.dtype), view.gather(values, sequences)
            if softcap is not None:
                out = _softcapped_attention(q, k, v, view.mask, scaling, grouped, softcap)
            elif new == 1:  # the query heads of one key head attend like tokens of one sequence: no copies of k and v
                q = q.reshape(sequences, key.shape[0], -1, query.shape[2])
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, scale=scaling)
                out = out.reshape(sequences, query.shape[0], 1, -1)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, scale=scaling, enable_gqa=grouped)
        if group.tokens is None:
            return out[:, :, 0][None], None
        output[group.tokens] = out.transpose(1, 2)
    return output[None], None


def _softcapped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, which SDPA does not offer. Shapes as there; softmax in fp32 as in Gemma 2."""
    groups = q.shape[1] // k.shape[1]
    if enable_gqa:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


# No mask function is registered beside it: transformers then builds no mask. Masks follow from positions here.
AttentionInterface.register(NAME, paged_attention)
