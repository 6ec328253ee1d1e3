"""What stands where the model's output projection stood, when the head is sealed or its words are shuffled.

The model's `forward` gives logits only where the lease allows them. `generate` works without: the enclave chooses, and
the model says that the chosen token is certain, so that transformers' own loop takes it, whatever it does besides.

Legend: B rows, S tokens, R rows of a request, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, RowChoice
from semiopen.host.embedding import EnclaveEmbedding
from semiopen.model.sampling import draw


@dataclass
class Generating:
    """One run of `generate`: settings of each row, with its prompt; and the tokens chosen so far."""

    rows: list[RowChoice]
    answers: list[list[int]] = field(default_factory=list)
    drawn: int = 0


class EnclaveHead(nn.Module):
    """A head that is sealed in the enclave. Holds no parameters."""

    def __init__(self, embedding: EnclaveEmbedding, vocab_size: int) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, or it would be a child module twice
        self._vocab_size = vocab_size
        self.generating: Generating | None = None
        # For an engine that asks the enclave itself: states come out, or logits in the order of a shuffled head.
        self.gives_states = False

    @property
    def client(self) -> EnclaveClient:
        """The connection to the enclave.

        Raises:
            EnclaveError: it was closed.
        """
        return self._embedding[0].session.client

    @property
    def gives_logits(self) -> bool:
        """Whether the lease allows all logits."""
        return self.client.welcome.rights.all_logits

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [B, S, H] of the last open block -> logits [B, S, V] fp32.

        While `generate` runs without the right to logits: those of a token that is certain, [B, 1, V].

        Raises:
            EnclaveError: `lease`: no logits without the right.
        """
        if self.gives_states:
            return states
        if self.generating is not None:
            return self._certain(self._choose(states[:, -1], self.generating), states.device)
        rights = self.client.welcome.rights
        if not rights.all_logits and not rights.top_k:
            raise EnclaveError(
                "The head is sealed and the lease allows no logits; use generate, or ask the vendor for a lease with "
                "logits.",
                "lease",
            )
        flat = states.reshape(-1, states.shape[-1])
        logits: Any = _Logits.apply(flat, self.client)
        return logits.view(*states.shape[:-1], -1).to(states.device)

    def _choose(self, states: torch.Tensor, generating: Generating) -> np.ndarray:
        tokens, _ = self.client.choose(states, _settle(generating), "transformers")
        return _note(generating, tokens)

    def _certain(self, tokens: np.ndarray, device: torch.device) -> torch.Tensor:
        logits = torch.full((len(tokens), 1, self._vocab_size), -torch.inf, device=device)
        return logits.scatter_(2, torch.from_numpy(tokens)[:, None, None].to(device), 0.0)


class ShuffledHead(EnclaveHead):
    """A projection whose words are in an order that only the enclave knows."""

    def __init__(self, embedding: EnclaveEmbedding, vocab_size: int, projection: nn.Module, cap: float | None) -> None:
        super().__init__(embedding, vocab_size)
        self._cap = cap  # on logits, which the model applies to what leaves here; tokens are chosen before that
        # Its parameters are this module's own, so that checkpoints find them under their names.
        self.weight = cast(nn.Parameter, projection.weight)
        self.bias = cast(nn.Parameter | None, projection.bias)
        self._order: torch.Tensor | None = None  # the shuffled number of each word

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [B, S, H] -> logits [B, S, V] in the true order; see `EnclaveHead.forward`."""
        if self.gives_states:
            return F.linear(states, self.weight, self.bias)
        if self.generating is not None:
            shuffled = F.linear(states[:, -1], self.weight, self.bias).float()
            if self._cap is not None:
                shuffled = self._cap * torch.tanh(shuffled / self._cap)
            return self._certain(self._choose_here(shuffled, self.generating), states.device)
        if not self.gives_logits:
            raise EnclaveError(
                "The words of the head are shuffled and the lease allows no logits; use generate, or ask the vendor "
                "for a lease with logits.",
                "lease",
            )
        return F.linear(states, self.weight, self.bias)[..., self.order.to(states.device)]

    @property
    def order(self) -> torch.Tensor:
        """The shuffled number [V] of each true word.

        Raises:
            EnclaveError: `lease`: without the right to all logits each word counts, and there are not enough left.
        """
        if self._order is None:
            self._order = self.client.word_order(self._vocab_size)
        return self._order

    def _choose_here(self, logits: torch.Tensor, generating: Generating) -> np.ndarray:
        words = draw_words(logits, _settle(generating), "transformers")
        return _note(generating, self.client.reveal(words))


def draw_words(logits: torch.Tensor, rows: Sequence[RowChoice], order: Literal["vllm", "transformers"]) -> np.ndarray:
    """Draw among shuffled words, on this side.

    Args:
        logits: [R, V] fp32, in the order of the shuffled head.
        rows: R settings; penalties are not applied.
        order: of the filters; see `model.sampling.Cuts`.

    Returns:
        Numbers [R] int64 of shuffled words.
    """
    cuts = [_Cut(row, order == "transformers") for row in rows]
    return draw(logits, cuts, [_number(row) for row in rows]).cpu().numpy()


class _Logits(torch.autograd.Function):
    """Logits [R, V] of states [R, H] from the enclave, with gradients through it."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, client: EnclaveClient) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(states)
        ctx.client = client
        return client.score(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (states,) = ctx.saved_tensors
        return ctx.client.backward(states, gradients[0].float()).to(states), None


class _Cut:
    """A row's settings as `draw` wants them."""

    def __init__(self, row: RowChoice, min_p_last: bool) -> None:
        self.min_p_last = min_p_last
        self.temperature, self.top_p, self.top_k, self.min_p = row.temperature, row.top_p, row.top_k, row.min_p


def _settle(generating: Generating) -> list[RowChoice]:
    answers = generating.answers
    return [
        replace(row, place=generating.drawn, answer=answers[index] if answers else ())
        for index, row in enumerate(generating.rows)
    ]


def _note(generating: Generating, tokens: np.ndarray) -> np.ndarray:
    if not generating.answers:
        generating.answers = [[] for _ in tokens]
    for answer, token in zip(generating.answers, tokens.tolist(), strict=True):
        answer.append(token)
    generating.drawn += 1
    return tokens


def _number(row: RowChoice) -> float:
    generator = np.random.Generator(np.random.Philox(key=row.seed % (1 << 64), counter=row.place))
    return float(generator.random())
