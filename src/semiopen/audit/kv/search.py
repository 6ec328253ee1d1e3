"""Reading a conversation token by token: each candidate goes through what lies below, and the likest one is taken.

Legend: T tokens, C candidates, H hidden size, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.recovered import Recovered

# States [C, H] of candidates, and those [t, H] of the tokens taken so far -> [C], how unlike each is what was seen.
Unlike = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_TRIED = 8  # positions on which orders of the heads are compared
_MOST_ORDERS = 24


def left_to_right(
    below: Below,
    unlike: Unlike,
    length: int,
    vocabulary: int,
    given: torch.Tensor,
    proposals: torch.Tensor | None = None,
    enough: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read [T] tokens.

    Args:
        below: gives the candidates' states.
        unlike: see `Unlike`.
        length: T.
        vocabulary: V, all of which are candidates.
        given: ids of the first tokens.
        proposals: [T, V] scores; likelier candidates are tried first.
        enough: a candidate this like what was seen ends the search at its position.

    Returns:
        ids [T], and how unlike each is, [T], zero for what was given.
    """
    ids, costs = given.clone(), [0.0] * len(given)
    past = [below.states(ids[:t], ids[t : t + 1])[0] for t in range(len(given))]
    for t in range(len(given), length):
        candidates = torch.arange(vocabulary) if proposals is None else proposals[t].argsort(descending=True)
        so_far = torch.stack(past) if past else torch.empty(0)
        best: tuple[float, int, torch.Tensor] | None = None
        for part in candidates.split(below.batch):
            states = below.states(ids, part)
            cost = unlike(states, so_far)
            at = int(cost.argmin())
            if best is None or float(cost[at]) < best[0]:
                best = float(cost[at]), int(part[at]), states[at]
            if best[0] <= enough:
                break
        assert best is not None, "a vocabulary has words"
        costs.append(best[0])
        ids = torch.cat([ids, torch.tensor([best[1]])])
        past.append(best[2])
    return ids, torch.tensor(costs)


def far(seen: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[C]: how far features [C, ...] are from `seen` [...], relative to its size."""
    return (features - seen).flatten(1).norm(dim=1) / seen.norm().clamp(min=1e-12)


def in_best_order(dump: Dump, attack: Callable[[Dump], tuple[Recovered, torch.Tensor]], given: int = 1) -> Recovered:
    """Run an attack in that order of the key-value heads in which its first tokens are likest to what was seen.

    A keyed fold changes the order; a thief who has none of the accelerator's weights must find it out.
    """
    orders = list(_orders(len(dump.keys[0])))
    if len(orders) > 1:
        costs = [float(attack(dump.ordered(order).cut(given + _TRIED))[1].sum()) for order in orders]
        dump = dump.ordered(orders[costs.index(min(costs))])
    return attack(dump)[0]


def _orders(heads: int) -> Iterator[Sequence[int]]:
    if math.factorial(heads) > _MOST_ORDERS:
        yield range(heads)
        return
    yield from itertools.permutations(range(heads))
