"""Membership in a row space: mixing tokens with each other hides their order, not which tokens they are.

Against covers that multiply the tokens' vectors from the left by a secret matrix. The vectors must not depend on
context, so that a dictionary of them can be made, and there must be fewer tokens than entries.
"""

import torch
import torch.nn.functional as F

from semiopen.audit.kv.recovered import Recovered


def run(mixed: torch.Tensor, dictionary: torch.Tensor) -> Recovered:
    """Attack.

    Args:
        mixed: [N, F] secret mixtures of tokens' vectors.
        dictionary: [V, F] the vectors of all words.

    Returns:
        As many words as `mixed` has dimensions, without positions. `apart`: how much further outside the space the next
        word lies; near 0 where nothing was found.
    """
    _, sizes, rows = torch.linalg.svd(mixed.double(), full_matrices=False)
    rank = int((sizes > 1e-5 * sizes[0]).sum())
    unit = F.normalize(dictionary.double())
    outside = (1 - (unit @ rows[:rank].T).square().sum(1)).clamp(min=0)
    order = outside.argsort()
    ids = order[:rank]
    apart = float(outside[order[rank]] - outside[order[rank - 1]]) if rank < len(order) else 0.0
    return Recovered("membership", ids, torch.full_like(ids, -1), figures={"apart": apart, "rank": float(rank)})
