"""As many known tokens as a head has entries, against any invertible key on the values: least squares."""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.kv.search import far, left_to_right


def run(dump: Dump, projections: Projections, below: Below, given: torch.Tensor) -> tuple[Recovered, torch.Tensor]:
    """Attack; see `collision.run`. Only values are read. Returns how unlike each token is as well, [T].

    `given` are known tokens [N], such as those of a system prompt that everyone gets. For fewer than a head has entries
    the key is that of least norm.
    """
    seen = dump.values[0].transpose(0, 1)  # [T, K, D]
    known = torch.stack([below.states(given[:t], given[t : t + 1])[0] for t in range(len(given))])
    mine = projections.of(known)[1]
    back = [
        torch.linalg.lstsq(seen[: len(given), head].double(), mine[:, head].double(), driver="gelsd").solution
        for head in range(seen.shape[1])
    ]
    straight = torch.stack([seen[:, head].double() @ one for head, one in enumerate(back)], 1).float()

    def unlike(states: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return far(straight[len(past)], projections.of(states)[1])

    ids, costs = left_to_right(below, unlike, dump.length, dump.config.vocab_size, given)
    return Recovered.all_of("value_key", ids, len(given), below.asked, unlike=float(costs.mean())), costs
