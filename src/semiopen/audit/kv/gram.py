"""Gram matrix: no rotation changes the products of a token's vectors with those of the tokens before it.

Each further token is told apart by as many numbers as there are tokens before it.
"""

from collections.abc import Callable

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(
    seen: torch.Tensor,
    vectors: Callable[[torch.Tensor], torch.Tensor],
    below: Below,
    vocabulary: int,
    given: torch.Tensor,
) -> tuple[Recovered, torch.Tensor]:
    """Attack.

    Args:
        seen: [T, P, D] vectors in P unknown bases, one for each part: the values of all heads, or states as one part.
        vectors: the same [N, P, D] of states [N, H], as the thief knows them.
        below: see `collision.run`.
        vocabulary: size of it.
        given: ids of the first tokens.

    Returns:
        What was read, and how unlike each token is, [T].
    """
    products = torch.einsum("tpd,spd->tsp", seen, seen)

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        mine = vectors(states)
        with_itself = mine.square().sum(-1)[:, None]
        if len(past):
            with_itself = torch.cat([torch.einsum("cpd,spd->csp", mine, vectors(past)), with_itself], 1)
        return far(products[len(past), : len(past) + 1], with_itself)

    ids, costs = left_to_right(below, unlike, len(seen), vocabulary, given)
    return Recovered.all_of("gram", ids, len(given), below.asked, unlike=float(costs.mean())), costs
