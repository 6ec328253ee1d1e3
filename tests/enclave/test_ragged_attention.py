"""Attention of single tokens over a paged cache, against the formula, for each kind of mask."""

import itertools

import numpy as np
import pytest
import torch

from semiopen.model import ragged_attention
from semiopen.model.ragged_attention import Reads

HEADS, SIZE, SLOTS = 4, 16, 512
LENGTHS = [1, 7, 64, 65, 200, 8]


def setup(block_size: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query [h, T, d], keys and values [g, slots, d], and shuffled block tables [T, W]."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(HEADS, len(LENGTHS), SIZE, generator=generator).to(dtype)
    keys, values = (torch.randn(kv_heads, SLOTS * 4, SIZE, generator=generator).to(dtype) for _ in range(2))
    order = torch.from_numpy(np.random.default_rng(0).permutation(SLOTS * 4 // block_size))
    width = -(-max(LENGTHS) // block_size)
    return query, keys.float(), values, order[: len(LENGTHS) * width].view(len(LENGTHS), width)


def attend(query, keys, values, tables, block_size, window, softcap, rows=None):
    """States of some tokens [R, h, d]."""
    tokens = np.arange(len(LENGTHS)) if rows is None else np.array(rows)
    named = None if rows is None else tokens
    reads = Reads(np.array(LENGTHS)[tokens] - 1, tables.numpy()[tokens], block_size, window, named)
    out = torch.zeros(len(LENGTHS), HEADS, SIZE, dtype=query.dtype)
    for _ in range(2):  # the second time with a kept pattern
        ragged_attention.ragged_attention(query, keys, values, reads, None, softcap, out)
    return out[tokens]


def formula(query, keys, values, tables, block_size, window, softcap):
    rows = []
    for token, length in enumerate(LENGTHS):
        seen = torch.arange(0 if window is None else max(0, length - window), length)
        slots = tables[token, seen // block_size] * block_size + seen % block_size
        k, v = (c[:, slots].double().repeat_interleave(HEADS // len(c), 0) for c in (keys, values))
        scores = (k @ query[:, token, :, None].double())[..., 0] * SIZE**-0.5
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        rows.append((scores.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(rows)


CASES = list(itertools.product([8, 16, 128], [None, 1, 9, 64], [None, 2.0], [4, 1]))


@pytest.mark.parametrize(("block_size", "window", "softcap", "kv_heads"), CASES)
def test_it_is_the_formula(block_size, window, softcap, kv_heads):
    inputs = setup(block_size, kv_heads, torch.float32)
    expected = formula(*inputs, block_size, window, softcap).float()
    torch.testing.assert_close(attend(*inputs, block_size, window, softcap), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_only_in_weights_and_result():
    inputs = setup(16, 2, torch.bfloat16)
    expected = formula(*inputs, 16, None, None).float()
    torch.testing.assert_close(attend(*inputs, 16, None, None).float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("window", [None, 9])
def test_calls_of_bounded_size_change_nothing(monkeypatch, window):
    inputs = setup(16, 2, torch.float32)
    expected = attend(*inputs, 16, window, None)
    monkeypatch.setattr(ragged_attention, "_MAX_ENTRIES", 300)
    monkeypatch.setattr(ragged_attention, "_KEPT_ENTRIES", 300)
    torch.testing.assert_close(attend(*inputs, 16, window, None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 9])
def test_a_row_depends_on_the_others_by_rounding_only(window):
    inputs = setup(16, 2, torch.float32)
    together = attend(*inputs, 16, window, None)
    for token in range(len(LENGTHS)):
        alone = attend(*inputs, 16, window, None, rows=[token])[0]
        torch.testing.assert_close(alone, together[token], rtol=1e-5, atol=1e-6)


def test_what_lies_in_other_slots_does_not_matter():
    query, keys, values, tables = setup(16, 2, torch.float32)
    expected = attend(query, keys, values, tables, 16, None, None)
    used = torch.zeros(keys.shape[1], dtype=torch.bool)
    for token, length in enumerate(LENGTHS):
        seen = torch.arange(length)
        used[tables[token, seen // 16] * 16 + seen % 16] = True
    for cache in (keys, values):
        cache[:, ~used] = torch.nan
    assert torch.equal(attend(query, keys, values, tables, 16, None, None), expected)
