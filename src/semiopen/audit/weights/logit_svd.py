"""What logits alone tell of the head (after Carlini et al., arXiv 2403.06634): hidden size, and its span.

Needs no state and no relative, and works on any interface that gives whole logits or log-probabilities.
"""

import torch

from semiopen.audit.weights.finding import Finding

_NOISE = 1e-12  # of fp64: what is less is rounding


def run(logits: torch.Tensor) -> Finding:
    """Attack.

    Args:
        logits: [N, V], N at least 2, or log-probabilities; NaN where none were given: the least one given is put there.

    Returns:
        `hidden_size`: where the singular values fall most steeply, and `fall`: by what factor.
    """
    values = torch.linalg.svdvals(_filled(logits))
    values = values.clamp(min=_NOISE * values[0])
    falls = values[:-1] / values[1:]
    place = int(falls.argmax())
    return Finding("logit_svd", len(logits), {"hidden_size": float(place + 1), "fall": float(falls[place])})


def span(logits: torch.Tensor, rank: int) -> torch.Tensor:
    """[V, rank] fp64, orthonormal: what the head's columns lie in, up to what is added to all logits alike."""
    return torch.linalg.svd(_filled(logits), full_matrices=False)[2][:rank].T


def outside(head: torch.Tensor, found: torch.Tensor) -> float:
    """How much of a true head [V, H] is outside a span: 0 none, 1 all of it. Relative, Frobenius."""
    centred = head.double() - head.double().mean(0)
    return float((centred - found @ (found.T @ centred)).norm() / centred.norm())


def _filled(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    least = torch.where(logits.isnan(), torch.inf, logits).amin(1, keepdim=True)
    logits = torch.where(logits.isnan(), least, logits)
    return logits - logits.mean(1, keepdim=True)  # log-probabilities are logits up to this
