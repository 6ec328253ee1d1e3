"""Ties a transformers KV cache to the sequences in the enclave, so that what happens to one happens to both."""

import copy
import functools

import torch
from transformers import DynamicCache

from semiopen.errors import EnclaveError, UnsupportedCallError
from semiopen.host.sequences import Rows


class FollowsEnclave:
    """Mixed into a cache's class: cropping, beams and resets reach the enclave's sequences too."""

    enclave_rows: Rows
    enclave_alone: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held; counted by the enclave's rows where the host has no block of its own."""
        return self.enclave_rows.columns if self.enclave_alone else super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.enclave_rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        rows = torch.arange(len(self.enclave_rows.tables))
        self.enclave_rows.select(rows[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = range(len(self.enclave_rows.tables))
        self.enclave_rows.select([row for row in rows for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: minus how many, or (deprecated upstream) the length to keep."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        held = self.enclave_rows.columns
        keep = tokens_to_remove if tokens_to_remove > 0 else held + tokens_to_remove
        self.enclave_rows.crop(max(0, min(keep, held)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.enclave_rows.crop(0)

    def __reduce_ex__(self, protocol: object) -> str:
        raise EnclaveError("A cache whose prefix lives in the enclave cannot be pickled; keep it in this process.")

    def __deepcopy__(self, memo: dict) -> "FollowsEnclave":
        """Fork the cache and the enclave's sequences with it."""
        fork = type(self).__new__(type(self))
        memo[id(self)] = fork
        fork.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return fork


@functools.cache
def _following(cache_class: type[DynamicCache]) -> type[DynamicCache]:
    return type(cache_class.__name__, (FollowsEnclave, cache_class), {"__module__": cache_class.__module__})


def follow(cache: object, rows: Rows, alone: bool) -> None:
    """Make an empty `cache` follow `rows`; `alone` where the host has no block, so that it keeps nothing itself.

    Raises:
        UnsupportedCallError: the cache is of another kind, or holds tokens that the enclave has not seen.
    """
    if not isinstance(cache, DynamicCache):
        raise UnsupportedCallError(
            f"A {type(cache).__name__} cannot follow the enclave's cache; use the default cache or a DynamicCache."
        )
    if cache.get_seq_length():
        raise UnsupportedCallError(
            "This cache holds tokens that the enclave has not seen; start with an empty DynamicCache."
        )
    cache.__class__ = _following(type(cache))
    cache.enclave_rows = rows  # type: ignore[attr-defined]
    cache.enclave_alone = alone  # type: ignore[attr-defined]
