"""How far a student's next-token distributions are from a teacher's. The divergence itself is TRL's.

With p the teacher's and q the student's distribution at one token, after dividing logits by the temperature:

    forward KL   sum p (log p - log q)          q covers all that p may say
    reverse KL   sum q (log q - log p)          q keeps to what p would say
    JSD(beta)    beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q      (Agarwal et al. 2024, GKD)

With the teacher's likeliest K tokens only, all others are one further outcome on both sides. Nothing is renormalised:
the student still learns how much the teacher leaves to the others, but not which of them. Merging outcomes can only
lower a divergence, so it is a lower bound of the whole one, and equal to it for K = V - 1.
"""

import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional

with warnings.catch_warnings():
    # TRL says that what lies in this folder may change; tests/distilling/test_losses.py would notice.
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.gkd import GKDTrainer


@dataclass(frozen=True)
class TopK:
    """What a teacher says at M tokens, in short.

    Attributes:
        ids: [M, K] int64, its likeliest tokens, the likeliest first.
        log_probs: [M, K + 1], theirs, and in the last column that of all other tokens together.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor


def divergence(
    student: torch.Tensor, teacher: torch.Tensor | TopK, mixing: float, temperature: float = 1.0
) -> torch.Tensor:
    """Sum over M tokens of the divergence of student from teacher, in nats.

    Args:
        student: [M, V] logits.
        teacher: [M, V] logits, or `TopK` that was made at the same temperature.
        mixing: 0 for forward KL, 1 for reverse KL, between for JSD.
        temperature: of both.
    """
    student = student.float()
    if isinstance(teacher, TopK):
        student, teacher = _with_tail(student / temperature, teacher.ids), teacher.log_probs.float()
        temperature = 1.0
    return GKDTrainer.generalized_jsd_loss(
        student, teacher.float(), beta=mixing, temperature=temperature, reduction="sum"
    )


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Shorten a teacher's logits [M, V] to its k likeliest tokens (V - 1 at most) and the rest."""
    scaled = logits.float() / temperature
    ids = scaled.topk(min(k, scaled.shape[1] - 1), dim=1).indices
    return TopK(ids, _with_tail(scaled, ids))


def cross_entropy(student: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum over M tokens of the cross-entropy of logits [M, V] to token ids [M], in nats."""
    return functional.cross_entropy(student.float(), tokens, reduction="sum")


def _with_tail(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[M, K + 1] log-probabilities of `ids`, and of all others together.

    The last is a sum of its own, not 1 minus the others, which would be rounding where the teacher is sure.
    """
    whole = logits.logsumexp(dim=1, keepdim=True)
    others = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([logits.gather(1, ids), others], dim=1) - whole
