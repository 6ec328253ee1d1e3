"""Norms: no rotation of a head's entries changes its length, nor one inside a rotary plane the length of that plane."""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(
    dump: Dump, projections: Projections, below: Below, given: torch.Tensor, planes: bool
) -> tuple[Recovered, torch.Tensor]:
    """Attack; see `collision.run`. Returns how unlike each token is as well, [T].

    Args:
        dump, projections, below, given: see there.
        planes: each rotary plane of a key by itself, against a key inside the planes; else whole heads, against any
            rotation of a head.
    """

    def lengths(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if planes:
            one, other = keys.chunk(2, -1)
            parts = torch.stack([one, other], -1).norm(dim=-1)
        else:
            parts = keys.norm(dim=-1, keepdim=True)
        return torch.cat([parts.flatten(1), values.norm(dim=-1)], 1)

    seen = lengths(dump.keys[0].transpose(0, 1), dump.values[0].transpose(0, 1))

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return far(seen[len(past)], lengths(*projections.of(states)))

    ids, costs = left_to_right(below, unlike, dump.length, dump.config.vocab_size, given)
    name = "plane_norms" if planes else "norms"
    return Recovered.all_of(name, ids, len(given), below.asked, unlike=float(costs.mean())), costs
