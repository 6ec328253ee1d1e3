"""The order of attention in the open blocks of a `kv: enclave` bundle, which only the enclave knows.

Legend: B open blocks, A numbers of a token's attention (query heads times their size), R rows.
"""

import torch

from semiopen.errors import BundleError


class AttentionOrder:
    """The places [B, A] that put attention in order."""

    def __init__(self, table: torch.Tensor, blocks: int, size: int) -> None:
        """Take the sealed table, of any type of integers.

        Args:
            table: [B, A] where each number of a block's attention lies.
            blocks, size: B and A of config.json.

        Raises:
            BundleError: not a permutation for each block.
        """
        places = table.long()
        if places.shape != (blocks, size) or not bool((places.sort(dim=1).values == torch.arange(size)).all()):
            raise BundleError("The sealed order of attention is damaged; seal the model again.")
        self.blocks, self.size = blocks, size
        self._places = (places, places.argsort(dim=1))

    def put(self, rows: torch.Tensor, block: int, back: bool) -> None:
        """Put attention [R, A] of one block in order, in place; or `back`, as it was."""
        rows.copy_(rows.index_select(1, self._places[back][block]))
