"""One authorised state and an embedding that lies open in another order: the sorted values of a row name it.

A control rather than a threat to our plans: the embedding is sealed in all of them, and a dense rotation leaves no
value as it was. It shows why a permutation needs more than one basis for what crosses and what is stored.
"""

import torch

from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import Key, assign


def run(exposed: torch.Tensor, emitted: torch.Tensor) -> Finding:
    """Attack.

    Args:
        exposed: [V, H] the rows of an embedding in the plain order of features; the order of rows does not matter.
        emitted: [N, H] what the enclave gave out for N tokens, which need not be known.

    Returns:
        `mismatch`: relative distance of the emitted rows from the exposed ones in the order found; 0 is equal. The key
        is a signed permutation.
    """
    ours, theirs = exposed.double(), emitted.double()
    names = torch.cdist(theirs.abs().sort(1).values, ours.abs().sort(1).values).argmin(1)
    rows = ours[names]
    features = assign(-torch.cdist(rows.abs().T, theirs.abs().T))
    signs = (rows[:, features] * theirs).sum(0).sign()
    rotation = torch.eye(len(features), dtype=torch.float64)[:, features] * signs
    mismatch = float((rows @ rotation - theirs).norm() / theirs.norm())
    return Finding("known_row", len(theirs), {"mismatch": mismatch}, Key(rotation))
