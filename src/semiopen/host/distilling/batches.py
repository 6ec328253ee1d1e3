"""Batches for distilling: token ids, what of them is learned, and what the teacher said if that is kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from semiopen.host.distilling.losses import TopK
from semiopen.host.distilling.targets import KeptTargets
from semiopen.host.tuning.batches import IGNORED
from semiopen.host.tuning.data import Examples

Item = tuple[torch.Tensor, torch.Tensor, TopK | None]


class DistilDataset(Dataset[Item]):
    """Some examples, each with what the teacher says of it, if that is kept.

    An item is (ids [S] int64, labels [S] int64, targets of its learned tokens or None); labels of tokens that are not
    learned are -100.
    """

    def __init__(self, examples: Examples, indices: np.ndarray, kept: KeptTargets | None = None) -> None:
        self._examples, self._indices, self._kept = examples, indices, kept

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Item:
        span = self._examples.span(int(self._indices[place]))
        ids = torch.from_numpy(self._examples.ids[span]).long()
        labels = ids.masked_fill(torch.from_numpy(~self._examples.learned[span]), IGNORED)
        return ids, labels, None if self._kept is None else self._kept.of(place)

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return self._examples.lengths[self._indices]


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """A batch, padded on the right; logits are asked for only at columns where some row learns its next token.

    Returns:
        input_ids, attention_mask, labels [B, S]; logits_to_keep [K] columns; shift_labels [B, K], what follows at
        those columns; and if all items have targets, teacher_ids [M, K'] and teacher_log_probs [M, K' + 1] of the M
        learned tokens, row by row.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row for row, _, _ in items], batch_first=True)
    labels = pad([row for _, row, _ in items], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row) for row, _, _ in items])
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
        "logits_to_keep": columns,
        "shift_labels": labels[:, 1:][:, columns].contiguous(),
    }
    targets = [found for _, _, found in items if found is not None]
    if len(targets) == len(items):
        batch["teacher_ids"] = torch.cat([found.ids for found in targets])
        batch["teacher_log_probs"] = torch.cat([found.log_probs for found in targets])
    return batch
