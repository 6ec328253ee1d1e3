"""Sorted values: no permutation of a head's entries changes which numbers are in it.

What the permutation of KV-Shield (arXiv 2409.04040) leaves, in each key after its rotary turn and in each value; a
fresh permutation for each token would leave it too.
"""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump, turn_to
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(dump: Dump, projections: Projections, below: Below, given: torch.Tensor) -> tuple[Recovered, torch.Tensor]:
    """Attack; see `collision.run`. Returns how unlike each token is as well, [T]."""
    seen = torch.stack([dump.keys[0], dump.values[0]]).sort(-1).values.transpose(1, 2)  # [2, T, K, D]

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        keys, values = projections.of(states)
        turned = turn_to(dump.config, keys, len(past))
        return far(seen[:, len(past)], torch.stack([turned, values], 1).sort(-1).values)

    ids, costs = left_to_right(below, unlike, dump.length, dump.config.vocab_size, given)
    return Recovered.all_of("sorted_values", ids, len(given), below.asked, unlike=float(costs.mean())), costs
