"""Collision: forward each candidate through the layers below and compare its keys and values with those in the cache.

After "Shadow in the Cache" (arXiv 2508.09442) and SipIt (arXiv 2510.15511), with the whole vocabulary as candidates and
a beam of one. With the victim's own layers, or the enclave to ask, it is exact; with a relative's it is near.
"""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right

EQUAL = 0.02  # relative distance under which a candidate is the token; others are ten times as far


def run(
    dump: Dump,
    projections: Projections | None,
    below: Below,
    given: torch.Tensor,
    proposals: torch.Tensor | None = None,
) -> Recovered:
    """Attack.

    Args:
        dump: the first open block's cache is read; with no open block, the states.
        projections: of that block, as the thief knows them; None reads the states.
        below: what lies below it.
        given: ids of the first tokens.
        proposals: [T, V] scores of an order in which candidates are tried; the search at a position then ends with the
            first that fits, which saves queries of an enclave.

    Returns:
        `unlike`: mean relative distance of what was taken; 0 is exact.
    """
    if projections is None:
        assert dump.states is not None, "something has to be read"
        seen = dump.states
    else:
        seen = torch.cat([dump.straight_keys().flatten(1), dump.values[0].transpose(0, 1).flatten(1)], 1)

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        if projections is None:
            return far(seen[len(past)], states)
        return far(seen[len(past)], torch.cat([part.flatten(1) for part in projections.of(states)], 1))

    enough = 0.0 if proposals is None else EQUAL
    ids, costs = left_to_right(below, unlike, dump.length, dump.config.vocab_size, given, proposals, enough)
    return Recovered.all_of("collision", ids, len(given), below.asked, unlike=float(costs[len(given) :].mean()))
