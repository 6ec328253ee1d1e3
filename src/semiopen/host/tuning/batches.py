"""Batches of stored states and labels for a training loop."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from semiopen.host.tuning.data import Examples

IGNORED = -100  # label that transformers leaves out of the loss
_GROUP = 32  # batches whose examples are sorted by length together

Item = tuple[torch.Tensor, torch.Tensor]


class StatesDataset(Dataset[Item]):
    """Some examples with their states.

    An item is (states [S, H], labels [S] int64); labels of tokens that are not learned are -100.
    """

    def __init__(self, examples: Examples, states: torch.Tensor, indices: np.ndarray) -> None:
        self._examples, self._states, self._indices = examples, states, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Item:
        span = self._examples.span(int(self._indices[place]))
        labels = torch.from_numpy(self._examples.ids[span]).long()
        return self._states[span], labels.masked_fill(torch.from_numpy(~self._examples.learned[span]), IGNORED)

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return self._examples.lengths[self._indices]


def collate(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """A batch for a model of `semiopen.load`, padded on the right.

    Logits are asked for only at columns where some row learns its next token: the head's work and memory, often the
    largest of all, are spent on nothing else.

    Returns:
        enclave_states [B, S, H], attention_mask [B, S], labels [B, S], logits_to_keep [K] columns, and shift_labels
        [B, K], what follows at those columns.
    """
    lengths = torch.tensor([len(labels) for _, labels in items])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    states = torch.nn.utils.rnn.pad_sequence([states for states, _ in items], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([row for _, row in items], batch_first=True, padding_value=IGNORED)
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    return {
        "enclave_states": states,
        "attention_mask": mask.long(),
        "labels": labels,
        "logits_to_keep": columns,
        "shift_labels": labels[:, 1:][:, columns].contiguous(),
    }


class LengthGroups(Sampler[int]):
    """A new order for each epoch in which neighbours are of like length, so that batches have little padding.

    The order depends on the seed and the epoch alone, so that a resumed run finds its place again.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self._seed, self._epoch))
        order = draw.permutation(len(self._lengths))
        size = self._batch_size
        whole = len(order) - len(order) % size  # a last, smaller batch stays the last
        groups = [order[at : min(at + _GROUP * size, whole)] for at in range(0, whole, _GROUP * size)]
        groups = [group[np.argsort(-self._lengths[group], kind="stable")] for group in groups]
        batches = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
        for index in draw.permutation(len(batches)):
            yield from batches[index].tolist()
        yield from order[whole:].tolist()
