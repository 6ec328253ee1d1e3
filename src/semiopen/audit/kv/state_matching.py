"""Vocabulary matching on hidden states that were left over, in a permuted or a rotated basis.

After "Hidden No More" (arXiv 2505.18332): sorted vectors know no permutation, and products no rotation.
"""

import torch

from semiopen.audit.kv import gram
from semiopen.audit.kv.below import Below
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(states: torch.Tensor, below: Below, vocabulary: int, given: torch.Tensor, rotated: bool) -> Recovered:
    """Attack.

    Args:
        states: [T, H] in an unknown basis.
        below: the layers below as the thief knows them, in the plain basis.
        vocabulary: size of it.
        given: ids of the first tokens.
        rotated: whether the basis may be any rotation, or a permutation alone.
    """
    name = "states_rotated" if rotated else "states_sorted"
    if rotated:
        found, costs = gram.run(states[:, None], lambda mine: mine[:, None], below, vocabulary, given)
        return Recovered.all_of(name, found.ids, len(given), below.asked, unlike=float(costs.mean()))
    seen = states.sort(-1).values

    def unlike(mine: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return far(seen[len(past)], mine.sort(-1).values)

    ids, costs = left_to_right(below, unlike, len(states), vocabulary, given)
    return Recovered.all_of(name, ids, len(given), below.asked, unlike=float(costs.mean()))
