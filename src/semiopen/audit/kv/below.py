"""What a thief has of the layers below the first open block: weights to run, or the enclave to ask.

Legend: T tokens, C candidates, H hidden size.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from transformers import PreTrainedConfig

from semiopen.audit.growing import GrowingText
from semiopen.audit.kv.dump import Dump
from semiopen.audit.victim import Growable, SealedSet
from semiopen.audit.weights.align import align
from semiopen.audit.weights.key import lock_rest
from semiopen.model.parts import Blocks


class Below(Protocol):
    """Gives the states that would enter the first open block.

    Attributes:
        batch: candidates that it takes at once.
    """

    batch: int

    @property
    def asked(self) -> int:
        """Tokens that the enclave was asked."""
        ...

    def states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """[C, H]: of each candidate [C] as the next token behind the tokens `known` [T]."""
        ...

    def all_states(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, T, H] of whole texts [N, T]."""
        ...


class Layers:
    """Embedding and bottom blocks in the thief's own hands: the victim's, or a relative's in the victim's basis."""

    asked = 0

    def __init__(
        self, config: PreTrainedConfig, stop: int, tensors: Mapping[str, torch.Tensor], batch: int = 256
    ) -> None:
        """Take the embedding and blocks [0, stop) from tensors under the whole model's names."""
        self.batch = batch
        self._blocks = Blocks(config, 0, stop).requires_grad_(False)
        self._blocks.load({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
        self._text = GrowingText(self._blocks, batch)

    def states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """See `Below.states`. Texts that grow by a token are cheap."""
        return self._text.next_states(known, candidates)

    @torch.inference_mode()
    def all_states(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Below.all_states`."""
        return torch.cat([self._blocks(part) for part in ids.split(16)])


class Enclave:
    """The enclave itself, which an insider may ask: the true states, for tokens that it counts."""

    def __init__(self, victim: Growable, batch: int = 8) -> None:
        """Take the victim to ask; `batch` candidates at once, as the search ends with the first that fits."""
        self.batch, self._victim, self._before = batch, victim, victim.spent.tokens

    @property
    def asked(self) -> int:
        """Tokens, counted from the beginning."""
        return self._victim.spent.tokens - self._before

    def states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """See `Below.states`; a candidate costs one token, as sequences are forked."""
        return self._victim.next_states(known, candidates)

    def all_states(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Below.all_states`."""
        return torch.cat([self._victim.query(part) for part in ids.split(16)])


def turned_relative(dump: Dump, relative: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """A public relative's layers in the basis of a keyed bundle, for `Layers`; and how well its open blocks resemble.

    Raises:
        SemiopenError: no block is open.
    """
    key, fit = align(dump.config, relative, dump.tensors)
    sealed = SealedSet.prefix(dump.first)
    return lock_rest(dump.config, relative, key.rotation, sealed, head=False), fit
