"""FT-closed: fresh layers where the sealed ones are, trained so that the whole answers as the victim does.

The open layers stay as they are (Huang et al., arXiv 2410.11182).
"""

from collections.abc import Mapping

import torch

from semiopen.audit.answers import Labels, imitate
from semiopen.audit.thief import Theft, sealed_parameters, start_model
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
    return imitate(victim, thief, sealed_parameters(thief, victim), queries, labels, settings, seed, report, told)
