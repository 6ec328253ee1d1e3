"""A text that grows token by token, with candidates for the next one: cheap, where a cache can be forked.

Legend: T tokens, C candidates, H hidden size.
"""

import copy
from typing import cast

import torch
from transformers import DynamicCache

from semiopen.model.parts import Blocks


def lacking(held: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Those of the tokens `known` [T] still to be run where `held` are; all, where these are of another text."""
    return known[len(held) :] if len(held) <= len(known) and torch.equal(held, known[: len(held)]) else known


class GrowingText:
    """Runs blocks on such a text."""

    def __init__(self, blocks: Blocks, batch: int = 256) -> None:
        """Take blocks that run on token ids; `batch` candidates are run at once."""
        self._blocks, self._batch = blocks, batch
        self._begin()

    def lacking(self, known: torch.Tensor) -> torch.Tensor:
        """See `lacking`."""
        return lacking(self._known, known)

    @torch.inference_mode()
    def next_states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """[C, H]: of each candidate [C] as the next token behind the tokens `known` [T]."""
        new = self.lacking(known)
        if len(new) + len(self._known) != len(known):
            self._begin()
        if len(new):
            self._run(new[None], self._cache)
        self._known = known.clone()
        found = []
        for part in candidates.split(self._batch):
            cache = copy.deepcopy(self._cache)
            if len(known):
                cache.batch_repeat_interleave(len(part))
            found.append(self._run(part[:, None], cache)[:, -1])
        return torch.cat(found)

    def _begin(self) -> None:
        self._known = torch.empty(0, dtype=torch.int64)
        self._cache = DynamicCache(config=self._blocks.decoder.config)

    def _run(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        output = self._blocks.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return cast(torch.Tensor, output.last_hidden_state)
