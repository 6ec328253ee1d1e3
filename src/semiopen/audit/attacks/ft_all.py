"""FT-all: fresh layers where the sealed ones are, then the whole model is trained to answer as the victim does.

(Huang et al., arXiv 2410.11182)
"""

from collections.abc import Mapping

import torch

from semiopen.audit.answers import Labels, imitate
from semiopen.audit.thief import Theft, start_model
from semiopen.audit.training import Report, Settings
from semiopen.audit.victim import Informed, Victim


def run(
    victim: Victim,
    queries: torch.Tensor,
    settings: Settings,
    seed: int = 0,
    base: Mapping[str, torch.Tensor] | None = None,
    report: Report | None = None,
    labels: Labels = "soft",
    head: Mapping[str, torch.Tensor] | None = None,
    told: torch.Tensor | None = None,
) -> Theft:
    """Attack. Arguments as in `sem.run`; `labels` says how much of each answer is learned from.

    Of a sealed head, `head` is what to begin with, and `told` the tokens [N, T] that it gave: see `imitate`.
    """
    thief = start_model(Informed(victim, head or {}), seed, base)
    return imitate(victim, thief, list(thief.parameters()), queries, labels, settings, seed, report, told)
