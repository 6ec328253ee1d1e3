"""Attention of the sealed blocks over the enclave's own paged KV cache.

Registered with transformers as an attention function, so that each family's own modules call it: they bring
query, key and value of all tokens of a step in one row, and it keeps keys and values, and attends per sequence.

Legend: T tokens of the step, R sequences of one group, Q new tokens per sequence, K keys, h query heads,
g key/value heads, d head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from semiopen.enclave.trusted_state import BLOCK_SIZE, CheckedStep

NAME = "semiopen_paged"
_MAX_SCORES = 1 << 24  # scores per head of one attention call: 64 MiB of mask as SDPA sees it
_MAX_KEYS = 1 << 16  # keys gathered by one attention call: 256 MiB at 8 heads of 128 in half precision


class KVCache:
    """Keys and values of one session: per block of the model two tensors [slots, g, d].

    They are made when a block first writes, as its shapes are the family's business. `torch.zeros` maps
    untouched pages lazily, so a large cache costs memory only where it is used.
    """

    def __init__(self, blocks: int) -> None:
        self._slots = blocks * BLOCK_SIZE
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store key and value [T, g, d] of one layer at slots [T]; return that layer's whole caches."""
        if layer not in self._layers:
            keys, values = (torch.zeros(self._slots, *new.shape[1:], dtype=new.dtype) for new in (key, value))
            self._layers[layer] = (keys, values)
        keys, values = self._layers[layer]
        keys[slots] = key
        values[slots] = value
        return keys, values

    def copy_blocks(self, copies: torch.Tensor) -> None:
        """Copy blocks `copies[:, 0]` to `copies[:, 1]` in every layer."""
        for layer in self._layers.values():
            for cache in layer:
                blocks = cache.view(-1, BLOCK_SIZE, *cache.shape[1:])
                blocks[copies[:, 1]] = blocks[copies[:, 0]]


@dataclass
class Group:
    """Sequences of a step that bring the same number of new tokens, so that they attend in one call."""

    tokens: torch.Tensor  # [R, Q] rows of the step's tokens
    positions: torch.Tensor  # [R, Q]
    block_table: torch.Tensor  # [R, W]
    views: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def keys_in_view(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [R, K] that hold the keys these tokens may see, and mask [R, 1, Q, K], true where they may.

        A token at position p sees keys at positions (p - window, p]. Computed once per step and window.
        """
        if window not in self.views:
            first, last = self.positions[:, 0], self.positions[:, -1]
            start = torch.zeros_like(first) if window is None else (first - window + 1).clamp(min=0)
            span = int((last - start).max()) + 1
            key_positions = start[:, None] + torch.arange(span)
            query = self.positions[:, :, None]
            mask = key_positions[:, None, :] <= query
            if window is not None:
                mask &= key_positions[:, None, :] > query - window
            readable = torch.minimum(key_positions, last[:, None])
            slots = self.block_table.gather(1, readable // BLOCK_SIZE) * BLOCK_SIZE + readable % BLOCK_SIZE
            self.views[window] = (slots, mask[:, None])
        return self.views[window]


def _group_rows(step: CheckedStep) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Divide a step into groups whose memory is bounded, whatever history their sequences claim.

    A long prompt is divided into runs of tokens; runs of equal length go together as long as they fit. Yields the
    number of tokens per run, and (first token, sequence) of each run.
    """
    runs: dict[int, list[tuple[int, int, int]]] = {}
    bounds, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    for row, (begin, end, length) in enumerate(zip(bounds[:-1], bounds[1:], lengths, strict=True)):
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
    """What the attention function needs to know of the step that runs; one at a time in this process."""

    current: "RunningStep | None" = None

    def __init__(self, step: CheckedStep, cache: KVCache) -> None:
        self.cache = cache
        self.score_cap = step.score_cap
        self.slots = torch.from_numpy(step.slots)
        positions = torch.from_numpy(step.positions)
        tables = torch.from_numpy(step.block_table)
        self.groups = []
        for count, members in _group_rows(step):
            starts, rows = torch.tensor(members).unbind(1)
            tokens = starts[:, None] + torch.arange(count)
            self.groups.append(Group(tokens, positions[tokens], tables[rows]))


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

    Returns:
        Attention output [1, T, h, d], and None for the weights.
    """
    step = RunningStep.current
    assert step is not None, "attention ran outside of a step"
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, d]
    keys, values = step.cache.write(cast(int, module.layer_idx), step.slots, key, value)
    softcap = softcap if step.score_cap else None
    output = torch.empty(query.shape[0], query.shape[1], value.shape[2], dtype=query.dtype)
    for group in step.groups:
        slots, mask = group.keys_in_view(sliding_window)
        q = query[group.tokens].transpose(1, 2)  # [R, h, Q, d]
        k, v = keys[slots].transpose(1, 2), values[slots].transpose(1, 2)  # [R, g, K, d]
        grouped = q.shape[1] != k.shape[1]
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
        else:
            out = _softcapped_attention(q, k, v, mask, scaling, grouped, softcap)
        output[group.tokens] = out.transpose(1, 2)
    return output[None], None


def _softcapped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor,
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
    scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _no_mask(*args: object, **kwargs: object) -> None:
    """Masks follow from positions in `paged_attention`, so transformers need not build any."""


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
