"""How much of the victim a thief's model has: agreement, divergence, and loss on texts that no attack has seen."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

_BATCH = 16


@dataclass(frozen=True)
class Score:
    """Means over all tokens of the evaluation texts.

    Attributes:
        agreement: share of tokens after which both models' likeliest next tokens are the same.
        kl: divergence of the thief's next-token distribution from the victim's, KL(victim || thief), in nats.
        loss: the thief's cross-entropy on the texts themselves, in nats per token.
        victim_loss: the victim's.
    """

    agreement: float
    kl: float
    loss: float
    victim_loss: float

    @property
    def excess(self) -> float:
        """By how much the thief's model is worse, in nats per token."""
        return self.loss - self.victim_loss


@torch.inference_mode()
def score(thief: nn.Module, victim: nn.Module, ids: torch.Tensor) -> Score:
    """Compare a thief's model with the victim's.

    Args:
        thief, victim: callables that give `logits` [B, T, V] for `input_ids` [B, T].
        ids: [N, T] token ids of texts that neither queries nor training have touched.
    """
    rows = per_sequence(thief, victim, ids)
    return Score(*rows.mean(0).tolist())


@torch.inference_mode()
def per_sequence(thief: nn.Module, victim: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[N, 4]: agreement, kl, loss and victim's loss of each sequence, for intervals."""
    rows = []
    for part in ids.split(_BATCH):
        theirs, mine = (model(input_ids=part, use_cache=False).logits.float() for model in (victim, thief))
        agree = (theirs.argmax(-1) == mine.argmax(-1)).float().mean(1)
        truth, guess = theirs.log_softmax(-1), mine.log_softmax(-1)
        kl = (truth.exp() * (truth - guess)).sum(-1).mean(1)
        losses = [F.nll_loss(p[:, :-1].transpose(1, 2), part[:, 1:], reduction="none").mean(1) for p in (guess, truth)]
        rows.append(torch.stack([agree, kl, *losses], 1))
    return torch.cat(rows)


def agreement(thief: PreTrainedModel, victim: PreTrainedModel, ids: torch.Tensor) -> float:
    """Share of tokens of `ids` [N, T] after which both models' likeliest next tokens are the same."""
    return score(thief, victim, ids).agreement
