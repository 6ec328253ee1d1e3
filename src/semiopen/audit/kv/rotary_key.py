"""One known token against a key that keeps the rotary planes: a complex number for each plane and head.

A cache begins with the mark of a text's beginning, whose keys the thief can compute: dividing gives the key.
"""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(dump: Dump, projections: Projections, below: Below, given: torch.Tensor) -> tuple[Recovered, torch.Tensor]:
    """Attack; see `collision.run`. Only keys are read. Returns how unlike each token is as well, [T]."""
    seen = _planes(dump.straight_keys())
    known = torch.stack([below.states(given[:t], given[t : t + 1])[0] for t in range(len(given))])
    mine = _planes(projections.of(known)[0])
    secret = (seen[: len(given)] * mine.conj()).sum(0) / mine.abs().square().sum(0).clamp(min=1e-12)

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        # In the plain basis, or planes that the key made small would not count.
        return far(seen[len(past)] / secret, _planes(projections.of(states)[0]))

    ids, costs = left_to_right(below, unlike, dump.length, dump.config.vocab_size, given)
    return Recovered.all_of("rotary_key", ids, len(given), below.asked, unlike=float(costs.mean())), costs


def _planes(keys: torch.Tensor) -> torch.Tensor:
    """[N, K, D] -> [N, K, D / 2] complex."""
    return torch.complex(*keys.float().chunk(2, -1))
