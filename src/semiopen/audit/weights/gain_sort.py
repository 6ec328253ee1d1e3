"""Norm gains that were permuted and not folded: each feature's gains in all norms name it.

Needs a public relative and no query. Under a fold all gains are ones, and there is nothing to sort.
"""

from collections.abc import Mapping

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import Key, assign, lock_rest
from semiopen.audit.weights.layout import HEAD, common_gains


def run(victim: Victim, relative: Mapping[str, torch.Tensor]) -> Finding:
    """Attack.

    Args:
        victim: its open norms are all that is read.
        relative: whole checkpoint of a public relative.

    Returns:
        `spread`: how much the victim's gains differ between features, relative to their size; no key where they do not.
    """
    ours, theirs = common_gains(victim.config, relative, victim.open_tensors)
    spread = float(theirs.std(1).mean() / theirs.abs().mean().clamp(min=1e-12)) if theirs.numel() else 0.0
    if spread < 1e-3:
        return Finding("gain_sort", figures={"spread": spread})
    scale = ours.std(1, keepdim=True).clamp(min=1e-12)
    permutation = assign(-torch.cdist((ours / scale).T, (theirs / scale).T))
    rotation = torch.eye(len(permutation), dtype=torch.float64)[:, permutation]
    sealed_head = HEAD not in victim.open_tensors
    rest = lock_rest(victim.config, relative, rotation, victim.sealed, sealed_head)
    return Finding("gain_sort", figures={"spread": spread}, key=Key(rotation), tensors=rest)
