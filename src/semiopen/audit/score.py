"""How much of the victim a thief's model has: agreement, divergence, and loss on texts that no attack has seen.

Legend: N sequences, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from semiopen.audit.thief import answer, upper_part
from semiopen.audit.victim import Victim

_BATCH = 16
_DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Exam:
    """Texts that no attack has seen, and what the victim says to them.

    Attributes:
        ids: [N, T] token ids.
        x: what goes into a model for them; see `Victim.model_input`.
        states: [N, T, H] what the victim's sealed layers gave out.
        upper: what makes the victim's own logits [n, T, V] of n sequences of them.
    """

    ids: torch.Tensor
    x: torch.Tensor
    states: torch.Tensor
    upper: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(
        cls, victim: Victim, ids: torch.Tensor, upper: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> "Exam":
        """Ask the victim, at the auditor's expense: a thief's budget does not count these queries.

        Where its head does not lie open, only the auditor can make logits of its states, by `upper`.
        """
        spent = (victim.spent.queries, victim.spent.tokens)
        states = torch.cat([victim.query(part) for part in ids.split(_BATCH)])
        victim.spent.queries, victim.spent.tokens = spent
        return cls(ids, victim.model_input(ids), states, upper or upper_part(victim))

    def below_the_head(self, upper: Callable[[torch.Tensor], torch.Tensor] | None = None) -> "Exam":
        """The same for whoever is given the true states, so that his head alone is marked; or another head is right."""
        return Exam(self.ids, self.states, self.states, upper or self.upper)


@dataclass(frozen=True)
class Score:
    """Means over all tokens of an exam.

    Attributes:
        agreement: share of tokens after which both models' likeliest next tokens are the same.
        agreement_low, agreement_high: 95 % interval of it, over the exam's sequences.
        kl: divergence of the thief's next-token distribution from the victim's, KL(victim || thief), in nats.
        loss: the thief's cross-entropy on the texts themselves, in nats per token.
        victim_loss: the victim's.
    """

    agreement: float
    agreement_low: float
    agreement_high: float
    kl: float
    loss: float
    victim_loss: float

    @property
    def excess(self) -> float:
        """By how much the thief's model is worse, in nats per token."""
        return self.loss - self.victim_loss

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def score(thief: PreTrainedModel, exam: Exam) -> Score:
    """Mark a thief's model."""
    rows = per_sequence(thief, exam)
    agreement, kl, loss, victim_loss = rows.mean(0).tolist()
    drawn = torch.randint(len(rows), (_DRAWS, len(rows)), generator=torch.Generator().manual_seed(0))
    low, high = rows[:, 0][drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Score(agreement, low, high, kl, loss, victim_loss)


@torch.inference_mode()
def per_sequence(thief: PreTrainedModel, exam: Exam) -> torch.Tensor:
    """[N, 4]: agreement, kl, loss and victim's loss of each sequence."""
    rows = []
    for ids, x, states in zip(*(part.split(_BATCH) for part in (exam.ids, exam.x, exam.states)), strict=True):
        theirs, mine = exam.upper(states).float(), answer(thief, x).float()
        agree = (theirs.argmax(-1) == mine.argmax(-1)).float().mean(1)
        truth, guess = theirs.log_softmax(-1), mine.log_softmax(-1)
        kl = (truth.exp() * (truth - guess)).sum(-1).mean(1)
        losses = [F.nll_loss(p[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1) for p in (guess, truth)]
        rows.append(torch.stack([agree, kl, *losses], 1))
    return torch.cat(rows)
