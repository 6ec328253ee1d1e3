"""Base graft: the layers of a public relative in place of the sealed ones. No query, no training."""

from collections.abc import Mapping

import torch

from semiopen.audit.thief import Theft, start_model
from semiopen.audit.victim import Victim


def run(victim: Victim, base: Mapping[str, torch.Tensor]) -> Theft:
    """Attack.

    Args:
        victim: what is attacked; it is not asked anything.
        base: weights of the relative, under the same names.

    Raises:
        SemiopenError: the relative has other shapes.
    """
    return Theft(start_model(victim, 0, base))
